"""A whole model on a device: counted bytes against a real file, and the last expert that fits."""

import pytest
import torch

from examples.gpt import GPT
from lightning_bfmoe import load_packed, pack, swap_feed_forward
from lightning_bfmoe.deploy import DEVICES, KVCache, plan_device, plan_memory
from lightning_bfmoe.deploy.device_plan import FORMS, RUNTIMES, parse_size
from lightning_bfmoe.errors import ConfigError

SIZES = {"layers": 2, "vocab_size": 50, "context": 32}


def test_the_parts_equal_a_real_file_and_a_real_cache(tmp_path):
    model = GPT(vocab_size=50, context=32, width=16, depth=2, heads=2)
    swap_feed_forward(model, num_experts=8)
    report = pack(model, tmp_path / "model.bfmoe", angles="int8")
    plan = plan_device(
        "1MB", 16, 64, 8, runtime="none", angle_bits=8, gain_bits=None, batch=3, **SIZES
    )
    assert plan.parts["rest of the model"] == report.other_bytes
    counted = report.counted_bytes + plan.parts["kv cache"] + plan.parts["workspace"]
    assert plan.needed["butterfly"] == counted
    cache = KVCache(3, 32)
    cache.begin(1, 1)
    load_packed(tmp_path / "model.bfmoe", model)
    with torch.no_grad():
        model(torch.zeros(3, 1, dtype=torch.int64), cache)
    assert plan.parts["kv cache"] == cache.bytes
    kept = 2 * 4 * (16 * 64 * 2) + 4 * sum(  # dense matrices, and decoded angles
        module.codes.numel() for module in model.modules() if hasattr(module, "codes")
    )
    fast = plan.needed["butterfly_fast"] - plan.needed["butterfly"]
    assert kept <= fast <= 1.3 * kept  # the scales of so narrow stages are counted as angles


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("bits", [16, 8])
def test_the_last_expert_fits_and_the_next_does_not(form, bits):
    def plan(count):
        return plan_device("600MB", 64, 256, count, angle_bits=bits, gains=True, **SIZES)

    most = plan(1).experts[form]
    assert most > 1
    assert plan(most).fits(form)
    assert not plan(most + 1).fits(form)
    assert plan(most).experts[form] == most


def test_what_does_not_fit_at_all_holds_no_expert():
    plan = plan_device("esp32-s3", 64, 256, 1)
    assert plan.parts["runtime"] == RUNTIMES["torch"] > DEVICES["esp32-s3"]
    assert set(plan.experts.values()) == {0}
    assert not plan.fits()
    alone = plan_device("esp32-s3", 64, 256, 1, runtime="none", context=64)
    assert alone.experts["butterfly"] > 1


def test_narrower_numbers_take_half():
    wide, narrow = (
        plan_device("rpi5", 64, 256, 4, rest_bits=bits, kv_width=16, **SIZES) for bits in (32, 16)
    )
    for part in ("kv cache", "rest of the model"):
        assert wide.parts[part] == 2 * narrow.parts[part]
    assert wide.parts["kv cache"] == 2 * 2 * 32 * 16 * 4


def test_a_share_and_a_runtime_in_bytes():
    plan = plan_device("1GiB", 64, 256, 4, share=0.5, runtime="100MB")
    assert plan.ram == 1 << 29
    assert plan.parts["runtime"] == 100 << 20


def test_the_forms_are_ordered():
    experts = plan_device("jetson-nano", 1024, 4096, 4, layers=12).experts
    assert experts["moe_fp32"] < experts["moe_ternary"] < experts["butterfly"]
    one = plan_memory(1024, 4096, 1, 1, layers=12).bytes("moe_fp32")
    assert experts["moe_fp32"] <= DEVICES["jetson-nano"] // one


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MB", 512 << 20), ("4 gib", 4 << 30), ("100k", 100 << 10), ("7", 7), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["rpi5", "-1", "1.5GB", "GB", ""])
def test_no_sizes(text):
    assert parse_size(text) == text


@pytest.mark.parametrize(
    ("arguments", "settings", "match"),
    [
        (("toaster", 8, 8, 2), {}, "Known: .*rpi5"),
        ((0, 8, 8, 2), {}, "positive number of bytes"),
        (("rpi5", 8, 8, 0), {}, "num_experts must be a count"),
        (("rpi5", 8, 8, 2), {"layers": True}, "layers must be a count"),
        (("rpi5", 8, 8, 2), {"vocab_size": -1}, "vocab_size must be a count"),
        (("rpi5", 8, 8, 2), {"rest_bits": 8}, "rest_bits must be 32 or 16"),
        (("rpi5", 8, 8, 2), {"share": 0.0}, "share must lie"),
        (("rpi5", 8, 8, 2), {"runtime": "java"}, "Known: torch"),
        (("rpi5", 8, 8, 2), {"angle_bits": 7}, "angle_bits must be one of"),
    ],
)
def test_wrong_questions(arguments, settings, match):
    with pytest.raises(ConfigError, match=match):
        plan_device(*arguments, **settings)
