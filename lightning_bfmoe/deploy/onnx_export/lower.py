"""The opaque nodes of a packed layer as ONNX nodes that the stock onnxruntime wheel runs.

Rotation: see `rotate`.

Product, 2 bit: `com.microsoft::MatMulNBits`; its kernel rounds each 128 numbers of a row to 8 bit.
Product, int8: rows rounded to 8 bit as in training (`functional.round_rows`), `MatMulInteger` with
trits that are unpacked when the session starts. The file holds the 2-bit codes in either case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_bfmoe.deploy.onnx_export.build import Builder, choose
from lightning_bfmoe.deploy.onnx_export.ops import BLOCK, DOMAIN
from lightning_bfmoe.deploy.onnx_export.rotate import Value, rotate

if TYPE_CHECKING:
    import onnx_ir as ir

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
            y = rotate(build, x, *others, d=d, inverse=bool(inverse))
        else:
            y = _product(build, products, x, *others, d_in=node.attributes["d_in"].as_int())
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
        convenience.replace_nodes_and_values(graph, node, [node], build.nodes, node.outputs, [y])
    if rotations:
        model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[MICROSOFT] = 1
    for name in [n for n, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]  # the empty scales beside float angles


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
    forms = [
        (FEW_ROWS, lambda to: _two_bit(to, x, codes, alpha, d_in)),
        (0, lambda to: _eight_bit(to, x, trits, scale)),
    ]
    return choose(b, b("Squeeze", b("Shape", x, start=0, end=1)), forms)


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


_FLOAT, _UINT8, _INT32 = 1, 2, 6
"""Numbers of `onnx.TensorProto`."""
