"""Launch shapes of the CUDA rotation: plain arithmetic, so it is checked where there is no GPU."""

import pytest

from lightning_bfmoe.kernels.cuda_plan import launch_shape

REGISTERS = 65536  # of a multiprocessor, compute capability 7.0 to 9.0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("irregular", [0, 2, 4])
@pytest.mark.parametrize("log_d", range(1, 14))
def test_a_program_finds_its_registers_and_holds_whole_rows(log_d, irregular, backward):
    launch = launch_shape(log_d, irregular, backward)
    threads = 32 * launch.warps
    assert threads * (launch.registers or 32) <= REGISTERS
    assert launch.spread <= log_d and launch.warps in (1, 2, 4, 8, 16)
    assert threads << launch.spread >= 2**log_d  # a program's threads hold at least one row
