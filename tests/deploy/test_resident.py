"""Memory that a loaded model takes: with `low_memory` the file's bytes and little more."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.gpt import GPT
from lightning_bfmoe import load_packed, pack, swap_feed_forward
from lightning_bfmoe.deploy import Sampling, TokenGenerator
from lightning_bfmoe.layers import CodedNumbers, CodedRotation, PackedSubstrate

INIT = {"vocab_size": 64, "context": 16, "width": 256, "depth": 4, "heads": 2}

CHILD = """
import gc, sys
from pathlib import Path
import torch
from examples.gpt import GPT
from lightning_bfmoe.deploy import Sampling, TokenGenerator, load_packed, read_packed

def resident():  # bytes of this process in memory
    gc.collect()
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

def use(path, low_memory):
    with torch.device("meta"):
        model = GPT(**read_packed(path).header.init)
    load_packed(path, model, low_memory=low_memory, device="cpu")
    TokenGenerator(model).generate([[1, 2, 3]], Sampling(4, 0))
    return model

torch.set_num_threads(1)
use(sys.argv[1], False)  # whatever is imported and set up at the first use
before = resident()
low = use(sys.argv[2], True)
after = resident()
fast = use(sys.argv[2], False)
print(after - before, resident() - after)
"""


def save(path, experts, init):
    torch.manual_seed(0)
    model = GPT(**init)
    swap_feed_forward(model, num_experts=experts, angle_std=0.0)
    for module in list(model.modules()):
        for side in ("rotate_in", "rotate_out"):
            if hasattr(module, side):  # codes are quicker drawn than encoded
                coded = CodedRotation(tuple(getattr(module, side).angles.shape), bits=8)
                coded.codes.random_(-127, 128)
                coded.scales.fill_(0.01)
                setattr(module, side, coded)
    pack(model, path, angles="int8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resident")
    small = {**INIT, "width": 8, "depth": 1}
    return save(folder / "small.bfmoe", 2, small), save(folder / "large.bfmoe", 256, INIT)


def taken(files):
    """Bytes that loading and using the large file adds to a process, in low memory and without."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, as Linux has it")
def test_a_model_in_low_memory_takes_at_most_1_3_times_its_file(files):
    size = files[1].stat().st_size
    low, fast = taken(files)
    assert size > 12e6
    assert 0.9 * size < low <= 1.3 * size
    assert fast > 2 * size  # so the measurement sees what is kept


def kept(model):
    """Bytes of all tensors that hang in a model, what its modules keep to themselves included."""
    own = [*model.parameters(), *model.buffers()]
    own += [m._cache[1] for m in model.modules() if getattr(m, "_cache", None) is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    return sum(storages.values())


def test_what_hangs_in_the_model(files):
    path = files[1]
    model = load_packed(path, GPT(**INIT), low_memory=True)
    generator = TokenGenerator(model)
    first = generator.generate([[1, 2, 3]], Sampling(4, 0))
    assert kept(model) <= 1.05 * path.stat().st_size
    for module in model.modules():
        if isinstance(module, PackedSubstrate | CodedNumbers):
            module.keeps = True
    assert generator.generate([[1, 2, 3]], Sampling(4, 0)) == first
    assert kept(model) > 2 * path.stat().st_size
    gc.collect()


@pytest.mark.parametrize("bits", ["1.6", "2"])
@pytest.mark.parametrize("shape", [(7, 5), (64, 48), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_matrix_is_the_same_kept_or_unpacked_anew(bits, shape, dtype):
    trits = torch.randint(-1, 2, shape, dtype=torch.int8)
    for rows in (shape[0], 1):
        packed = PackedSubstrate.from_ternary(trits, torch.rand(rows, 1) + 0.1, bits)
        before = packed.weight(dtype)
        packed.keeps = False
        assert torch.equal(packed.weight(dtype), before)
        assert packed._cache is None


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3, 40])  # fewer than experts, and more
def test_a_rotation_is_the_same_kept_or_decoded_anew(bits, rows):
    from lightning_bfmoe.functional import dispatch, group_by_expert

    rotation = CodedRotation.of(torch.randn(9, 4, 5), bits)  # 10 wide
    groups = group_by_expert(torch.randint(9, (rows, 1)), 9)
    x = dispatch(torch.randn(rows, 10, dtype=torch.float64), groups, 1)
    for inverse in (False, True):
        rotation.keeps = True
        before = rotation(x, groups, inverse)
        rotation.keeps = False
        assert (rotation(x, groups, inverse) - before).abs().max() < 1e-12
    assert rotation._cache is None
