"""Where each number of a tile lives: in which register of which thread. Gluon, or the interpreter.

Gluon is Triton with the layouts spelled out: the compiler moves numbers between threads exactly
where `move` says so. Under TRITON_INTERPRET=1 the same kernels run as plain Triton on the CPU; a
layout then means nothing, so the names below stand for plain Triton's.

Imported only where triton is installed (`kernels.cuda` does).
"""

# mypy: ignore-errors
# Kernel code is compiled by triton and follows its rules, not those of Python's types.
import triton
import triton.language

constexpr = triton.language.constexpr
INTERPRETED = triton.knobs.runtime.interpret

if INTERPRETED:
    import triton.language as gl

    jit = triton.jit

    def static(function):
        """Evaluated while compiling."""
        return function

else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    jit, static = gluon.jit, gluon.constexpr_function


@static
def tile_layout(
    log_d: int, spread: int, warps: int, rows: int, stages: int, group: int
) -> tuple[list, list, list, list]:
    """Bases of the layout in which `group` of the stages pairs registers of one thread.

    A tile is [rows, lane rows, 2^log_d]. A thread holds all `rows` and, of the columns, the bits
    of its group's stages (stage s pairs columns that differ in bit s), filled up to `spread` bits
    from the lowest. The other column bits, then rows, are spread over the threads.

    Example:
        >>> registers, lanes, warps, shape = tile_layout(6, 3, 1, 1, 6, group=1)
        >>> [base[2] for base in registers], [base[2] for base in lanes], shape
        ([8, 16, 32], [1, 2, 4, 0, 0], [1, 4, 64])
    """
    held = list(range(group * spread, min((group + 1) * spread, stages)))
    held = sorted(held + [bit for bit in range(log_d) if bit not in held][: spread - len(held)])
    others = [bit for bit in range(log_d) if bit not in held]
    threads = 5 + warps.bit_length() - 1  # log2 of the number of threads
    beside = threads - len(others)  # log2 of the rows that lie beside each other
    spread_over = [[0, 0, 1 << bit] for bit in others] + [[0, 1 << bit, 0] for bit in range(beside)]
    registers = [[0, 0, 1 << bit] for bit in held]
    registers += [[1 << bit, 0, 0] for bit in range(rows.bit_length() - 1)]
    return registers, spread_over[:5], spread_over[5:], [rows, 1 << beside, 1 << log_d]


@static
def stage_at(stage: int, log_d: int, regular: int, derive: bool) -> int:
    """Where a stage begins in an expert's table; the signs come between both kinds of stages.

    Example:
        >>> [stage_at(stage, 3, 2, derive=False) for stage in range(4)]
        [0, 8, 24, 40]
    """
    size = 2**log_d
    if stage <= regular - 1:
        return stage * (size // 2 if derive else size)
    signs = regular * (size // 2 if derive else size)
    return signs + size + 2 * (stage - regular) * size


@static
def signs_at(log_d: int, regular: int, derive: bool) -> int:
    """Where the signs begin."""
    return regular * (2**log_d // 2 if derive else 2**log_d)


@static
def table_size(log_d: int, regular: int, irregular: int, derive: bool) -> int:
    """Numbers in an expert's table: one or two a pair, a sign a column, two a column if irregular.

    Example:
        >>> table_size(3, regular=3, irregular=0, derive=False)
        32
    """
    return stage_at(regular + irregular, log_d, regular, derive)


@static
def sums_layout(
    log_d: int, spread: int, warps: int, stages: int, stage: int, group: int
) -> list[list[int]]:
    """Bases of a stage's sums [lane rows, 2^log_d / 2] in shared memory.

    Four numbers of a thread, then the next thread's: accesses of 16 bytes without bank conflicts.

    Example:
        >>> [base[1] for base in sums_layout(8, 3, 1, 8, stage=0, group=0)]
        [1, 2, 4, 8, 16, 32, 64]
    """
    registers, lanes, warp, _ = tile_layout(log_d, spread, warps, 1, stages, group)
    bases = [base[1:] for base in registers[:3] + lanes + warp + registers[3:]]
    pair = [[row, column if column < 2**stage else column // 2] for row, column in bases]
    return [new for new, old in zip(pair, bases, strict=True) if old[1] != 2**stage]


@static
def walked(i: int, stages: int, down: bool) -> int:
    """The stage that is taken as number i of a walk up or down."""
    return stages - 1 - i if down else i


@static
def group_of(stage: int, regular: int, spread: int) -> int:
    """The group of a stage; irregular stages keep the layout of the last group."""
    return max(min(stage, regular - 1), 0) // spread


if INTERPRETED:

    def tile(*_args):
        """No layout."""

    line = tile

    @jit
    def move(x, LAYOUT):
        """Plain Triton has no layouts to move between."""
        return x

    @jit
    def move_by_row(x, LAYOUT):
        """Plain Triton has no layouts to move between."""
        return x

    def shared_sums(*_args):
        """No shared memory."""

    @jit
    def pause(number):
        """Nothing to hold back."""
        return number

    @jit
    def columns(N, LAYOUT):
        """[1, 1, N]: 0 .. N-1 along the last axis of a tile."""
        return gl.arange(0, N)[None, None, :]

    @jit
    def columns_like(x, N):
        """`columns` for a tile laid out as x."""
        return gl.arange(0, N)[None, None, :]

    @jit
    def tile_rows(ROWS, BESIDE, LAYOUT):
        """[ROWS, BESIDE, 1]: number of the row in the tile."""
        return gl.arange(0, ROWS)[:, None, None] * BESIDE + gl.arange(0, BESIDE)[None, :, None]

    @jit
    def numbers(N, LAYOUT):
        """0 .. N-1."""
        return gl.arange(0, N)

    @jit
    def numbers_like(x, N):
        """0 .. N-1, laid out as the vector x."""
        return gl.arange(0, N)

    @jit
    def grid_rows(N, WARPS):
        """[N, 1]: 0 .. N-1 down a matrix."""
        return gl.arange(0, N)[:, None]

    @jit
    def grid_columns(N, WARPS):
        """[1, N]: 0 .. N-1 across a matrix."""
        return gl.arange(0, N)[None, :]

    @jit
    def zeros(ROWS, BESIDE, N, LAYOUT):
        """A tile of zeros."""
        return gl.zeros((ROWS, BESIDE, N), gl.float32)

else:

    @static
    def tile(log_d, spread, warps, rows, stages, group):
        """`tile_layout` as a Gluon layout."""
        registers, lanes, warp, shape = tile_layout(log_d, spread, warps, rows, stages, group)
        return gl.DistributedLinearLayout(registers, lanes, warp, [], shape)

    @static
    def line(warps):
        """One number a thread, again and again."""
        return gl.BlockedLayout([1], [32], [warps], [0])

    @jit
    def move(x, LAYOUT: constexpr):
        """To the threads of another layout: through shared memory, unless it is the same."""
        return gl.convert_layout(x, LAYOUT)

    @jit
    def move_by_row(x, LAYOUT: constexpr):
        """`move` of two rows, one after the other: with half the shared memory."""
        first, second = gl.split(gl.permute(x, (1, 2, 0)))
        one: constexpr = gl.SliceLayout(0, LAYOUT)
        x = gl.join(gl.convert_layout(first, one), gl.convert_layout(second, one))
        return gl.convert_layout(gl.permute(x, (2, 0, 1)), LAYOUT)

    @static
    def shared_sums(log_d, spread, warps, stages, stage, group):
        """`sums_layout` as a Gluon layout."""
        return gl.SharedLinearLayout(sums_layout(log_d, spread, warps, stages, stage, group))

    @jit
    def pause(number):
        """Keep the loads that follow behind this point: hoisted, they would fill the registers."""
        return gl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.u32 $0, $1;", "=r,r", [number], gl.int32, False, 1
        )

    @jit
    def columns(N: constexpr, LAYOUT: constexpr):
        """[1, 1, N]: 0 .. N-1 along the last axis of a tile."""
        last: constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))
        return gl.arange(0, N, layout=last)[None, None, :]

    @jit
    def columns_like(x, N: constexpr):
        """`columns` for a tile laid out as x."""
        layout: constexpr = x.type.layout
        return columns(N, layout)

    @jit
    def tile_rows(ROWS: constexpr, BESIDE: constexpr, LAYOUT: constexpr):
        """[ROWS, BESIDE, 1]: number of the row in the tile."""
        first: constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
        second: constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))
        rows = gl.arange(0, ROWS, layout=first)[:, None][:, :, None]
        return rows * BESIDE + gl.arange(0, BESIDE, layout=second)[None, :][:, :, None]

    @jit
    def numbers(N: constexpr, LAYOUT: constexpr):
        """0 .. N-1."""
        return gl.arange(0, N, layout=LAYOUT)

    @jit
    def numbers_like(x, N: constexpr):
        """0 .. N-1, laid out as the vector x."""
        return gl.arange(0, N, layout=x.type.layout)

    @static
    def grid(warps):
        """A matrix whose rows are shared by the lanes of a warp."""
        return gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])

    @jit
    def grid_rows(N: constexpr, WARPS: constexpr):
        """[N, 1]: 0 .. N-1 down a matrix."""
        return gl.arange(0, N, layout=gl.SliceLayout(1, grid(WARPS)))[:, None]

    @jit
    def grid_columns(N: constexpr, WARPS: constexpr):
        """[1, N]: 0 .. N-1 across a matrix."""
        return gl.arange(0, N, layout=gl.SliceLayout(0, grid(WARPS)))[None, :]

    @jit
    def zeros(ROWS: constexpr, BESIDE: constexpr, N: constexpr, LAYOUT: constexpr):
        """A tile of zeros."""
        return gl.zeros((ROWS, BESIDE, N), gl.float32, layout=LAYOUT)
