"""`ExpertMap`: which experts are alike, how much they are used, and what they take."""

from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_bfmoe.viz.assets import style
from lightning_bfmoe.viz.expert_embedding import Embedding, embed_experts
from lightning_bfmoe.viz.expert_picture import expert_figure, expert_svg
from lightning_bfmoe.viz.png import widget_library, with_picture
from lightning_bfmoe.viz.routes import Forward, pick_layer, trace_routes

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure
else:
    ipywidgets = widget_library("ipywidgets")


class ExpertMap(ipywidgets.VBox):
    """A layer's experts in the plane, coloured by load; hovering shows their top tokens.

    The text is routed through the model once, when the map is built. How points are placed and
    tokens ranked is said in `viz.expert_embedding`.

    Example:
        >>> import torch
        >>> from lightning_bfmoe.data import ByteTokenizer
        >>> from lightning_bfmoe.layers import ButterflyMoE
        >>> model = torch.nn.Sequential(torch.nn.Embedding(256, 16), ButterflyMoE(16, 32))
        >>> ExpertMap(model, ByteTokenizer(), "the quick brown fox").embedding.points.shape
        (8, 2)

    Args:
        model: Any module with ButterflyMoE layers.
        tokenizer: With ``encode`` and ``decode``; see `trace_routes`.
        text: Real text, a few thousand tokens of it.
        layer: Path of the layer to begin with; the first when None.
        forward: What to call with the ids, (1, tokens) int64; the model itself when None.
        context: Tokens of one forward pass (count).
        max_tokens: The text is cut behind so many tokens (count).
        top: Tokens listed for each expert (count).

    Raises:
        ConfigError: No layer, no tokeniser, or an empty text.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: str,
        *,
        layer: str | None = None,
        forward: Forward | None = None,
        context: int = 64,
        max_tokens: int = 20_000,
        top: int = 8,
    ) -> None:
        self.routes = trace_routes(
            model, tokenizer, text, forward=forward, context=context, max_tokens=max_tokens
        )
        names = list(self.routes.experts)
        self._embed = lambda name: embed_experts(model, self.routes, name, top)
        self._known: dict[str, Embedding] = {}
        self.layer = ipywidgets.Dropdown(
            options=names, value=pick_layer(names, layer), description="layer"
        )
        self._picture = ipywidgets.HTML()
        super().__init__([self.layer, self._picture])
        self.layer.observe(self._draw, names="value")
        self._draw()

    @property
    def embedding(self) -> Embedding:
        """The layer that is shown."""
        name = self.layer.value
        if name not in self._known:
            self._known[name] = self._embed(name)
        return self._known[name]

    def _draw(self, change: Any = None) -> None:
        picture = expert_svg(self.embedding, self.layer.value)
        self._picture.value = f"<style>{style()}</style>{picture}"

    def figure(self) -> "Figure":
        """The layer that is shown, as a matplotlib figure."""
        return expert_figure(self.embedding, self.layer.value)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        words = f"ExpertMap: {len(self.embedding.points)} experts of {self.layer.value}"
        return with_picture(super()._repr_mimebundle_(**kwargs), self.figure(), words)
