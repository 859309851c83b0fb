"""What the notebooks share and none of them is about: a look, sliders that stay, the text to read.

An ipywidgets slider draws into an output that is not saved with the notebook. `slide` shows the
picture as an ordinary image that the sliders replace, so the saved notebook keeps the first state.
"""

import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import Image, display
from matplotlib.figure import Figure

from lightning_bfmoe.data.corpus import ON_THE_HUB, load_corpus, local_corpus

# Okabe and Ito's colours, told apart by colour-blind readers
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PINK = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"


def quiet_figures() -> None:
    """Set the look of all figures: white background (also in dark mode), no box around axes."""
    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.dpi": 100,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )


def quiet_lightning() -> None:
    """Silence hints of Lightning that do not concern a demonstration of this size."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for hint in ("does not have many workers", r"isinstance\(treespec", "Skipping val loop"):
        warnings.filterwarnings("ignore", f".*{hint}.*")


def choose_corpus() -> str:
    """Name of the text to read: ``BFMOE_CORPUS``, else the one that is here without a network.

    A corpus of the Hugging Face Hub is fetched now. If it cannot be had, one line says so, and the
    local one is taken.
    """
    local = local_corpus()
    name = os.environ.get("BFMOE_CORPUS", local)
    if name not in ON_THE_HUB:
        return name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # printed instead, since a saved notebook keeps no warning
        corpus = load_corpus(name, fallback=local)
    if corpus.note:
        print(corpus.note)
    return corpus.name


def slide(draw: Callable[..., Figure], **controls: tuple[Sequence[Any], Any]) -> None:
    """Show sliders and the figure that they change; the first figure stays in the saved notebook.

    Args:
        draw: Makes a figure from one value per control.
        **controls: Name -> (choices, the one to start with). The arrow keys move a slider.
    """
    from ipywidgets import Layout, SelectionSlider, VBox

    sliders = {
        name: SelectionSlider(
            options=list(choices),
            value=start,
            description=name.replace("_", " "),
            continuous_update=False,
            layout=Layout(width="32em"),
            style={"description_width": "10em"},
        )
        for name, (choices, start) in controls.items()
    }

    def picture() -> Image:
        figure = draw(**{name: slider.value for name, slider in sliders.items()})
        data = io.BytesIO()
        figure.savefig(data, format="png")
        plt.close(figure)
        return Image(data.getvalue())

    display(VBox(list(sliders.values())))
    shown = display(picture(), display_id=True)
    for slider in sliders.values():
        slider.observe(lambda change: shown.update(picture()), names="value")
