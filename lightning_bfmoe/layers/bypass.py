"""`LinearBypass`: a low-rank linear map, or a constant, where a whole submodule stood."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.layers.state import STATE_VERSION, decode_extra_state, encode_extra_state

_ROOM = 1024  # bytes: a text from another root is longer or shorter, the buffer is not


class LinearBypass(nn.Module):
    r"""y = B (U x) + b in place of a feed-forward or attention submodule.

    .. math:: y = B\,U x + b ,\qquad U \in R^{r \times d_{in}},\ B \in R^{d_{out} \times r}

    Several layers of one `group` share U, as the very same parameter. Rank 0 leaves the constant b.

    It takes whatever its place is called with and uses the first tensor. Where the submodule gave a
    tuple (attention, with weights and a cache behind the output), so does this, with None behind.

    Settings and placement stand in the uint8 buffer `written`, so that a checkpoint alone rebuilds
    the layer (`swap.plan_from_state_dict`).

    Example:
        >>> LinearBypass(16, 16, rank=2)(torch.randn(3, 5, 16)).shape
        torch.Size([3, 5, 16])
        >>> LinearBypass(16, 16, rank=0, outputs=2)(hidden_states=torch.randn(3, 16))[1] is None
        True

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        rank: r, from 0 to min(d_in, d_out).
        outputs: Length of the tuple that is returned; 0 for a plain tensor.
        group: Name under which U is shared; None for an own one.
        device: Where parameters live.

    Raises:
        ConfigError: A size is out of range.

    Source: SubFit-style (arXiv 2606.02559, whose code is unpublished): ours.
    """

    basis: nn.Parameter | None
    """U, (r, d_in)."""
    weight: nn.Parameter | None
    """B, (d_out, r)."""
    bias: nn.Parameter
    """b, (d_out,)."""
    written: Tensor
    batch_first = True
    in_proj_bias = None  # torch's encoder layers ask for both, and then leave out their fused path

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        outputs: int = 0,
        group: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= rank <= min(d_in, d_out):
            raise ConfigError(
                f"the rank of a bypass {d_in} -> {d_out} lies in 0 to {min(d_in, d_out)}",
                got=f"rank={rank}",
                fix="Use rank=0 for a constant, or a smaller rank.",
            )
        self.d_in, self.d_out, self.rank, self.outputs, self.group = (
            d_in, d_out, rank, outputs, group,
        )  # fmt: skip
        basis = nn.Parameter(torch.zeros(rank, d_in, device=device)) if rank else None
        weight = nn.Parameter(torch.zeros(d_out, rank, device=device)) if rank else None
        self.register_parameter("basis", basis)
        self.register_parameter("weight", weight)
        self.bias = nn.Parameter(torch.zeros(d_out, device=device))
        self.register_buffer("written", torch.zeros(0, dtype=torch.uint8, device=device))
        self._placement: dict[str, Any] | None = None
        self._write()

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the constructor, plain data."""
        names = ("d_in", "d_out", "rank", "outputs", "group")
        return {name: getattr(self, name) for name in names}

    @property
    def placement(self) -> dict[str, Any] | None:
        """Where a swap put this layer (`layers.surgery`); None when it was built by hand."""
        return self._placement

    @placement.setter
    def placement(self, value: dict[str, Any] | None) -> None:
        self._placement = value
        self._write()

    def _write(self) -> None:
        state = {
            "version": STATE_VERSION,
            "kind": type(self).__name__,
            "settings": self.settings,
            "placement": self._placement,
        }
        text = encode_extra_state(state).to(self.written.device)
        written = text.new_full((-(-len(text) // _ROOM) * _ROOM,), ord(" "))
        written[: len(text)] = text
        self.written = written

    def _load_from_state_dict(self, state_dict, prefix, *others):  # type: ignore[no-untyped-def]
        """Take over the placement of another root, which may be longer or shorter than here."""
        key = prefix + "written"
        state = decode_extra_state(state_dict.get(key))
        if state is not None and state.get("settings") == self.settings:
            state_dict = {**state_dict, key: self.written}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """First tensor (..., d_in) among the arguments to (..., d_out), or to a tuple with it.

        Raises:
            ShapeError: No tensor, or one of another width.
        """
        named = kwargs.get("hidden_states")
        x = next((v for v in (named, *args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or x.shape[-1] != self.d_in:
            raise ShapeError(
                f"a bypass takes tokens of width {self.d_in}",
                got="no tensor" if x is None else tuple(x.shape),
                fix="Check which submodule this layer replaced.",
            )
        if self.basis is None or self.weight is None:
            y = self.bias.to(x.dtype).expand(*x.shape[:-1], self.d_out)
        else:
            hidden = F.linear(x, self.basis.to(x.dtype))  # (..., r)
            y = F.linear(hidden, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return (y, *[None] * (self.outputs - 1)) if self.outputs else y

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        shared = f", group={self.group!r}" if self.group else ""
        return f"{self.d_in} -> {self.d_out}, rank={self.rank}{shared}"


def share_basis(layers: list[LinearBypass]) -> None:
    """Give all layers of one group the first one's U as their own parameter."""
    first: dict[str, nn.Parameter] = {}
    for layer in layers:
        if layer.group is not None and layer.basis is not None:
            layer.basis = first.setdefault(layer.group, layer.basis)


def bypasses(model: nn.Module) -> list[tuple[str, LinearBypass]]:
    """Every bypass of a model, with its path."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LinearBypass)]
