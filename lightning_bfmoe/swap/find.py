"""Finding the feed-forward blocks of any model: one walk, children before parents."""

from collections.abc import Iterator

import torch
from torch import nn

from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE
from lightning_bfmoe.layers.surgery import Scalar, replacement
from lightning_bfmoe.swap.adapters import all_adapters
from lightning_bfmoe.swap.candidate import Candidate, join
from lightning_bfmoe.swap.experts import by_expert_list, by_stacked_experts
from lightning_bfmoe.swap.linears import is_linear, linear_weight
from lightning_bfmoe.swap.probe import read_shapes
from lightning_bfmoe.swap.quiet import keep_rng
from lightning_bfmoe.swap.recognise import by_adapter, by_runs, by_structure, refuse_bare


def find_feed_forward(model: nn.Module) -> list[Candidate]:
    """Lists every feed-forward block of a model, and every place that looks like one but is not.

    A block is recognised by what it computes. Modules with two or three matrices whose widths chain
    d_model -> d_ff -> d_out are called on random inputs, and a formula must reproduce their output.
    Nothing in the model changes, none of its hooks fires, no global random number is drawn.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 32))
        >>> [(c.path, c.family, c.block.activation) for c in find_feed_forward(model)]
        [('1.linear1', 'torch-transformer', 'relu')]

    Args:
        model: Any module. Layers that were swapped before are passed over.

    Returns:
        Candidates in the model's order; `status` and `reason` say what can be swapped.
    """
    with keep_rng():
        return _Search(model).run()


class _Search:
    """The walk: which recogniser is asked where, and what its answer means for the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths: dict[int, list[str]] = {}
        self.slots: dict[
            int, dict[tuple[int, str], str]
        ] = {}  # of a module: (its owner, name) -> path
        self.users: dict[int, set[int]] = {}  # of a parameter: the modules that hold it
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), []).append(path)
            for name, child in module._modules.items():
                places = self.slots.setdefault(id(child), {})
                places.setdefault((id(module), name), join(path, name))
            for p in module.parameters(recurse=False):
                self.users.setdefault(id(p), set()).add(id(module))
        self.found: list[Candidate] = []
        self.claimed: set[int] = set()  # matrices that belong to a block already
        self.settled: dict[int, bool] = {}

    def run(self) -> list[Candidate]:
        self.visit(self.model)
        order = {id(module): i for i, module in enumerate(self.model.modules())}
        return sorted(self.found, key=lambda c: order[id(c.module)])

    def visit(self, module: nn.Module) -> bool:
        """Searches a module and what is below it; True when a block was recognised there."""
        if id(module) not in self.settled:
            self.settled[id(module)] = False  # so that a module that contains itself ends
            ours = isinstance(module, ButterflyMoE | ButterflyExperts)
            scripted = isinstance(module, torch.jit.ScriptModule)
            self.settled[id(module)] = ours or (not scripted and self.search(module))
        return self.settled[id(module)]

    def search(self, module: nn.Module) -> bool:
        special = [c for c in map(self.add, self.special(module)) if c.status != "rejected"]
        if any(c.module is module and not c.layer_at for c in special):
            return True
        told = len(self.found)
        inside = [self.visit(child) for child in module._modules.values() if child is not None]
        leaves = [m for m in module.modules() if is_linear(m) and id(m) not in self.claimed]
        whole = None
        if not any(inside) and not special and len(leaves) in (2, 3) and _can_be_called(module):
            whole = by_structure(module, leaves)
            if whole.status != "rejected" and module is not self.model:
                del self.found[told:]  # what was refused inside is explained now
                return self.add(whole).status != "rejected"
        runs = [c for c in by_runs(module) if not self.claimed & set(map(id, c.leaves))]
        runs = [self.add(c) for c in runs]  # those of one chain may overlap
        recognised = any(inside) or bool(special) or any(c.status != "rejected" for c in runs)
        if not recognised and len(self.found) == told:
            refused = whole if whole is not None and _is_telling(whole) else None
            refused = refuse_bare(module) if not leaves else refused
            if refused is not None:
                self.add(refused)
        return recognised

    def special(self, module: nn.Module) -> Iterator[Candidate]:
        """Adapters and expert blocks, which are asked before the parts of a module are."""
        adapter = next((a for a in all_adapters() if a.match(module)), None)
        if adapter is not None:
            yield by_adapter(module, adapter)
        elif (stacked := by_stacked_experts(module)) is not None:
            yield stacked
        for name, child in module._modules.items():
            if isinstance(child, nn.ModuleList) and id(child) not in self.settled:
                listed = by_expert_list(module, name, child)
                if listed is not None:
                    self.settled[id(child)] = listed.status != "rejected"
                    yield listed

    def add(self, c: Candidate) -> Candidate:
        """Gives a candidate its place in the model, and the last word on whether it is ready."""
        c.owner = self.paths[id(c.module)][0]
        self.found.append(c)
        if c.status == "rejected":
            return c
        if not c.path:
            return c.refuse("the model itself is the block; put it into a parent module")
        if other := self.shared_with(c):
            return c.refuse(f"its weights are shared with {other}, a swap would untie them")
        if c.status == "ready" and c.block is not None and (why := _only_by_name(c)):
            c.refuse(why, "by-name")
        self.claimed |= set(map(id, c.leaves))
        places = [] if c.layer_at else list(self.slots[id(c.module)].values())
        c.placement = replacement(
            c.path,
            aliases=[path for path in places if path != c.path],
            identities=[join(c.owner, name) for name in c.identities],
            attributes={join(c.owner, k): v for k, v in c.attributes.items()} | self.around(c),
        )
        return c

    def shared_with(self, c: Candidate) -> str:
        """Where a block's matrices are used by something that is not part of the block."""
        inside = {id(m) for m in c.module.modules()}
        own = set(map(id, c.leaves))
        for leaf in c.leaves:
            slots = {} if leaf is c.module else self.slots[id(leaf)]
            for (owner, _), path in slots.items():
                if owner not in inside or (c.layer_at and len(slots) > 1):
                    return repr(path)
            for p in leaf.parameters(recurse=False):
                if others := self.users.get(id(p), set()) - own:
                    return repr(self.paths[others.pop()][0])
        return ""

    def around(self, c: Candidate) -> dict[str, Scalar]:
        """Settings of the modules in which a block stands, at every place where it is used."""
        found: dict[str, Scalar] = {}
        for path in self.paths[id(c.module)] if c.outer else []:
            parts = path.split(".")
            for n in range(len(parts)):
                owner = ".".join(parts[:n])
                attributes = vars(self.model.get_submodule(owner))
                found |= {join(owner, k): v for k, v in c.outer.items() if k in attributes}
        return found


def _can_be_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not is_linear(module)


def _is_telling(c: Candidate) -> bool:
    """Whether a refused module has the widths of a feed-forward block, unlike most attention."""
    matrices = {str(i): linear_weight(leaf) for i, leaf in enumerate(c.leaves)}
    return any(b.d_out == b.d_model != b.d_ff for b in read_shapes(matrices))


def _only_by_name(c: Candidate) -> str:
    block = c.block
    if block.d_out != block.d_model:  # type: ignore[union-attr]
        return f"its output is {block.d_out} wide, its input {block.d_model}"  # type: ignore[union-attr]
    if not block.gated and block.d_ff < block.d_model and not c.experts:  # type: ignore[union-attr]
        return f"it is a bottleneck ({c.shape})"
    if block.activation == "identity" and not block.gated:  # type: ignore[union-attr]
        return "no activation stands between its matrices"
    return ""
