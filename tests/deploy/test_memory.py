"""Counted bytes: the paper's table, the real file, and the devices."""

import io

import pytest
from rich.console import Console
from torch import nn

from lightning_bfmoe.deploy import (
    DEVICES,
    experts_that_fit,
    inspect_packed,
    pack,
    plan_memory,
)
from lightning_bfmoe.deploy.devices import human_bytes
from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE

MIB = 1 << 20


def text(thing):
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(thing)
    return console.file.getvalue()


# arXiv 2601.13563 as its author's code counts: N, standard MiB, ours MiB, x fp32, x ternary
PAPER = [
    (1, 4, 0.2234, 17.9, 0.88),
    (8, 32, 0.4045, 79.1, 3.91),
    (16, 64, 0.6116, 104.65, 5.17),
    (64, 256, 1.8538, 138.10, 6.82),
    (256, 1024, 6.8225, 150.09, 7.41),
]


@pytest.mark.parametrize(("experts", "standard", "ours", "fp32", "ternary"), PAPER)
def test_the_papers_table(experts, standard, ours, fp32, ternary):
    plan = plan_memory(512, 2048, experts, top_k=1, paper_convention=True)
    assert plan.bytes("moe_fp32") == standard * MIB
    assert plan.bytes() / MIB == pytest.approx(ours, abs=5e-5)
    assert plan.ratio("moe_fp32") == pytest.approx(fp32, abs=0.05)
    assert plan.ratio("moe_ternary") == pytest.approx(ternary, abs=0.005)


def test_the_papers_other_settings():
    def ratio(d, **settings):
        plan = plan_memory(d, 4 * d, 256, paper_convention=True, **settings)
        return round(plan.ratio("moe_fp32"))

    assert ratio(512, angle_bits=32) == 76
    assert ratio(512, angle_bits=8) == 292
    assert [ratio(d) for d in (256, 1024, 2048, 4096)] == [84, 268, 473, 813]


LAYERS = [
    (8, 16, {}),
    (12, 20, {"gated": True, "activation": "silu"}),
    (7, 9, {"gains": True, "bias": False}),
    (6, 32, {"granularity": "tensor", "stages": 2}),
    (10, 14, {"down": "dense", "d_out": 5}),
    (9, 11, {"gated": True, "down": "dense", "gains": True, "d_out": 8}),
]


@pytest.mark.parametrize(("d_model", "d_ff", "settings"), LAYERS)
@pytest.mark.parametrize("bits", ["1.6", "2"])
@pytest.mark.parametrize("kind", [ButterflyMoE, ButterflyExperts])
def test_the_plan_equals_the_packed_layer_byte_for_byte(
    d_model, d_ff, settings, bits, kind, tmp_path
):
    path = tmp_path / "model.bfmoe"
    report = pack(nn.Sequential(kind(d_model, d_ff, 4, **settings)), path, bits=bits)
    counted = {k: v for k, v in settings.items() if k != "activation"}
    plan = plan_memory(
        d_model, d_ff, 4, trit_bits=float(bits), router=kind is ButterflyMoE, **counted
    )
    assert plan.bytes() == report.layer_bytes == report.layers[0].bytes
    stored = dict(report.layers[0].parts)
    stored["weights"] = stored.pop("dense", 0)
    assert {k: v for k, v in plan.parts["butterfly"].items() if v} == {
        k: v for k, v in stored.items() if v
    }
    assert report.layers[0].plan.bytes() == report.layer_bytes


@pytest.mark.parametrize(("d_model", "d_ff", "settings"), LAYERS)
@pytest.mark.parametrize("rest", ["keep", "bf16"])
@pytest.mark.parametrize(
    ("angles", "gains", "bits"),
    [("fp32", None, (32, None)), ("fp32", "fp16", (32, 16)), ("int8", None, (8, None)),
     ("int8", "int8", (8, 8)), ("int4", "int8", (4, 8)), ("fp16", "int8", (16, 8))],
)  # fmt: skip
def test_every_width_is_planned_byte_for_byte(
    d_model, d_ff, settings, angles, gains, bits, rest, tmp_path
):
    model = nn.Sequential(ButterflyMoE(d_model, d_ff, 3, **settings))
    report = pack(model, tmp_path / "m.bfmoe", angles=angles, gains=gains, rest=rest)
    counted = {k: v for k, v in settings.items() if k != "activation"}
    plan = plan_memory(
        d_model, d_ff, 3, angle_bits=bits[0], gain_bits=bits[1],
        router_bits=16 if rest == "bf16" else 32, **counted,
    )  # fmt: skip
    stored = dict(report.layers[0].parts)
    stored["weights"] = stored.pop("dense", 0)
    assert {k: v for k, v in plan.parts["butterfly"].items() if v} == {
        k: v for k, v in stored.items() if v
    }
    assert report.layers[0].plan.parts == plan.parts
    again = inspect_packed(tmp_path / "m.bfmoe")
    assert again.layers == report.layers and "stored as" in text(again)


def test_the_goal_for_a_large_layer():
    def ratio(**settings):
        return plan_memory(512, 2048, 256, **settings).ratio("moe_fp32")

    assert ratio(router_bits=16) > 145
    assert ratio(angle_bits=8) > 265
    assert ratio(angle_bits=8, router_bits=16) > 275
    assert ratio(angle_bits=4, router_bits=16) > 480


def test_the_report_adds_up_to_the_file(tmp_path):
    path = tmp_path / "model.bfmoe"
    model = nn.Sequential(nn.Linear(8, 8), ButterflyMoE(8, 16, 4), ButterflyMoE(8, 16, 2))
    report = pack(model, path, angles="fp32")
    assert report.file_bytes == path.stat().st_size
    assert report.other_bytes == 4 * (64 + 8)
    assert report.counted_bytes + report.header_bytes == report.file_bytes
    assert vars(inspect_packed(path)) == vars(report)
    compared = report.compared()
    assert compared["moe_fp32"] == sum(4 * n * (2 * 8 * 16 + 16 + 8) + 4 * n * 9 for n in (4, 2))
    assert compared["butterfly"] == report.layer_bytes
    shown = text(report)
    assert f"{report.file_bytes:,}" in shown
    assert f"{report.layer_bytes:,}" in shown


def test_both_ratios_are_always_shown():
    shown = text(plan_memory(512, 2048, 256, layers=3))
    for form in ("fp32", "ternary"):
        assert f"{plan_memory(512, 2048, 256, layers=3).ratio(f'moe_{form}'):.2f}x" in shown


def test_a_standard_moe_has_a_bias_per_expert_and_ours_one():
    plan = plan_memory(8, 16, 4)
    assert plan.parts["moe_fp32"]["bias"] == 4 * plan.parts["butterfly"]["bias"] == 4 * 4 * 24


@pytest.mark.parametrize("form", ["moe_fp32", "moe_ternary", "butterfly"])
@pytest.mark.parametrize("device", ["esp32-s3", "rpi-zero2w", 123_456_789])
def test_the_last_expert_fits_and_the_next_does_not(form, device):
    room = DEVICES.get(device, device)
    count = experts_that_fit(device, 64, 256, layers=2)[form]
    assert count > 0
    assert plan_memory(64, 256, count, 1, layers=2).bytes(form) <= room
    assert plan_memory(64, 256, count + 1, 1, layers=2).bytes(form) > room


def test_a_share_of_a_device():
    whole = experts_that_fit("rpi5", 512, 2048, paper_convention=True)["butterfly"]
    half = experts_that_fit("rpi5", 512, 2048, share=0.5, paper_convention=True)["butterfly"]
    assert half == pytest.approx(whole / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plan_memory(0, 8, 2), "d_model must be a count"),
        (lambda: plan_memory(8, 8.0, 2), "d_ff must be a count"),
        (lambda: plan_memory(8, 8, 2, 3), "top_k must be at most num_experts"),
        (lambda: plan_memory(8, 8, 2, trit_bits=1.58), "paper_convention"),
        (lambda: plan_memory(8, 8, 2, angle_bits=6), "angle_bits must be one of"),
        (lambda: plan_memory(8, 8, 2, gain_bits=4), "gain_bits must be one of"),
        (lambda: plan_memory(8, 8, 2, router_bits=8), "router_bits must be one of"),
        (lambda: plan_memory(8, 8, 2, granularity="block"), "granularity must be one of"),
        (lambda: plan_memory(8, 8, 2, down="none"), "down must be one of"),
        (lambda: plan_memory(8, 8, 2, stages=0), "stages must be a count"),
        (lambda: experts_that_fit("toaster", 8, 8), "Known: .*rpi5"),
        (lambda: experts_that_fit(-5, 8, 8), "positive number of bytes"),
        (lambda: experts_that_fit("rpi5", 8, 8, share=0.0), "share must lie"),
    ],
)
def test_wrong_questions(call, match):
    with pytest.raises(ConfigError, match=match):
        call()


def test_a_width_that_cannot_rotate():
    with pytest.raises(ShapeError, match="d >= 2"):
        plan_memory(1, 8, 2)


def test_bytes_for_people():
    assert [human_bytes(n) for n in (0, 1023, 1024, 3 << 19, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "5.0 TiB",
    ]
