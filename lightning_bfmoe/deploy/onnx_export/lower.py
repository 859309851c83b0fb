"""The opaque nodes of a packed layer as ONNX nodes that the stock onnxruntime wheel runs.

Rotation: per row the angles are gathered, so that the factors of all experts never exist. Of the
forms measured (`docs/decisions.md`) one product and one sum a stage is the fastest for few rows:

    y[o, j] = sum_i M[o, i, j] x[i, j],   M = ((cos, -sin), (sin, cos)),   j over d / 2 pairs

Product, 2 bit: `com.microsoft::MatMulNBits`; its kernel rounds each 128 numbers of a row to 8 bit.
Product, int8: rows rounded to 8 bit as in training (`functional.round_rows`), `MatMulInteger` with
trits that are unpacked when the session starts. The file holds the 2-bit codes in either case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_bfmoe.deploy.onnx_export.build import Builder
from lightning_bfmoe.deploy.onnx_export.ops import BLOCK, DOMAIN, deck_order

if TYPE_CHECKING:
    import onnx_ir as ir

Value = Any
"""An `onnx_ir.Value`; the package is imported when a model is exported, not before."""
MICROSOFT = "com.microsoft"
PRODUCTS = ("2bit", "int8", "both")
FEW_ROWS = 8
"""Up to so many rows (tokens x top-k) the 2-bit product is taken with `both`."""


def lower(model: ir.Model, products: str, rotations: bool = True) -> None:
    """Replaces every opaque node, in place.

    Args:
        model: From `torch.onnx.export`, with nodes `bfmoe::RotateRows` and `bfmoe::TernaryProduct`.
        products: `2bit`, `int8`, or `both`: chosen by the number of rows when the graph runs.
        rotations: False leaves the rotations to the custom op of `csrc/ort_ops.cpp`.
    """
    import onnx_ir.convenience as convenience

    graph = model.graph
    for node in list(graph):
        if node.domain != DOMAIN or (node.op_type == "RotateRows" and not rotations):
            continue
        build = Builder(graph, node.name or node.op_type)
        x, *others = node.inputs
        if node.op_type == "RotateRows":
            d, inverse = (node.attributes[name].as_int() for name in ("d", "inverse"))
            y = _rotate(build, x, *others, d=d, inverse=bool(inverse))
        else:
            y = _product(build, products, x, *others, d_in=node.attributes["d_in"].as_int())
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
        convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [y])
    if rotations:
        model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[MICROSOFT] = 1
    for name in [n for n, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]  # the empty scales beside float angles


def _rotate(
    b: Builder, x: Any, ids: Any, angles: Any, scales: Any, *, d: int, inverse: bool
) -> Value:
    stages, half = angles.shape[1], -(-d // 2)
    index, sign, deck = deck_order(d, stages)
    ordered = bool((np.diff(deck) == 1).all())
    cos, sin = _cos_sin(b, ids, _in_deck_order(b, angles, index), scales, sign)
    matrix = b("Concat", cos, b("Neg", sin), sin, cos, axis=-1)  # (rows, stages, 4 * half)
    matrix = b.reshape(matrix, [0, stages, 2, 2, half])
    steps = b("Split", matrix, axis=1, num_outputs=stages, outputs=stages)
    steps = [steps] if stages == 1 else steps
    if d % 2:
        x = b("Pad", x, b.const([0, 0, 0, 1]))
    if inverse:
        if not ordered:
            x = b("Gather", x, b.const(deck), axis=1)
        for step in reversed(steps):
            x = b("Mul", b.reshape(x, [0, 1, 2, 1, half]), step)  # (rows, 1, o, i, half)
            x = b("ReduceSum", x, b.const([2]), keepdims=0)
            x = b("Transpose", x, perm=[0, 1, 3, 2])
        x = b.reshape(x, [0, 2 * half])
    else:
        for step in steps:
            x = b("Transpose", b.reshape(x, [0, 1, half, 1, 2]), perm=[0, 1, 3, 4, 2])
            x = b("ReduceSum", b("Mul", x, step), b.const([3]), keepdims=0)  # (rows, 1, o, half)
        x = b.reshape(x, [0, 2 * half])
        if not ordered:
            x = b("Gather", x, b.const(np.argsort(deck)), axis=1)
    if d % 2:
        x = b("Slice", x, b.const([0]), b.const([d]), b.const([1]))
    return x


def _in_deck_order(b: Builder, angles: Any, index: np.ndarray) -> Value:
    """All experts' numbers permuted, (experts, stages * half): made when the session starts."""
    width = angles.shape[2]
    if angles.dtype == b.ir.DataType.UINT8:  # two codes a byte
        low = b("BitwiseAnd", angles, b.const(15, np.uint8))
        high = b("BitShift", angles, b.const(4, np.uint8), direction="RIGHT")
        last = b.const([-1])
        digits = b("Concat", b("Unsqueeze", low, last), b("Unsqueeze", high, last), axis=-1)
        angles = b("Gather", b.const(np.arange(16) - 8, np.int8), b("Cast", digits, to=_INT32))
        width = 2 * width
    flat = index + width * np.arange(len(index))[:, None]
    return b("Gather", b.reshape(angles, [0, -1]), b.const(flat.reshape(-1), np.int32), axis=1)


def _cos_sin(b: Builder, ids: Any, table: Any, scales: Any, sign: np.ndarray) -> tuple[Any, Any]:
    """Of each row's angles in float32, (rows, stages, half)."""
    rows = b.reshape(b("Gather", table, ids, axis=0), [0, *sign.shape])
    rows = b("Cast", rows, to=_FLOAT)
    if scales.shape[0] > 0:
        scale = b("Cast", b("Gather", scales, ids, axis=0), to=_FLOAT)
        rows = b("Mul", rows, b("Unsqueeze", scale, b.const([-1])))
    if not (sign == 1).all():
        rows = b("Mul", rows, b.const(sign, np.float32))
    return b("Cos", rows), b("Sin", rows)


def _product(b: Builder, form: str, x: Any, codes: Any, alpha: Any, *, d_in: int) -> Value:
    if form == "2bit":
        return _two_bit(b, x, codes, alpha, d_in)
    table = np.array([[byte >> s & 3 for s in (0, 2, 4, 6)] for byte in range(256)]) - 2
    trits = b("Gather", b.const(table, np.int8), b("Cast", codes, to=_INT32), axis=0)
    trits = b.reshape(trits, [codes.shape[0], -1])  # (d_out, columns)
    if d_in % BLOCK:
        trits = b("Slice", trits, b.const([0]), b.const([d_in]), b.const([1]))
    trits = b("Transpose", trits, perm=[1, 0])  # of constants: made when the session starts
    scale = b.reshape(alpha, [-1])
    if form == "int8":
        return _eight_bit(b, x, trits, scale)
    few, many = (Builder(b.graph, f"{b.prefix}/{name}") for name in ("few", "many"))
    branches: dict[str, Any] = {
        "then_branch": _subgraph(few, _two_bit(few, x, codes, alpha, d_in)),
        "else_branch": _subgraph(many, _eight_bit(many, x, trits, scale)),
    }
    rows = b("Shape", x, start=0, end=1)
    return b("If", b("Squeeze", b("LessOrEqual", rows, b.const([FEW_ROWS]))), **branches)


def _two_bit(b: Builder, x: Any, codes: Any, alpha: Any, d_in: int) -> Value:
    d_out, blocks = codes.shape[:2]
    # a constant, too; the file holds one scale a row
    scales = b("Expand", alpha, b.const([d_out, blocks]))
    return b(
        "MatMulNBits", x, codes, scales, domain=MICROSOFT, K=d_in, N=d_out, bits=2,
        block_size=BLOCK, accuracy_level=4,  # without it a scalar path runs, 500 times slower
    )  # fmt: skip


def _eight_bit(b: Builder, x: Any, trits: Any, alpha: Any) -> Value:
    peak = b("ReduceMax", b("Abs", x), b.const([-1]))  # (rows, 1)
    step = b("Div", b("Max", peak, b.const(1e-30, np.float32)), b.const(127, np.float32))
    codes = b("Add", b("Round", b("Div", x, step)), b.const(128, np.float32))
    codes = b("Cast", codes, to=_UINT8)
    sums = b("MatMulInteger", codes, trits, b.const(128, np.uint8))
    return b("Mul", b("Mul", b("Cast", sums, to=_FLOAT), step), alpha)


def _subgraph(b: Builder, output: ir.Value) -> Value:
    output.type = b.ir.TensorType(b.ir.DataType.FLOAT)
    return b.ir.Graph([], [output], nodes=b.nodes, name=b.prefix)


_FLOAT, _UINT8, _INT32 = 1, 2, 6
"""Numbers of `onnx.TensorProto`."""
