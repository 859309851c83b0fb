"""`KVCache`: keys and values of the tokens seen so far, which a model reads and fills.

What a model has to do to decode with it, in the three places where tokens meet (`examples/gpt.py`):

    positions      self.position[cache.positions]              instead of [:time]
    each layer     block(x, cache[number])                     the layer's own part
    attention      k, v, mask = memory.update(k, v)            all keys and values seen so far
                   scaled_dot_product_attention(q, k, v, attn_mask=mask)
"""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer."""

    def __init__(self, cache: "KVCache") -> None:
        self._cache = cache
        self.keys: Tensor | None = None  # (batch, heads, length, width of a head)
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the new tokens' keys and values, and return those of all tokens with their mask.

        Args:
            keys: (batch, heads, time, width of a head).
            values: The same.

        Returns:
            Keys and values, (batch, heads, visible, width), and a mask for
            `scaled_dot_product_attention`, (batch, 1, time, visible) bool: true where a token may
            look.
        """
        cache = self._cache
        if self.keys is None or self.values is None:  # now shape, dtype and device are known
            self.keys, self.values = (
                new.new_zeros(*new.shape[:2], cache.length, new.shape[3]) for new in (keys, values)
            )
        place = cache.positions[:, None, :, None]  # (batch, 1, time, 1)
        self.keys.scatter_(2, place.expand_as(keys), keys)
        self.values.scatter_(2, place.expand_as(values), values)
        visible = cache.mask.shape[-1]
        return self.keys[:, :, :visible], self.values[:, :, :visible], cache.mask


class KVCache:
    """Keys and values of a batch, in buffers of fixed size; each row has a length of its own.

    Prompts of unequal length stand at the left, filled up on the right. What is written at a
    filled-up place is never looked at: a token sees the places up to its own, and the row's next
    token overwrites the first of them. Nothing here waits for a GPU, so a step can be captured as a
    CUDA graph.

    Example:
        >>> cache = KVCache(batch=1, length=8)
        >>> cache.begin(time=2, visible=2)
        >>> cache.positions.tolist(), cache.mask[0, 0].tolist()
        ([[0, 1]], [[True, False], [True, True]])
        >>> keys, values, mask = cache[0].update(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4))
        >>> keys.shape, cache[0].keys.shape
        (torch.Size([1, 2, 2, 4]), torch.Size([1, 2, 8, 4]))

    Args:
        batch: Rows.
        length: Most tokens a row.
        device: Where the model computes.
    """

    positions: Tensor
    """Place of each token of the present pass in its row, (batch, time) int64."""
    mask: Tensor
    """Where each of them may look, (batch, 1, time, visible) bool."""

    def __init__(self, batch: int, length: int, device: torch.device | str | None = None) -> None:
        self.length = length
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        """Tokens seen in each row, (batch,)."""
        self._layers: list[LayerCache] = []

    def __getitem__(self, layer: int) -> LayerCache:
        """The part of layer 0, 1, ...; made when it is first asked for."""
        while len(self._layers) <= layer:
            self._layers.append(LayerCache(self))
        return self._layers[layer]

    def begin(self, time: int, visible: int) -> None:
        """Set `positions` and `mask` for a pass over `time` new tokens in each row.

        Args:
            time: New tokens.
            visible: Places that are read, from the first one on; no row is longer after the pass.
        """
        device = self.lengths.device
        places = self.lengths[:, None] + torch.arange(time, device=device)
        # A row that has ended goes along with the others; its last place takes what it writes.
        self.positions = places.clamp(max=self.length - 1)  # (batch, time)
        keys = torch.arange(visible, device=device)
        self.mask = keys <= self.positions[:, None, :, None]  # (batch, 1, time, visible)

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        kept = [t for layer in self._layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in kept)
