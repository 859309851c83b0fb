"""Which expert took which token of a text, in the user's own model."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import BFMoEError, ConfigError, ShapeError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE, moe_layers

Forward = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Routes:
    """The tokens of a text and where each layer sent them."""

    ids: list[int]
    pieces: list[str]
    """The text of each token."""
    experts: dict[str, np.ndarray]
    """Layer -> (tokens, k) int64: chosen experts, the heaviest first."""
    weights: dict[str, np.ndarray]
    """Layer -> (tokens, k) float32: their weights."""
    num_experts: dict[str, int]
    """Layer -> experts (count)."""

    def load(self, layer: str) -> np.ndarray:
        """Slots of each expert, (experts,) int64."""
        return np.bincount(self.experts[layer].ravel(), minlength=self.num_experts[layer])


@torch.no_grad()
def trace_routes(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    forward: Forward | None = None,
    context: int = 64,
    max_tokens: int = 20_000,
) -> Routes:
    """Run a text through a model, as in evaluation, and note what its routers choose.

    Args:
        model: Any module with ButterflyMoE or ButterflyExperts layers. Its training flags are put
            back; nothing else changes.
        tokenizer: With ``encode`` and ``decode``: ours, one of `tokenizers` or of `transformers`.
        text: A sentence or a book.
        forward: What to call with the ids, (1, tokens) int64; the model itself when None.
        context: Tokens of one forward pass (count), at most what the model can take.
        max_tokens: The text is cut behind so many tokens (count).

    Raises:
        ConfigError: No layer, no tokeniser, or an empty text.
        ShapeError: A layer saw another number of tokens than the text has.
    """
    layers = [(name or "model", layer) for name, layer in moe_layers(model)]
    if not layers:
        raise ConfigError(
            "routes are those of ButterflyMoE layers",
            got=f"{type(model).__name__} without one",
            fix="Swap the model's blocks first (ButterflyMoECallback, swap_feed_forward).",
        )
    ids, pieces = split_tokens(tokenizer, text)
    ids, pieces = ids[:max_tokens], pieces[:max_tokens]
    taps = {name: _Tap(layer) for name, layer in layers}
    training = [(module, module.training) for module in model.modules()]
    held = itertools.chain(model.parameters(), model.buffers())  # a packed layer has buffers only
    device = next(held, torch.empty(0)).device
    try:
        model.eval()
        for start in range(0, len(ids), context):
            window = torch.tensor([ids[start : start + context]], device=device)
            for tap in taps.values():
                tap.open()
            (forward or model)(window)
            for name, tap in taps.items():
                tap.close(name, window.shape[1])
    finally:
        for module, flag in training:
            module.training = flag
        for tap in taps.values():
            tap.handle.remove()
    experts, weights = {}, {}
    for name, tap in taps.items():
        chosen, share = torch.cat(tap.experts), torch.cat(tap.weights)
        order = share.argsort(dim=1, descending=True, stable=True)
        experts[name] = chosen.gather(1, order).numpy()
        weights[name] = share.gather(1, order).numpy()
    counts = {
        name: (layer.experts if isinstance(layer, ButterflyMoE) else layer).num_experts
        for name, layer in layers
    }
    return Routes(ids, pieces, experts, weights, counts)


def split_tokens(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """Ids of a text, and the piece of text that each stands for.

    Raises:
        ConfigError: The tokeniser cannot encode and decode, or the text is empty.
    """
    if not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")):
        raise ConfigError(
            "a tokenizer has encode and decode",
            got=type(tokenizer).__name__,
            fix="Pass one of lightning_bfmoe.data, tokenizers or transformers.",
        )
    encoded = tokenizer.encode(text)
    encoded = getattr(encoded, "ids", encoded)
    as_tensor = isinstance(encoded, Tensor)
    ids = [int(i) for i in encoded]
    if not ids:
        raise ConfigError("a text to route has tokens", got=repr(text[:40]), fix="Type something.")
    known: dict[int, str] = {}
    for i in dict.fromkeys(ids):
        piece = tokenizer.decode(torch.tensor([i]) if as_tensor else [i])
        known[i] = piece or f"[{i}]"  # a special token has no text
    return ids, [known[i] for i in ids]


class _Tap:
    """A hook on one layer that keeps what the last forward passes chose."""

    def __init__(self, layer: ButterflyMoE | ButterflyExperts) -> None:
        self.experts: list[Tensor] = []
        self.weights: list[Tensor] = []
        self._pass: list[tuple[Tensor, Tensor]] = []
        self.handle = layer.register_forward_hook(self._record, with_kwargs=True)

    def _record(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if isinstance(layer, ButterflyMoE):
            routing = layer.last_routing
            if routing is not None:
                self._pass.append((routing.experts, routing.weights))
            return
        named = dict(zip(("x", "experts", "weights"), args, strict=False)) | kwargs
        self._pass.append((named["experts"], named["weights"]))

    def open(self) -> None:
        """Begin a forward pass."""
        self._pass.clear()

    def close(self, name: str, tokens: int) -> None:
        """End it: the layer was called, and saw every token once."""
        seen = sum(len(experts) for experts, _ in self._pass)
        if seen != tokens:
            raise ShapeError(
                f"layer {name!r} sees each token of the text once",
                got=f"{seen} rows for {tokens} tokens",
                fix="Pass forward= with a function of ids (1, tokens) that runs the whole model "
                "once, without padding.",
            )
        for experts, weights in self._pass:
            self.experts.append(experts.detach().cpu())
            self.weights.append(weights.detach().float().cpu())


def pick_layer(names: list[str], layer: str | None) -> str:
    """The layer to show: the given one, else the first.

    Raises:
        ConfigError: There is no such layer.
    """
    if layer is None:
        return names[0]
    if layer not in names:
        raise ConfigError("layer= is a path of a ButterflyMoE layer", got=layer, fix=f"{names}")
    return layer


def explain(error: BaseException) -> str:
    """A failure in one line, for a widget to show instead of a picture."""
    return str(error) if isinstance(error, BFMoEError) else f"{type(error).__name__}: {error}"
