"""A user's language model, traced and run again with a key-value cache.

The model is written for whole sequences: ids (batch, time) -> logits (batch, time, vocabulary). Its
traced graph is interpreted once more, with three rules. Attention sees the cached keys and values
before its own. A position counted from 0 (`arange(time)`, a table cut to `[:time]`) counts from the
length of the past. All else acts on each position alone, and `check_cache` proves that: the model
is run whole and in pieces, and must answer the same.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_bfmoe.deploy.onnx_export.attention import (
    ATTENTION,
    attend,
    before_repetition,
    is_causal_mask,
)
from lightning_bfmoe.errors import ExportError

_ARANGE = {
    torch.ops.aten.arange.default: 0,
    torch.ops.aten.arange.start: 1,
    torch.ops.aten.arange.start_step: 1,
}
_LINEAR = torch.ops.aten.linear.default
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
SUPPORTED = (
    "Supported are decoders whose attention is torch's scaled_dot_product_attention with a causal "
    "mask, and positions that are counted by arange or cut from a table: examples/gpt.py, "
    "Hugging Face's Llama family. export_onnx(cache=False) exports other models, without a cache."
)


class Logits(nn.Module):
    """The model as a function of token ids alone; a Hugging Face output is opened."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.options = (
            {"use_cache": False} if hasattr(model, "prepare_inputs_for_generation") else {}
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, time) int64 to (batch, time, vocabulary)."""
        out = self.model(input_ids, **self.options)
        out = getattr(out, "logits", out)
        if not isinstance(out, Tensor):
            raise ExportError(
                "an exported model returns its logits",
                got=type(out).__name__,
                fix="Export a module whose forward takes ids and returns one tensor.",
            )
        return out


def trace(model: nn.Module, ids: Tensor) -> fx.GraphModule:
    """The graph of `Logits(model)`, free in batch and time.

    Raises:
        ExportError: torch.export cannot trace the model.
    """
    free = torch.export.Dim.DYNAMIC
    try:
        with torch.no_grad():
            program = torch.export.export(
                Logits(model), (ids,), dynamic_shapes=({0: free, 1: free},), strict=False
            )
    except ExportError:
        raise
    except Exception as error:  # whatever a stranger's forward does
        raise ExportError(
            "a model is exported by torch.export, from ids (batch, time) to logits",
            got=f"{type(error).__name__}: {str(error).strip()[:400]}",
            fix="Its forward must take token ids alone and not branch on values. " + SUPPORTED,
        ) from error
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    for node in reversed(module.graph.nodes):  # they hold for the traced lengths only
        if node.op in ("call_module", "call_function") and any(
            word in str(node.target) for word in ("_guards_fn", "_assert", "sym_constrain")
        ):
            module.graph.erase_node(node)
    module.recompile()
    return module


class CachedModel(nn.Module):
    """ids (batch, time) and the cache to logits and the longer cache.

    Args:
        graph: From `trace`.
        ids: An example, at least two sequences of several tokens.

    Raises:
        ExportError: There is no attention, or it is not causal.
    """

    def __init__(self, graph: fx.GraphModule, ids: Tensor) -> None:
        super().__init__()
        self.graph_module = graph
        recorder = _Recorder(graph)
        with torch.no_grad():
            recorder.run(ids)
        self.shapes = [site[1] for site in recorder.sites]
        """(kv heads, width of a key, width of a value) of each attention."""
        if not self.shapes:
            raise ExportError(
                "a cache needs attention", got="no scaled_dot_product_attention", fix=SUPPORTED
            )
        for name, _, reason in recorder.sites:
            if reason:
                raise ExportError(
                    "cached attention is causal", got=f"{name}: {reason}", fix=SUPPORTED
                )
        _drop_masks(graph)  # the cached attention makes its own
        self.limits: set[int] = set()
        """Lengths of the position tables that were met."""

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """`past`: key and value of each attention, (batch, kv heads, past, width).

        Returns logits, then the present keys and values in the same order.
        """
        walk = _Cached(self.graph_module, past)
        logits = walk.run(input_ids)
        self.limits |= walk.limits
        return (logits, *walk.present)

    def empty_past(self, batch: int, length: int = 0) -> list[Tensor]:
        """A cache of zeros."""
        return [
            torch.zeros(batch, heads, length, width)
            for heads, *widths in self.shapes
            for width in widths
        ]


def check_cache(
    cached: CachedModel, model: nn.Module, ids: Tensor, tolerance: float = 1e-3
) -> float:
    """Runs the model whole and, with the cache, in pieces; the relative difference of the logits.

    Raises:
        ExportError: They differ: the model does something with its sequence that no rule covers.
    """
    with torch.no_grad():
        whole = Logits(model)(ids)
        past, pieces, at = cached.empty_past(len(ids)), [], 0
        for size in (1, ids.shape[1] - 4, 1, 2):
            logits, *past = cached(ids[:, at : at + size], *past)
            pieces.append(logits)
            at += size
    error = float((torch.cat(pieces, 1) - whole).norm() / whole.norm().clamp(min=1e-30))
    if not error <= tolerance:
        raise ExportError(
            "a model with a cache answers as without one",
            got=f"logits that differ by {error:.2g} (relative)",
            fix=SUPPORTED,
        )
    return error


class _Walk(fx.Interpreter):
    """Runs a traced graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.ids = placeholders[0]
        self.length = [
            node
            for node in graph.graph.nodes
            if node.target is torch.ops.aten.sym_size.int and node.args == (self.ids, 1)
        ]

    def run_node(self, n: fx.Node) -> Any:
        return self.attention(n) if n.target is ATTENTION else super().run_node(n)

    def attention(self, n: fx.Node) -> Tensor:
        raise NotImplementedError


class _Recorder(_Walk):
    """Notes each attention of a run: its name, its sizes, and why it cannot be cached, if so."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.sites: list[tuple[str, tuple[int, int, int], str]] = []

    def attention(self, n: fx.Node) -> Tensor:
        named = _arguments(n)
        k, v = (self.env[before_repetition(named[name])] for name in ("key", "value"))
        mask, reason = named.get("attn_mask"), ""
        if mask is not None:
            reason = "" if is_causal_mask(self.env[mask]) else "its mask is not the causal one"
        elif not named.get("is_causal"):
            reason = "it looks ahead"
        if named.get("dropout_p"):
            reason = "it has dropout; call model.eval()"
        if k.dim() != 4 or k.shape[2] != self.env[self.ids].shape[1]:
            reason = f"keys of shape {tuple(k.shape)}, not (batch, heads, time, width)"
        self.sites.append((n.name, (k.shape[1], k.shape[-1], v.shape[-1]), reason))
        y: Tensor = fx.Interpreter.run_node(self, n)
        return y


class _Cached(_Walk):
    """The second run: with a past."""

    def __init__(self, graph: fx.GraphModule, past: tuple[Tensor, ...]) -> None:
        super().__init__(graph)
        self.past, self.present = list(past), list[Tensor]()
        self.start: Any = past[0].shape[2]
        self.limits: set[int] = set()
        self.constant: set[fx.Node] = set()
        """Nodes that depend on no token."""

    def run_node(self, n: fx.Node) -> Any:
        inputs = [node for node in n.all_input_nodes if node not in self.length]
        if n.op == "get_attr" or (
            n.op == "call_function" and inputs and all(node in self.constant for node in inputs)
        ):
            self.constant.add(n)
        args: list[Any] = list(n.args)
        if n.target is _LINEAR and len(args[1].users) > 1:
            # as a matrix product it becomes Gemm, which reads the tied embedding as it is stored
            x, weight, *bias = (self.env[node] for node in args if node is not None)
            y = _LINEAR(x.reshape(-1, x.shape[-1]), weight, *bias)
            return y.reshape(*x.shape[:-1], y.shape[-1])
        if n.target in _ARANGE and len(n.args) > (at := _ARANGE[n.target]):
            whole = n.args[at] in self.length and (at == 0 or n.args[0] == 0)
            return super().run_node(n) + self.start if whole else super().run_node(n)
        if n.target is torch.ops.aten.slice.Tensor and len(n.args) >= 4:
            source, axis, start, end = args[:4]
            if source in self.constant and start in (0, None) and end in self.length:
                stop = self.start + self.env[end]
                self.limits.add(self.env[source].shape[axis])
                return torch.ops.aten.slice.Tensor(self.env[source], axis, self.start, stop)
        return super().run_node(n)

    def attention(self, n: fx.Node) -> Tensor:
        named = _arguments(n)
        fresh = [self.env[before_repetition(named[name])] for name in ("key", "value")]
        at = len(self.present)
        k, v = (torch.cat((self.past[at + i], fresh[i]), dim=2) for i in (0, 1))
        self.present += [k, v]
        return attend(self.env[named["query"]], k, v, self.start, named.get("scale"))


def _arguments(n: fx.Node) -> Mapping[str, Any]:
    """An attention's arguments by name, as nodes and values."""
    return {**dict(zip(_ATTENTION_ARGUMENTS, n.args, strict=False)), **n.kwargs}


def _drop_masks(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.target is ATTENTION:
            named = {**_arguments(node), "attn_mask": None, "is_causal": True}
            node.args, node.kwargs = (), named
    module.graph.eliminate_dead_code()
    module.recompile()
