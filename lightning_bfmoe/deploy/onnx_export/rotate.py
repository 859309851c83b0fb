"""Rotations from standard ONNX operators, in two forms; the number of rows chooses at run time.

Stage s turns the pairs (x[a], x[a + 2^s]). Every stage is the same few operations on two contiguous
halves (rows, 2, half); what differs is how the halves are laid out:

* a power-of-two width stays in natural order, where the halves are a transposed view and the angles
  are read as they are stored: nothing is permuted, so no copy of a table ever exists;
* other widths go by *deck order* (`ops.deck_order`), for which each row's angles are permuted.

Rows take the cosines of their own angles stage by stage, which keeps them in the cache and the
memory small. From `ROWS_AN_EXPERT` rows for each expert on, in layers of few experts, rows are laid
out by expert, stages are multiplied into blocks of up to 16 coordinates for the experts in use, and
the blocks multiply all rows of their expert: one factor at a time, made from the gathered angles
and thrown away. Factors of all experts are never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from lightning_bfmoe.deploy.onnx_export.build import Builder, choose
from lightning_bfmoe.deploy.onnx_export.ops import deck_order

Value = Any
"""An `onnx_ir.Value`; the package is imported when a model is exported, not before."""
ROWS_AN_EXPERT = 8
"""From so many rows for each of all experts on, blocks pay."""
MOST_ROWS = 256
"""Blocks that pay only beyond it are left out of the graph: nodes cost memory, too."""
BLOCK_BITS = 4
"""Most stages that are multiplied into one block."""
_FLOAT, _INT64 = 1, 7
"""Numbers of `onnx.TensorProto`."""


def rotate(
    b: Builder, x: Value, ids: Value, angles: Value, scales: Value, *, d: int, inverse: bool
) -> Value:
    """Rows (rows, d), each by its expert's B, or B^T.

    Args:
        b: Takes the nodes.
        x: Rows.
        ids: Expert of each.
        angles: (experts, stages, pairs), a constant as `ops.rotate_rows` takes it.
        scales: (experts, stages), or empty.
        d: Width.
        inverse: Apply B^T.
    """
    network = Network(d, angles.shape[1], angles, scales, inverse)
    few = ROWS_AN_EXPERT * angles.shape[0] - 1
    if not network.block_bits or few >= MOST_ROWS:
        return _by_rows(b, network, x, ids)
    return choose(
        b,
        b("Squeeze", b("Shape", x, start=0, end=1)),
        [
            (few, lambda to: _by_rows(to, network, x, ids)),
            (0, lambda to: _by_experts(to, network, x, ids)),
        ],
    )


class Network:
    """What a rotation's nodes need to know of it."""

    def __init__(self, d: int, stages: int, angles: Value, scales: Value, inverse: bool) -> None:
        self.d, self.stages, self.inverse = d, stages, inverse
        self.table, self.scales = angles, scales
        self.half = -(-d // 2)
        self.index, self.sign, self.deck = deck_order(d, stages)
        self.sorted = bool((np.diff(self.deck) == 1).all())
        self.natural = d & (d - 1) == 0 and 1 << stages <= d
        twos = (d & -d).bit_length() - 1
        most = min(BLOCK_BITS, twos)
        count = -(-stages // most) if most > 1 else 0
        self.block_bits = [len(part) for part in np.array_split(range(stages), count or 1) if count]
        """Stages of each factor, for widths that blocks divide."""

    def angles_of(self, b: Builder, ids: Value, natural: bool) -> Value:
        """The angles of some experts, (ids, stages, half) float32: in the table's or deck order."""
        rows, pairs = b("Gather", self.table, ids, axis=0), self.d // 2
        if self.table.dtype == b.ir.DataType.UINT8:  # two codes a byte
            low = b("BitwiseAnd", rows, b.const(15, np.uint8))
            high = b("BitShift", rows, b.const(4, np.uint8), direction="RIGHT")
            last = b.const([-1])
            rows = b("Concat", b("Unsqueeze", low, last), b("Unsqueeze", high, last), axis=-1)
            rows = b.reshape(rows, [0, self.stages, 2 * self.table.shape[2]])
            if pairs % 2:
                rows = b("Slice", rows, b.const([0]), b.const([pairs]), b.const([2]))
            rows = b("Sub", b("Cast", rows, to=_FLOAT), b.const(8, np.float32))
        if not natural:
            flat = self.index + pairs * np.arange(self.stages)[:, None]
            rows = b.reshape(rows, [0, self.stages * pairs])
            rows = b("Gather", rows, b.const(flat, np.int32), axis=1)
        rows = b("Cast", rows, to=_FLOAT)
        if self.scales.shape[0] > 0:
            scale = b("Cast", b("Gather", self.scales, ids, axis=0), to=_FLOAT)
            rows = b("Mul", rows, b("Unsqueeze", scale, b.const([-1])))
        if not natural and not (self.sign == 1).all():
            rows = b("Mul", rows, b.const(self.sign, np.float32))
        return rows


Stage = Callable[[Value], Value]
"""From the two halves of each row to the turned ones, flat or not."""


def _by_rows(b: Builder, network: Network, x: Value, ids: Value) -> Value:
    """Stage after stage, every row with angles of its own."""
    half, angles = network.half, network.angles_of(b, ids, network.natural)
    rows = b("Shape", ids)

    def turn(x: Value, stage: int) -> Value:
        # Its number by way of x: else onnxruntime makes the cosines of all stages before the first.
        number = b("Sub", b("Shape", x, start=0, end=1), b("Sub", rows, b.const([stage])))
        angle = b("Gather", angles, number, axis=1)
        cos, sin = b("Cos", angle), b("Sin", angle)  # (rows, 1, half)
        left, right = _split(b, b.reshape(x, [0, 2, half]), 2)
        if network.inverse:
            left, right = right, left
        # forward (c l - s r, s l + c r); back (c l + s r, c r - s l), which is it with l, r swapped
        down = b("Sub", b("Mul", left, cos), b("Mul", right, sin))
        up = b("Add", b("Mul", left, sin), b("Mul", right, cos))
        return b("Concat", *((up, down) if network.inverse else (down, up)), axis=1)

    stages: list[Stage] = [partial(turn, stage=stage) for stage in range(network.stages)]
    return (_natural_order if network.natural else _deck_order)(b, network, x, stages)


def _natural_order(b: Builder, network: Network, x: Value, stages: list[Stage]) -> Value:
    """Halves of stride r are the view (d / 2r, 2, r) with the middle first."""
    d, last = network.d, 0
    for stage in reversed(range(network.stages)) if network.inverse else range(network.stages):
        r = 1 << stage
        if not last:
            x = b("Transpose", b.reshape(x, [0, d // (2 * r), 2, r]), perm=[0, 2, 1, 3])
        else:  # one halving's places for the other's
            low = min(r, last)
            x = b.reshape(x, [0, 2, d // (4 * low), 2, low])
            x = b("Transpose", x, perm=[0, 3, 2, 1, 4])
        x = stages[stage](x)
        last = r
    x = b("Transpose", b.reshape(x, [0, 2, d // (2 * last), last]), perm=[0, 2, 1, 3])
    return b.reshape(x, [0, d])


def _deck_order(b: Builder, network: Network, x: Value, stages: list[Stage]) -> Value:
    """Neighbours of a deck are turned, then it is un-shuffled: the left ones, then the right."""
    half, odd = network.half, network.d % 2
    if odd:
        x = b("Pad", x, b.const([0, 0, 0, 1]))
    if network.inverse and not network.sorted:
        x = b("Gather", x, b.const(network.deck), axis=1)
    for stage in reversed(stages) if network.inverse else stages:
        if network.inverse:
            x = b("Transpose", b.reshape(stage(x), [0, 2, half]), perm=[0, 2, 1])
        else:
            x = stage(b("Transpose", b.reshape(x, [0, half, 2]), perm=[0, 2, 1]))
    x = b.reshape(x, [0, 2 * half])
    if not network.inverse and not network.sorted:
        x = b("Gather", x, b.const(np.argsort(network.deck)), axis=1)
    if odd:
        x = b("Slice", x, b.const([0]), b.const([network.d]), b.const([1]))
    return x


def _by_experts(b: Builder, network: Network, x: Value, ids: Value) -> Value:
    """Blocks of the experts in use times all their rows, which are filled up to equal numbers."""
    d = network.d
    used, _, of_row, counts = b("Unique", ids, sorted=1, outputs=4)
    most = b("ReduceMax", counts, keepdims=1)  # (1,)
    experts, rows = b("Shape", used), b("Shape", ids)
    zero, one, axis = b.const(0), b.const(1), b.const([0])
    each = b("Range", zero, b("Squeeze", experts), one)
    mine = b("Cast", b("Equal", b("Unsqueeze", of_row, b.const([1])), each), to=_INT64)
    place = b("Mul", b("CumSum", mine, zero), mine)  # 1, 2, ... among the rows of an expert
    place = b("Sub", b("ReduceSum", place, b.const([1]), keepdims=0), one)
    slot = b("Add", b("Mul", of_row, most), place)  # (rows,)
    empty = b("Expand", axis, b("Mul", experts, most))
    number = b("Range", zero, b("Squeeze", rows), one)
    source = b("ScatterElements", empty, slot, number, axis=0)  # a row for every slot
    shape = b("Concat", experts, most, b.const([d]), axis=0)
    x = b("Reshape", b("Gather", x, source, axis=0), shape)
    x = b("Transpose", x, perm=[0, 2, 1])  # (experts, d, slots)
    if network.inverse and not network.sorted:
        x = b("Gather", x, b.const(network.deck), axis=1)
    angles = network.angles_of(b, used, natural=False)
    factors = list(_factors(b, network, _split(b, angles, network.stages)))
    for n, make in reversed(factors) if network.inverse else factors:
        blocks = make()  # (experts, out, in, d / n)
        if network.inverse:
            x = b("Transpose", b.reshape(x, [0, n, d // n, -1]), perm=[0, 2, 1, 3])
            x = b("MatMul", b("Transpose", blocks, perm=[0, 3, 2, 1]), x)
            x = b.reshape(x, [0, d, -1])
        else:
            x = b.reshape(x, [0, d // n, n, -1])
            x = b("MatMul", b("Transpose", blocks, perm=[0, 3, 1, 2]), x)
            x = b.reshape(b("Transpose", x, perm=[0, 2, 1, 3]), [0, d, -1])
    if not network.inverse and not network.sorted:
        x = b("Gather", x, b.const(np.argsort(network.deck)), axis=1)
    x = b.reshape(b("Transpose", x, perm=[0, 2, 1]), [-1, d])
    return b("Gather", x, slot, axis=0)


def _factors(
    b: Builder, network: Network, angles: list[Value]
) -> Iterator[tuple[int, Callable[[], Value]]]:
    """Each factor's block size, and what makes its blocks."""
    start = 0
    for bits in network.block_bits:
        part = angles[start : start + bits]
        yield 1 << bits, lambda part=part: _blocks(b, network, part)  # type: ignore[misc]
        start += bits


def _blocks(b: Builder, network: Network, angles: list[Value]) -> Value:
    """Stages as blocks, (experts, n out, n in, d / n) for n = 2^stages."""
    count = len(angles)
    size = network.d >> count
    made: Value = None
    for stage, angle in enumerate(angles):
        done, rest = 1 << stage, 1 << (count - 1 - stage)
        angle = b("Transpose", b.reshape(angle, [-1, done, size, rest]), perm=[0, 1, 3, 2])
        cos, sin = b("Cos", angle), b("Sin", angle)  # (experts, done, rest, d / n)
        matrix = b("Concat", cos, b("Neg", sin), sin, cos, axis=1)
        if made is None:
            made = b.reshape(matrix, [-1, 2, 2, rest, size])
            continue
        made = b.reshape(made, [-1, done, done, rest, 2, size])
        made = b("Transpose", made, perm=[0, 1, 4, 2, 3, 5])
        made = b("Unsqueeze", made, b.const([1]))  # (experts, 1, done, 2, done, rest, size)
        matrix = b("Transpose", b.reshape(matrix, [-1, 2, 2, done, rest, size]),
                   perm=[0, 1, 3, 2, 4, 5])  # fmt: skip
        matrix = b.reshape(matrix, [-1, 2, done, 2, 1, rest, size])
        made = b.reshape(b("Mul", matrix, made), [-1, 2 * done, 2 * done, rest, size])
    return b.reshape(made, [-1, 1 << count, 1 << count, size])


def _split(b: Builder, x: Value, parts: int) -> list[Value]:
    """Equal parts of axis 1."""
    if parts == 1:
        return [x]
    found: list[Value] = b("Split", x, axis=1, num_outputs=parts, outputs=parts)
    return found
