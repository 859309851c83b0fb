"""The parity benchmark: what it compares is what it says."""

import torch

from benchmarks import parity
from examples.gpt import GPT
from lightning_bfmoe.layers import set_blend
from lightning_bfmoe.swap import swap_feed_forward


def test_records_of_an_untrained_model(monkeypatch, tmp_path):
    files = {name: parity.PACKINGS[name] for name in ("fp16", "int8, rest bf16")}
    monkeypatch.setattr(parity, "PACKINGS", files)
    torch.manual_seed(0)
    model = GPT(**parity.SIZES)
    swap_feed_forward(model, **{**parity.EXPERTS, "num_experts": 4})
    set_blend(model, 1.0)
    inputs = torch.randint(1024, (3, parity.CONTEXT))
    store = parity.Store(tmp_path / "parity.json", {"setting": parity.SIZES})
    parity.measure(model.eval(), inputs, inputs, "cpu", store)
    again = parity.Store(store.path, {"setting": parity.SIZES})
    assert again.content == store.content  # written after each, so that a run can go on
    found = {(r["file"], r["dtype"], r["cached"]): r for r in again.content["records"]}
    assert set(found) == {
        ("fp16", "float32", False), ("fp16", "float32", True), ("fp16", "bfloat16", False),
        ("int8, rest bf16", "bfloat16", False),
    }  # fmt: skip
    plain, cached = found["fp16", "float32", False], found["fp16", "float32", True]
    assert plain["logit_error"] < 1e-3 < found["fp16", "bfloat16", False]["logit_error"] < 0.1
    assert abs(plain["loss"] - cached["loss"]) < 1e-4
    assert plain["top1_agreement"] > 0.99
