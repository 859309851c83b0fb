"""A picture beside each widget: what shows where no JavaScript runs, as on GitHub."""

import base64
import io
from typing import TYPE_CHECKING, Any

from lightning_bfmoe.errors import BFMoEError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any kind of colour blindness can tell apart.
PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000"]
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


def missing_widgets(error: ImportError) -> BFMoEError:
    """The error of a widget whose library is not there."""
    return BFMoEError(
        "widgets need ipywidgets and anywidget",
        got=str(error),
        fix='Run: pip install "lightning-bfmoe[notebooks]". Without them viz.explorer_figure and '
        "viz.export_explorer give the picture and the page.",
    )
