"""A picture beside each widget: what shows where no JavaScript runs, as on GitHub."""

import base64
import importlib
import io
from typing import TYPE_CHECKING, Any

from lightning_bfmoe.errors import BFMoEError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito, for people with any kind of colour blindness; in place of their black
# and pale yellow two colours that show on light and on dark pages.
PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a", "#b5b000"]
COLOR_A, COLOR_B = PALETTE[:2]


def make_figure(width: float, height: float) -> "Figure":
    """An empty figure in inches, without pyplot and its global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def png(figure: "Figure", dpi: int = 90) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def with_picture(bundle: Any, figure: "Figure", words: str) -> Any:
    """A widget's MIME bundle, with the PNG and a line of text added.

    Args:
        bundle: What the widget's own ``_repr_mimebundle_`` gave: a dict, a pair or None.
        figure: The static twin.
        words: For frontends that show text only.
    """
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
    extra = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": words}
    return {**data, **extra}, metadata


def widget_library(name: str) -> Any:
    """A module that widgets are built on; where it is missing, a stand-in.

    With the stand-in every class can be imported, and says what to install when it is called.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        return _Absent()


class _NoWidget:
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise BFMoEError(
            f"{cls.__name__} needs ipywidgets and anywidget",
            got="an environment without them",
            fix='Run: pip install "lightning-bfmoe[notebooks]". Without them viz has figures '
            "(explorer_figure, routing_figure, expert_figure) and export_explorer.",
        )


class _Absent:
    """What a class body asks of a library that is not there."""

    def __getattr__(self, name: str) -> Any:
        return _NoWidget if name in ("AnyWidget", "VBox") else self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self
