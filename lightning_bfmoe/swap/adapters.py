"""Families whose feed-forward block is not one module, and a door for teaching unknown blocks.

An adapter is a description, not surgery: how to recognise the module, where its matrices are, which
slot receives the new layer, and which slots become the identity or change a setting.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.layers.surgery import Scalar
from lightning_bfmoe.swap.activations import classify_activation, own_activations
from lightning_bfmoe.swap.blocks import FeedForward, NotFeedForwardError
from lightning_bfmoe.swap.linears import is_linear, linear_weight


@dataclass(frozen=True)
class Adapter:
    """How to swap one family; see `register_adapter` for the fields."""

    family: str
    match: Callable[[nn.Module], bool]
    read: Callable[[nn.Module], FeedForward]
    layer_at: str = ""
    identities: Callable[[nn.Module], list[str]] = field(default=lambda module: [])
    attributes: Mapping[str, Scalar] = field(default_factory=dict)
    outer: Mapping[str, Scalar] = field(default_factory=dict)
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None


_REGISTERED: list[Adapter] = []


def register_adapter(
    match: type[nn.Module] | Callable[[nn.Module], bool],
    read: Callable[[Any], FeedForward],
    *,
    family: str | None = None,
    layer_at: str = "",
    identities: tuple[str, ...] | list[str] = (),
    attributes: Mapping[str, Scalar] | None = None,
    forward: Callable[[Any, Tensor], Tensor] | None = None,
) -> Adapter:
    """Teaches `swap_feed_forward` a block that it does not recognise by itself.

    The weights that `read` returns are compared with `forward` on random inputs before any swap, so
    a wrong description is an error, not a wrong model.

    Example: a block that keeps bare weights and multiplies them with `einsum`.
        >>> import torch
        >>> from lightning_bfmoe.swap import FeedForward, find_feed_forward
        >>> class Einsum(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.expand = nn.Parameter(torch.randn(8, 32))
        ...         self.shrink = nn.Parameter(torch.randn(32, 8))
        ...     def forward(self, x):
        ...         hidden = torch.relu(torch.einsum("...d,df->...f", x, self.expand))
        ...         return torch.einsum("...f,fd->...d", hidden, self.shrink)
        >>> model = nn.Sequential(Einsum())
        >>> find_feed_forward(model)[0].status
        'rejected'
        >>> adapter = register_adapter(
        ...     Einsum,
        ...     lambda m: FeedForward(up=m.expand.T, down=m.shrink.T, activation="relu"),
        ... )
        >>> find_feed_forward(model)[0].status
        'ready'
        >>> remove_adapter(adapter)

    Args:
        match: A class, or a function that says whether a module is of this family.
        read: Returns matrices in ``[out, in]`` order, activation and dropout of a module.
        family: Name in reports; the class's name when left out.
        layer_at: Slot of the new layer, a dotted path inside the module; "" replaces the module.
        identities: Slots inside the module that become x -> x.
        attributes: Settings inside the module (number, bool, string or None).
        forward: The block's function, ``forward(module, x)``. Without it the module itself is
            called, or nothing is checked when `layer_at` is given.

    Returns:
        The adapter; `remove_adapter` takes it out again.

    Raises:
        SwapError: `match` or `read` is not callable.
    """
    if not callable(match) or not callable(read):
        raise SwapError(
            "register_adapter needs a class or predicate, and a function that reads the weights",
            got=f"match={match!r}, read={read!r}",
            fix="See the example in help(register_adapter).",
        )
    if isinstance(match, type):
        kind: type[nn.Module] = match
        matches: Callable[[nn.Module], bool] = lambda module: isinstance(module, kind)  # noqa: E731
    else:
        matches = match
    adapter = Adapter(
        family=family or str(getattr(match, "__name__", "custom")),
        match=matches,
        read=read,
        layer_at=layer_at,
        identities=lambda module: list(identities),
        attributes=dict(attributes or {}),
        forward=forward or ((lambda module, x: module.forward(x)) if not layer_at else None),
    )
    _REGISTERED.insert(0, adapter)
    return adapter


def remove_adapter(adapter: Adapter) -> None:
    """Forgets an adapter that `register_adapter` returned.

    Raises:
        SwapError: It is not registered.
    """
    if adapter not in _REGISTERED:
        raise SwapError("only a registered adapter can be removed", got=adapter.family)
    _REGISTERED.remove(adapter)


def all_adapters() -> list[Adapter]:
    """Adapters in the order in which they are asked: the latest registered first."""
    return [*_REGISTERED, *BUILT_IN]


def _parts(
    module: nn.Module, up: str, down: str, activation_slot: str, dropout: float
) -> FeedForward:
    """Reads a plain block from the dotted paths of its two matrices and of its activation."""
    (w_up, b_up), (w_down, b_down) = (
        linear_weight(module.get_submodule(path)) for path in (up, down)
    )
    owner, _, name = activation_slot.rpartition(".")
    known = classify_activation(getattr(module.get_submodule(owner), name), w_up)
    if known is None:
        raise NotFeedForwardError(f"its activation {activation_slot!r} is not elementwise")
    return FeedForward(
        up=w_up,
        down=w_down,
        up_bias=b_up,
        down_bias=b_down,
        activation=known,
        dropout=dropout,
        activation_at=None if isinstance(known, str) else activation_slot,
    )


def _has_linear(module: nn.Module, *names: str) -> bool:
    children = module._modules
    return all((child := children.get(name)) is not None and is_linear(child) for name in names)


def _match_torch_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)


def _read_torch_layer(module: nn.Module) -> FeedForward:
    return _parts(module, "linear1", "linear2", "activation", module.dropout.p)  # type: ignore[arg-type,union-attr]


def _match_split(module: nn.Module) -> bool:
    first, second = module._modules.get("intermediate"), module._modules.get("output")
    if first is None or second is None or sum(map(is_linear, first.modules())) != 1:
        return False
    return _has_linear(first, "dense") and _has_linear(second, "dense")


def _split_activation(module: nn.Module) -> str:
    slots = list(own_activations(module.intermediate))  # type: ignore[arg-type]
    if len(slots) != 1:
        raise NotFeedForwardError(
            "its `intermediate` holds no activation module or function that can be taken out"
        )
    return f"intermediate.{slots[0]}"


def _read_split(module: nn.Module) -> FeedForward:
    return _parts(module, "intermediate.dense", "output.dense", _split_activation(module), 0.0)


def _split_forward(module: nn.Module, x: Tensor) -> Tensor:
    return module.output.dense(module.intermediate(x))  # type: ignore[union-attr,operator]


def _match_fc_pair(module: nn.Module) -> bool:
    inside = {"activation_fn", "final_layer_norm", "self_attn"}
    return _has_linear(module, "fc1", "fc2") and inside <= {*vars(module), *module._modules}


def _read_fc_pair(module: nn.Module) -> FeedForward:
    return _parts(
        module, "fc1", "fc2", "activation_fn", float(vars(module).get("activation_dropout", 0.0))
    )


BUILT_IN = [
    Adapter(  # linear1, activation, dropout and linear2 are called inside the layer's own forward
        "torch-transformer",
        _match_torch_layer,
        _read_torch_layer,
        layer_at="linear1",
        identities=lambda module: ["activation", "dropout", "linear2"],
        attributes={
            "activation_relu_or_gelu": 0
        },  # the layer's fused inference path would read linear1.weight
        outer={"use_nested_tensor": False},  # and so would that of the TransformerEncoder around it
        forward=lambda module, x: module._ff_block(x),  # type: ignore[operator]
    ),
    Adapter(  # BERT and its kin: `intermediate` expands, `output` shrinks, adds and normalises
        "split-bert",
        _match_split,
        _read_split,
        layer_at="intermediate.dense",
        identities=lambda module: [_split_activation(module), "output.dense"],
        forward=_split_forward,
    ),
    Adapter(  # BART, OPT, Whisper ...: fc1 and fc2 stand in the transformer layer itself
        "fc-pair",
        _match_fc_pair,
        _read_fc_pair,
        layer_at="fc1",
        identities=lambda module: ["activation_fn", "fc2"],
        attributes={"activation_dropout": 0.0},
    ),
]
