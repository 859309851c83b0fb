"""The recognisers: each looks at one module and answers with a candidate, or with None."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import BFMoEError
from lightning_bfmoe.swap.activations import Activation, classify_activation
from lightning_bfmoe.swap.adapters import Adapter
from lightning_bfmoe.swap.blocks import (
    FeedForward,
    NotFeedForwardError,
    UnreadableError,
    relative_error,
    tolerance,
)
from lightning_bfmoe.swap.candidate import Candidate
from lightning_bfmoe.swap.linears import is_linear, linear_weight, unreadable
from lightning_bfmoe.swap.probe import probe_block, run_on_probe


def by_adapter(module: nn.Module, adapter: Adapter) -> Candidate:
    """Reads a module of a known family, and checks the adapter's description on random inputs."""
    found = Candidate(module, adapter.family, layer_at=adapter.layer_at, outer=dict(adapter.outer))
    try:
        block = adapter.read(module)
        found.identities = adapter.identities(module)
        found.attributes = {
            name: v for name, v in adapter.attributes.items() if name in vars(module)
        }
        slots = [adapter.layer_at, *found.identities] if adapter.layer_at else [""]
        found.leaves = [leaf for slot in slots for leaf in linears_at(module, slot)]
        if problem := unreadable(block.tensors()):
            return found.refuse(problem, "unreadable")
        if adapter.forward is not None:
            found.call = lambda x: adapter.forward(module, x)  # type: ignore[misc]
            x, wanted = run_on_probe(module, found.call, block, seed=0)
            if (error := relative_error(block(x), wanted)) > tolerance(wanted.dtype):
                return found.refuse(f"the adapter describes a function that is off by {error:.1%}")
    except (NotFeedForwardError, BFMoEError, AttributeError) as error:
        return found.refuse(str(error))
    found.block, found.status = block, "ready"
    return found


def linears_at(module: nn.Module, slot: str) -> list[nn.Module]:
    """The matrices in a slot of `module`; none when the slot holds a function."""
    owner, _, name = slot.rpartition(".")
    inside = module if not slot else module.get_submodule(owner)._modules.get(name)
    return [] if inside is None else [m for m in inside.modules() if is_linear(m)]


def by_structure(module: nn.Module, leaves: list[nn.Module]) -> Candidate:
    """Takes a module with two or three matrices as a whole and proves its formula by a probe."""
    found = Candidate(module, "structure", leaves=leaves)
    try:
        found.block, found.status = probe_block(module), "ready"
        found.call = module.forward
    except UnreadableError as error:
        found.refuse(str(error), "unreadable")
    except NotFeedForwardError as error:
        found.refuse(str(error))
    return found


def by_runs(module: nn.Module) -> Iterator[Candidate]:
    """Runs of (matrix, activation, dropout, matrix) among the children of a plain `Sequential`.

    A `Sequential` calls its children in order, so nothing needs to be guessed. The first matrix
    becomes the new layer, the others the identity; what follows, a last dropout too, stays.
    """
    if type(module).forward is not nn.Sequential.forward:
        return
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    linear = [i for i, (_, child) in enumerate(children) if is_linear(child)]
    runs = [
        (i, j) for i, j in zip(linear, linear[1:], strict=False) if _between(children[i + 1 : j])
    ]
    for i, j in runs:
        found = _read_run(module, children[i : j + 1])
        if found.status == "ready" and any((a, b) != (i, j) and {a, b} & {i, j} for a, b in runs):
            found.refuse("it is part of a longer chain of matrices", "by-name")
        yield found


def _between(children: list[tuple[str, nn.Module]]) -> bool:
    others = [c for _, c in children if not isinstance(c, nn.Dropout | nn.Identity)]
    return len(others) <= 1 and all(sum(1 for _ in c.parameters()) <= 1 for c in others)


def _read_run(module: nn.Module, run: list[tuple[str, nn.Module]]) -> Candidate:
    (first, up), *middle, (last, down) = run
    found = Candidate(module, "sequential", layer_at=first, leaves=[up, down])
    found.identities = [name for name, _ in middle] + [last]
    (w_up, b_up), (w_down, b_down) = linear_weight(up), linear_weight(down)
    if w_up.shape[0] != w_down.shape[1]:
        return found.refuse(
            f"its shapes do not chain: {list(w_up.shape)} then {list(w_down.shape)}"
        )
    kept = 1.0
    acts: list[tuple[str, nn.Module]] = []
    for name, child in middle:
        if isinstance(child, nn.Dropout):
            if not acts and child.p > 0:
                return found.refuse("a dropout stands before its activation")
            kept *= 1 - child.p
        elif not isinstance(child, nn.Identity):
            acts.append((name, child))
    activation: Activation = "identity"
    at = None
    if acts:
        weight = torch.zeros((), device="cpu") if w_up.is_meta else w_up
        known = classify_activation(acts[0][1], weight)
        if known is None:
            return found.refuse(f"{type(acts[0][1]).__name__} is not an elementwise activation")
        activation, at = known, None if isinstance(known, str) else acts[0][0]
    found.block = FeedForward(
        up=w_up,
        down=w_down,
        up_bias=b_up,
        down_bias=b_down,
        activation=activation,
        activation_at=at,
        dropout=round(1 - kept, 10),
    )
    if problem := unreadable(found.block.tensors()):
        return found.refuse(problem, "unreadable")
    modules = [child for _, child in run]
    found.call = lambda x: _in_order(modules, x)
    found.status = "ready"
    return found


def _in_order(modules: list[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def refuse_bare(module: nn.Module) -> Candidate | None:
    """A refused candidate for a module that looks like a block but holds no matrices as modules."""
    shapes = {
        n: tuple(p.shape) for n, p in module._parameters.items() if p is not None and p.dim() >= 2
    }
    if 2 <= len(shapes) <= 3 and len({tuple(sorted(s[-2:])) for s in shapes.values()}) == 1:
        held = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        return Candidate(module, "structure").refuse(
            f"it holds bare weights ({held}) and no linear modules; use register_adapter"
        )
    convs = [c for c in module.children() if isinstance(c, nn.Conv1d | nn.Conv2d)]
    if len(convs) == 2 and all(set(c.kernel_size) == {1} and c.groups == 1 for c in convs):
        return Candidate(module, "structure").refuse(
            "its 1x1 convolutions work on channels-first tensors, not on the last axis"
        )
    return None
