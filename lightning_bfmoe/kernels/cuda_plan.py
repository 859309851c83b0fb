"""How the fused rotation is launched on CUDA: shapes, memory and constants, worked out once.

Eager training calls a rotation often and with the same few sizes. What depends on the sizes alone
is cached in a `Plan`; a call then adds the addresses. Nothing that depends on values is kept: the
coefficients are made anew at every call.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bfmoe.functional.butterfly import stage_pairs

MAX_IRREGULAR = 4
LIFT = True  # three shears a pair instead of the definition's four instructions


class Launch(NamedTuple):
    """How a kernel is spread over the GPU; `benchmarks/rotation_cuda.py --tune` compares them."""

    spread: int  # log2 of the columns of one row that a thread holds
    rows: int  # rows that a thread holds
    warps: int  # warps of a program
    resident: int  # programs on one multiprocessor
    registers: int | None = None  # at most, for each thread
    derive: bool = False  # read tan(theta / 2) only and compute sin(theta) from it
    near: bool = False  # programs of a multiprocessor walk neighbouring rows
    shared: int = 0  # stages whose sums of angle gradients lie in shared memory


def fused_stages(width: int, stages: int) -> tuple[int, int]:
    """(regular, irregular) stages that run fused.

    Example:
        >>> fused_stages(512, 9), fused_stages(768, 10), fused_stages(130, 8), fused_stages(512, 4)
        ((9, 0), (8, 2), (1, 0), (4, 0))
    """
    regular = min((width & -width).bit_length() - 1, stages)
    irregular = stages - regular
    return regular, irregular if irregular <= MAX_IRREGULAR else 0


# Measured best on an H100 (`benchmarks/rotation_cuda.py --tune`), by the padded width 2^key;
# narrower ones take the first entry's, 8192 has one program of 512 threads.
_FORWARD: dict[int, tuple] = {
    8: (3, 8, 1, 16), 9: (3, 8, 2, 8), 10: (3, 8, 4, 4), 11: (4, 4, 4, 4, 128, True),
    12: (4, 4, 8, 2, 128, True, True), 13: (4, 4, 16, 1, 128, True),
}  # fmt: skip
_BACKWARD: dict[int, tuple] = {
    8: (3, 4, 1, 16, 128, True, True, 8), 9: (3, 4, 2, 8, 128, True, True, 9),
    10: (3, 4, 4, 4, 128, True, True, 10), 11: (3, 2, 8, 2, 128),
    12: (3, 4, 16, 1, 128, True, False, 10), 13: (4, 2, 16, 1, 128, True, False, 11),
}  # fmt: skip


def launch_shape(log_d: int, irregular: int, backward: bool) -> Launch:
    """The fastest of those compared, by the padded width 2^log_d."""
    if not irregular or log_d == 13:
        best = Launch(*(_BACKWARD if backward else _FORWARD)[max(log_d, 8)])
        return best._replace(spread=min(best.spread, log_d))
    # From two warps on partners are fetched through shared memory.
    spread = min(3 if backward or log_d in (9, 11) else 4, log_d)
    warps = max(2**log_d >> (5 + spread), 1)
    if warps == 16:  # 512 threads have 128 registers each; a higher bound would not launch
        return Launch(spread, 1 if backward else 2, warps, 1)
    derive = log_d == 10  # the others were measured without
    if backward:
        return Launch(spread, 2, warps, max(12 // warps, 1), 168, derive)
    if log_d == 11:
        return Launch(spread, 4, warps, 3)
    return Launch(spread, 4, warps, max(12 // warps, 1), 160, derive)


def walk_parts(regular: int, irregular: int, down: bool, launch: Launch) -> list[tuple[int, int]]:
    """Cut the backward walk where the sums of angle gradients would no longer fit the registers.

    Example:
        >>> walk_parts(13, 0, True, Launch(spread=4, rows=1, warps=16, resident=1))
        [(0, 4), (4, 8), (8, 12), (12, 13)]
    """
    room = 32 if launch.warps > 8 else 128
    own = [2 ** (launch.spread - 1)] * regular + [2**launch.spread] * irregular  # registers
    if down:
        own.reverse()
    in_shared = min(launch.shared, len(own))
    own[:in_shared] = [0] * in_shared
    parts, first, used = [], 0, 0
    for stage, registers in enumerate(own):
        if stage > first and used + registers > room:
            parts.append((first, stage))
            first, used = stage, 0
        used += registers
    return [*parts, (first, len(own))]


@functools.lru_cache(maxsize=256)
def irregular_tables(
    width: int, stages: int, regular: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each column in each irregular stage: its partner, and its pair if it is the first member.

    Both (irregular, 2^ceil(log2 width)), int32; a column without a pair is its own partner.
    """
    size = 1 << (width - 1).bit_length()
    partner = torch.arange(size, dtype=torch.int32).repeat(stages - regular, 1)
    pair = torch.full_like(partner, -1)
    first, second = stage_pairs(width, stages)
    for row in range(stages - regular):
        a, b = first[regular + row], second[regular + row]
        partner[row, a], partner[row, b] = b.int(), a.int()
        pair[row, a] = torch.arange(width // 2, dtype=torch.int32)
    return partner.to(device), pair.to(device)


@functools.lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    if device.type != "cuda":
        return 2  # under the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


class Call:
    """A kernel with its constants; from the second call on without the compiler's dispatch.

    That dispatch looks at every argument to find the compiled code, 30 us of Python. The code
    depends on the constants, the types and whether addresses are multiples of 16: the first two are
    fixed for a `Plan`, the last is checked here.
    """

    def __init__(self, kernel: Any, constants: dict, **options: Any) -> None:
        self.kernel, self.options = kernel, {"enable_fp_fusion": True, **options}
        self.constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self.values = tuple(self.constants.values())
        self.compiled: Any = None  # stays None under the interpreter

    def __call__(
        self, grid: tuple[int, ...], addresses: tuple, tensors: Callable[[], tuple], *numbers: int
    ) -> None:
        """Launch a grid of three sizes; `tensors` makes the tensors at the addresses, if needed."""
        together = 0
        for address in addresses:
            together |= address
        if self.compiled is not None and together % 16 == 0:
            self.compiled[grid](*addresses, *numbers, *self.values)
            return
        found = self.kernel[grid](*tensors(), *numbers, **self.constants, **self.options)
        if together % 16 == 0:
            self.compiled = found


class Plan:
    """Everything about a rotation of given sizes that does not depend on its numbers.

    Its working memory is one tensor of float32: the coefficient table, the row plan (int32), and
    for a backward pass the slices in which programs leave their angle gradients.
    """

    def __init__(
        self, width: int, stages: int, experts: int, device: torch.device, down: bool,
        backward: bool,
    ) -> None:  # fmt: skip
        from lightning_bfmoe.kernels import triton_backward, triton_rotation, triton_tables
        from lightning_bfmoe.kernels.triton_layout import INTERPRETED, table_size

        regular, irregular = fused_stages(width, stages)
        self.experts, self.device = experts, device
        log_d = (width - 1).bit_length()
        launch = launch_shape(log_d, irregular, backward)
        if INTERPRETED or launch.shared > regular:  # a narrow row, or few stages of a wide one
            launch = launch._replace(shared=0, rows=min(launch.rows, 2))
        lift = LIFT and regular > 0
        derive = launch.derive and lift
        self.near = launch.resident if launch.near else 1
        self.height = launch.rows * max((32 * launch.warps << launch.spread) >> log_d, 1)
        self.most = multiprocessors(device) * launch.resident  # programs
        self.partner: Tensor | None = None
        self.pair: Tensor | None = None
        if irregular:
            self.partner, self.pair = irregular_tables(width, stages, regular, device)
        # Numbers, in multiples of 16 bytes.
        self.table = experts * table_size(log_d, regular, irregular, derive)
        self.table = -(-self.table // 4) * 4
        self.rows = -(-(2 * experts + 1) // 4) * 4
        self.slice = stages * (width // 2) if backward else 0
        constants = {
            "WIDTH": width, "LOG_D": log_d, "REGULAR": regular, "IRREGULAR": irregular,
            "DOWN": down, "LIFT": lift, "DERIVE": derive, "NEAR": self.near,
            "SPREAD": launch.spread, "ROWS": launch.rows, "HEIGHT": self.height,
            "SHARED": launch.shared,
        }  # fmt: skip
        block, d = 256, 1 << log_d
        blocks = -(-regular * d // (2 * block)) + -(-d // block) + -(-irregular * d // block)
        self.prepare_grid = experts, blocks, 1
        self.prepare = Call(
            triton_tables.prepare_kernel, {**constants, "BLOCK": block, "WARPS": 4}, num_warps=4
        )
        kernel = triton_backward.rotate_back_kernel if backward else triton_rotation.rotate_kernel
        parts = walk_parts(regular, irregular, down, launch) if backward else [(0, 0)]
        self.walks = [
            Call(
                kernel, {**constants, "WARPS": launch.warps, "FIRST": first, "STOP": stop},
                num_warps=launch.warps, maxnreg=launch.registers,
            )
            for first, stop in parts
        ]  # fmt: skip
        self.collect_grid = experts, -(-stages * (width // 2) // 128), 1
        self.collect = Call(
            triton_tables.collect_kernel,
            {**constants, "PIECES": 32, "BLOCK": 128, "WARPS": 4},
            num_warps=4,
        )

    def programs(self, rows: int) -> int:
        """Programs that walk `rows` rows."""
        wanted = min(self.most, rows // self.height + self.experts)
        return -(-wanted // self.near) * self.near

    def memory(self, programs: int) -> Tensor:
        """Working memory of a call."""
        size = self.table + self.rows + (programs + self.experts) * self.slice
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def addresses(self, memory: Tensor) -> tuple[int, int, int, int, int]:
        """Of table, partners, pairs, row plan, slices."""
        table = memory.data_ptr()
        plan = table + 4 * self.table
        partner = plan if self.partner is None else self.partner.data_ptr()
        pair = plan if self.pair is None else self.pair.data_ptr()
        return table, partner, pair, plan, plan + 4 * self.rows

    def tensors(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors at these `addresses`."""
        plan = memory[self.table : self.table + self.rows].view(torch.int32)
        partner = plan if self.partner is None else self.partner
        pair = plan if self.pair is None else self.pair
        return memory[: self.table], partner, pair, plan, memory[self.table + self.rows :]


@functools.lru_cache(maxsize=1024)
def plan_for(
    width: int, stages: int, experts: int, device: torch.device, down: bool, backward: bool,
    *dtypes: torch.dtype,
) -> Plan:  # fmt: skip
    """The plan of these sizes; a plan compiles for one set of dtypes."""
    return Plan(width, stages, experts, device, down, backward)
