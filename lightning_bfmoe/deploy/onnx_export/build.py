"""A small writer of ONNX nodes: constants kept once a graph, new nodes collected in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


class Builder:
    """Collects the nodes that will replace one opaque node.

    Args:
        graph: The main graph, which holds the constants.
        prefix: Start of the new values' names.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        import onnx_ir

        self.ir, self.graph, self.prefix = onnx_ir, graph, prefix
        self.nodes: list[ir.Node] = []

    def __call__(
        self,
        op: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """One node; returns its value, or a list when it has several outputs."""
        node = self.ir.node(op, list(inputs), attributes, domain=domain, num_outputs=outputs)
        for number, value in enumerate(node.outputs):
            value.name = f"{self.prefix}/{len(self.nodes)}_{op}" + (f".{number}" if number else "")
        node.name = f"{self.prefix}/{len(self.nodes)}_{op}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def const(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant; equal ones are one."""
        array = np.asarray(values, dtype=dtype)
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{_digest(array)}"
        if name not in self.graph.initializers:
            tensor = self.ir.tensor(array, name=name)
            value = self.ir.Value(
                name=name,
                type=self.ir.TensorType(tensor.dtype),
                shape=self.ir.Shape(array.shape),
                const_value=tensor,
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """0 keeps the size of an axis, -1 fills."""
        value: ir.Value = self("Reshape", x, self.const(list(shape)))
        return value


def choose(
    b: Builder, number: Any, forms: Sequence[tuple[int, Callable[[Builder], Any]]]
) -> ir.Value:
    """The first form whose bound a number does not exceed, the last one else; when the graph runs.

    Args:
        b: Takes the nodes.
        number: A scalar of the graph.
        forms: Bound, and what adds a form's nodes to a builder and returns its value, float32.
    """
    (bound, first), *others = forms
    if not others:
        value: ir.Value = first(b)
        return value
    few, many = (Builder(b.graph, f"{b.prefix}/{name}") for name in (f"to{bound}", "more"))
    branches: dict[str, Any] = {
        "then_branch": _subgraph(few, first(few)),
        "else_branch": _subgraph(many, choose(many, number, others)),
    }
    chosen: ir.Value = b("If", b("LessOrEqual", number, b.const(bound)), **branches)
    return chosen


def _subgraph(b: Builder, output: ir.Value) -> ir.Graph:
    output.type = b.ir.TensorType(b.ir.DataType.FLOAT)
    graph: ir.Graph = b.ir.Graph([], [output], nodes=b.nodes, name=b.prefix)
    return graph


def _digest(array: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(array.tobytes()).hexdigest()[:12]
