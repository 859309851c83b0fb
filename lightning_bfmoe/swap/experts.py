"""Recognising the experts of a mixture-of-experts model, whose own router is kept.

Two forms exist: one module with stacked 3-D weights that is called with the router's choice
(Mixtral and its kin in current `transformers`), and a `ModuleList` of feed-forward modules that the
model's own loop calls one by one (older code). Both are proved by a probe, like single blocks.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_bfmoe.layers.activation import ACTIVATIONS
from lightning_bfmoe.swap.activations import Activation, own_activations
from lightning_bfmoe.swap.blocks import (
    FeedForward,
    NotFeedForwardError,
    UnreadableError,
    relative_error,
    tolerance,
)
from lightning_bfmoe.swap.candidate import Candidate
from lightning_bfmoe.swap.linears import is_linear, unreadable
from lightning_bfmoe.swap.probe import (
    Matrices,
    probe_block,
    probe_input,
    read_shapes,
)
from lightning_bfmoe.swap.quiet import quiet

_TOKENS = 12


def by_stacked_experts(module: nn.Module) -> Candidate | None:
    """Recognises one module that holds all experts as ``[experts, out, in]`` weights.

    Its forward must take (tokens, chosen experts, their weights), as in `transformers`.
    """
    stacks = {n: p for n, p in module._parameters.items() if p is not None and p.dim() == 3}
    counts = {p.shape[0] for p in stacks.values()}
    if (
        len(stacks) not in (2, 3)
        or len(counts) != 1
        or 1 in counts
        or any(map(is_linear, module.modules()))
    ):
        return None
    found = Candidate(module, "experts", leaves=[module])
    if problem := unreadable(dict(stacks)):
        return found.refuse(problem, "unreadable")
    try:
        found.experts = _read_stacks(module, stacks)
    except NotFeedForwardError as error:
        return found.refuse(str(error))
    found.block, found.status = mean_expert(found.experts), "ready"
    return found


def _matrices(
    module: nn.Module, stacks: dict[str, nn.Parameter], expert: int, flip: bool
) -> Matrices:
    out: Matrices = {}
    for name, stack in stacks.items():
        weight = stack.detach()[expert]
        biases = [
            p
            for n, p in module._parameters.items()
            if p is not None and p.dim() == 2 and n.startswith(name)
        ]
        out[name] = (weight.t() if flip else weight, biases[0].detach()[expert] if biases else None)
    return out


def _read_stacks(module: nn.Module, stacks: dict[str, nn.Parameter]) -> list[FeedForward]:
    own = [
        (act, None if isinstance(act, str) else at) for at, act in own_activations(module).items()
    ]
    known: list[tuple[Activation, str | None]] = [(name, None) for name in ACTIVATIONS]
    count = next(iter(stacks.values())).shape[0]
    reason = "its weights do not chain: " + ", ".join(
        f"{n} {list(p.shape)}" for n, p in stacks.items()
    )
    for flip in (False, True):
        for index, first in enumerate(read_shapes(_matrices(module, stacks, 0, flip))):
            readings = [
                list(read_shapes(_matrices(module, stacks, e, flip)))[index] for e in range(count)
            ]
            x = probe_input(first, (_TOKENS,), seed=0)
            chosen, weights = routing_on_probe(count, x)
            with quiet(module):
                try:
                    wanted = module.forward(x.clone(), chosen, weights)
                except Exception as error:  # a foreign forward may raise anything
                    reason = f"calling it with (tokens, chosen experts, weights) raises {error!r}"[
                        :200
                    ]
                    continue
                for act, at in [*own, *known]:
                    experts = [replace(r, activation=act, activation_at=at) for r in readings]
                    off = relative_error(mix_experts(experts, x, chosen, weights), wanted)
                    if off <= tolerance(x.dtype):
                        return experts
            reason = "no activation and gating that is known reproduces its output"
    raise NotFeedForwardError(reason)


def routing_on_probe(count: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two experts a token, all of them in turn, with weights that sum to 1."""
    token = torch.arange(x.shape[0], device=x.device)
    chosen = torch.stack([token % count, (token * 3 + 1) % count], dim=1)  # (tokens, 2)
    first = (0.2 + 0.05 * (token % 8)).to(x.dtype)
    return chosen, torch.stack([first, 1 - first], dim=1)


def mix_experts(experts: list[FeedForward], x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the original experts compute: the weighted sum of the chosen experts' outputs."""
    y = torch.zeros(x.shape[0], experts[0].d_out, dtype=x.dtype, device=x.device)
    for e, expert in enumerate(experts):
        rows, k = torch.where(chosen == e)
        y.index_add_(0, rows, (expert(x[rows]) * weights[rows, k, None]).to(x.dtype))
    return y


def mean_expert(experts: list[FeedForward]) -> FeedForward:
    """The mean of all experts, matrix by matrix: least squares when all angles are equal."""
    roles = experts[0].tensors()
    total = {role: torch.zeros_like(t, dtype=torch.float32) for role, t in roles.items()}
    for expert in experts:
        for role, t in expert.tensors().items():
            total[role] += t.to(total[role].dtype) / len(experts)
    return replace(experts[0], **total)  # type: ignore[arg-type]


def by_expert_list(parent: nn.Module, name: str, experts: nn.ModuleList) -> Candidate | None:
    """Recognises a list of equal feed-forward modules next to a router with one row per expert.

    Without such a router the list is a stack of layers, whose blocks are swapped one by one.
    """
    if (
        len(experts) < 2
        or len({type(e) for e in experts}) != 1
        or len(set(map(id, experts))) != len(experts)
    ):
        return None
    widths = _router_widths(parent, name, len(experts))
    leaves = [[m for m in e.modules() if is_linear(m)] for e in experts]
    if (
        not widths
        or {len(own) for own in leaves} - {2, 3}
        or len({len(own) for own in leaves}) != 1
    ):
        return None
    found = Candidate(experts, "expert-list", leaves=[leaf for own in leaves for leaf in own])
    try:
        blocks = [probe_block(e) for e in experts]
    except UnreadableError as error:
        return found.refuse(str(error), "unreadable")
    except NotFeedForwardError:
        return None
    kinds = {(b.d_model, b.d_ff, b.d_out, b.gated, b.activation, b.output_dropout) for b in blocks}
    if len(kinds) != 1 or blocks[0].d_model not in widths:
        return None
    found.experts, found.block, found.status = blocks, mean_expert(blocks), "ready"
    if blocks[0].output_dropout:
        return found.refuse("its experts end in a dropout, which the shared layer cannot keep")
    return found


def _router_widths(parent: nn.Module, name: str, count: int) -> set[int]:
    """Input widths of the modules beside the experts that give one number per expert."""
    beside = [child for key, child in parent._modules.items() if key != name and child is not None]
    weights = [getattr(m, "weight", None) for child in beside for m in child.modules()]
    return {
        w.shape[1]
        for w in weights
        if isinstance(w, Tensor) and w.dim() == 2 and w.shape[0] == count
    }
