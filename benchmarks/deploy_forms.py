"""The forms of `benchmarks/deploy.py`: one model with other feed-forward blocks, and its file."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import benchmarks.bare  # noqa: F401  before examples
from benchmarks.deploy_peers import ListedMoE, StandardRows, TernaryMoE, widened
from examples.gpt import GPT
from lightning_bfmoe import load_packed, pack, swap_feed_forward
from lightning_bfmoe.layers import set_blend

SIZES = {  # width, layers, experts, top-k, heads, tokens of the vocabulary, context, new tokens
    "tiny": (32, 1, 4, 2, 2, 64, 256, 8),
    "small": (512, 2, 32, 2, 8, 4096, 512, 48),
    "full": (1024, 4, 64, 2, 16, 32768, 1024, 200),
}
FORMS = {
    "dense fp32": {}, "dense bf16": {"bf16": True}, "dense nf4": {"nf4": True},
    "standard MoE fp32": {"moe": True}, "standard MoE bf16": {"moe": True, "bf16": True},
    "standard MoE nf4": {"moe": True, "nf4": True},
    "standard MoE ternary": {"moe": True, "ternary": True},
    "ours fp16 angles": {"angles": "fp16"}, "ours int8 angles": {"angles": "int8"},
    "ours int8 angles, bf16 rest": {"angles": "int8", "rest": "bf16"},
    "ours int8 angles, low memory": {"angles": "int8", "low_memory": True},
    "standard MoE 4 bit, onnx": {"onnx": True, "qmoe": 4},
    "standard MoE ternary, onnx": {"onnx": True, "qmoe": 2},
    "ours onnx": {"angles": "int8", "onnx": True},
}  # fmt: skip


def build(size: str, form: dict[str, Any]) -> GPT:
    """The model before its numbers come, in the dtype of the form."""
    width, depth, experts, k, heads, vocabulary, context, _ = SIZES[size]
    torch.manual_seed(0)
    model = GPT(vocabulary, context, width, depth, heads)
    kinds = {"nf4": ListedMoE, "ternary": TernaryMoE}
    if form.get("moe"):
        kind = next((kinds[name] for name in kinds if form.get(name)), StandardRows)
        for block in model.blocks:
            block.mlp = kind(width, 4 * width, experts, k)
    return model.bfloat16() if form.get("bf16") else model


def is_huge(size: str, form: dict[str, Any]) -> bool:
    """Whether every expert in full takes gigabytes: then the file is counted, not written."""
    width, depth, experts, *_ = SIZES[size]
    full = form.get("moe") and not form.get("ternary")
    return bool(full) and depth * experts * 8 * width**2 * 4 > 2**31


def make(size: str, form: dict[str, Any], device: str) -> tuple[nn.Module, int]:
    """The model with random numbers, made where it computes; the bytes that its file would have."""
    with torch.device(device):
        model = build(size, form)
    if form.get("nf4"):
        to_nf4(model)
        model.to(device)  # quantises
    model.head.weight = model.embed.weight
    tensors = {id(t): t for t in model.state_dict().values() if isinstance(t, Tensor)}
    return model.eval(), sum(t.numel() * t.element_size() for t in tensors.values())


def to_nf4(model: nn.Module) -> None:
    """Feed-forward matrices as bitsandbytes NF4; they are quantised when they move to a device."""
    import bitsandbytes as bnb

    for block in model.blocks:
        for module in list(block.mlp.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name != "router":
                    with torch.device("meta"):
                        narrow = bnb.nn.Linear4bit(
                            child.in_features, child.out_features, bias=child.bias is not None,
                            compute_dtype=torch.bfloat16, quant_type="nf4",
                        )  # fmt: skip
                    narrow.bias = child.bias
                    if not child.weight.is_meta:
                        narrow.weight = bnb.nn.Params4bit(
                            child.weight.data, requires_grad=False, quant_type="nf4", module=narrow
                        )
                    setattr(module, name, narrow)


def write(size: str, form: dict[str, Any], path: Path) -> int:
    """The model's file; its bytes."""
    model = build(size, form)
    if "qmoe" in form:
        from benchmarks.deploy_onnx import QuantizedMoE, export_standard

        width, _, experts, k, _, vocabulary, context, _ = SIZES[size]
        for block in model.blocks:
            block.mlp = QuantizedMoE(width, 4 * width, experts, k, form["qmoe"])
        export_standard(model, vocabulary, context, path)
        return sum(item.stat().st_size for item in path.iterdir())
    if "angles" in form:
        _, _, experts, k, *_ = SIZES[size]
        swap_feed_forward(model, num_experts=experts, top_k=k, angle_std=0.5)
        set_blend(model, 1.0)
        packed = path.with_suffix(".bfmoe")
        pack(model, packed, angles=form["angles"], rest=form.get("rest", "keep"))
        if form.get("onnx"):
            from lightning_bfmoe.deploy import export_onnx

            export_onnx(packed, path, model=build(size, {}))
            return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
        packed.rename(path)
    elif form.get("nf4"):
        to_nf4(model)
        model.cpu()  # quantises
        torch.save(model.state_dict(), path)
    else:
        state = model.state_dict()
        del state["head.weight"]  # it is the embedding
        save_file(state, path)
    return path.stat().st_size


def read(size: str, form: dict[str, Any], path: Path, device: str) -> nn.Module:
    """The model from its file, on its device."""
    if "angles" in form:
        with torch.device("meta"):
            model = build(size, {})
        low = form.get("low_memory", False)
        return load_packed(path, model, device=device, low_memory=low)
    with torch.device("meta"):
        model = build(size, form)
    if form.get("nf4"):
        to_nf4(model)
        state = torch.load(path, weights_only=True, map_location=device)
        for name, module in model.named_modules():
            if type(module).__name__ == "Linear4bit":
                take_nf4(module, f"{name}.weight", state)
    else:
        state = load_file(path, device=device)
    model.load_state_dict(state, strict=False, assign=True)
    model.head.weight = model.embed.weight
    if form.get("ternary") and device != "cpu":
        for block in model.blocks:
            block.mlp = widened(block.mlp, torch.bfloat16)
        model.bfloat16()
    assert not any(t.is_meta for t in model.state_dict().values()), "the file lacks a tensor"
    return model.eval()


def take_nf4(module: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """A quantised matrix from its stored parts, which go out of the state."""
    import bitsandbytes as bnb

    parts = {key: state.pop(key) for key in list(state) if key.startswith(name + ".")}
    data = state.pop(name)
    module.weight = bnb.nn.Params4bit.from_prequantized(
        data, quantized_stats=parts, requires_grad=False, device=data.device
    )
