"""`RoutingView`: type a sentence and see which expert takes which token."""

from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_bfmoe.viz.assets import style
from lightning_bfmoe.viz.png import widget_library, with_picture
from lightning_bfmoe.viz.routes import Forward, Routes, explain, pick_layer, trace_routes
from lightning_bfmoe.viz.routing_picture import routing_figure, routing_html

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure
else:
    ipywidgets = widget_library("ipywidgets")


class RoutingView(ipywidgets.VBox):
    """Runs a sentence through the user's model and shows the experts of each token.

    Every change of the sentence is one forward pass in evaluation mode, in the kernel. A saved
    notebook keeps a PNG of the sentence it was built with.

    Example:
        >>> import torch
        >>> from lightning_bfmoe.data import ByteTokenizer
        >>> from lightning_bfmoe.layers import ButterflyMoE
        >>> model = torch.nn.Sequential(torch.nn.Embedding(256, 16), ButterflyMoE(16, 32))
        >>> RoutingView(model, ByteTokenizer(), "to be").routes.experts["1"].shape
        (5, 2)

    Args:
        model: Any module with ButterflyMoE layers.
        tokenizer: With ``encode`` and ``decode``; see `trace_routes`.
        text: The sentence to begin with.
        layer: Path of the layer to begin with; the first when None.
        forward: What to call with the ids, (1, tokens) int64; the model itself when None.
        context: Tokens of one forward pass (count).

    Raises:
        ConfigError: No layer, no tokeniser, or an empty sentence.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: str = "To be, or not to be, that is the question.",
        *,
        layer: str | None = None,
        forward: Forward | None = None,
        context: int = 64,
    ) -> None:
        self._trace = lambda words: trace_routes(
            model, tokenizer, words, forward=forward, context=context
        )
        self.routes: Routes = self._trace(text)
        """The sentence that is shown."""
        names = list(self.routes.experts)
        self.text = ipywidgets.Text(
            text, description="sentence", continuous_update=False,
            layout=ipywidgets.Layout(width="80%"),
        )  # fmt: skip
        self.layer = ipywidgets.Dropdown(
            options=names, value=pick_layer(names, layer), description="layer"
        )
        self._picture = ipywidgets.HTML()
        super().__init__([self.text, self.layer, self._picture])
        self.text.observe(self._retrace, names="value")
        self.layer.observe(self._draw, names="value")
        self._draw()

    def _retrace(self, change: Any) -> None:
        try:
            self.routes = self._trace(change["new"])
        except Exception as error:  # shown in the widget: a callback's traceback is easily missed
            self._picture.value = f"<b>{explain(error)}</b>"
        else:
            self._draw()

    def _draw(self, change: Any = None) -> None:
        self._picture.value = f"<style>{style()}</style>" + routing_html(
            self.routes, self.layer.value
        )

    def figure(self) -> "Figure":
        """The sentence that is shown, as a matplotlib figure."""
        return routing_figure(self.routes, self.layer.value)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        words = f"RoutingView: {len(self.routes.pieces)} tokens at {self.layer.value}"
        return with_picture(super()._repr_mimebundle_(**kwargs), self.figure(), words)
