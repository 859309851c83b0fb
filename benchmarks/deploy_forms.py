"""The forms of `benchmarks/deploy.py`: one model with other feed-forward blocks, and its file."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.speed import StandardMoE, loop
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
    "ours fp16 angles": {"angles": "fp16"}, "ours int8 angles": {"angles": "int8"},
    "ours int8 angles, bf16 rest": {"angles": "int8", "rest": "bf16"},
    "ours int8 angles, low memory": {"angles": "int8", "low_memory": True},
    "ours onnx": {"angles": "int8", "onnx": True},
}  # fmt: skip


class Flat(nn.Module):
    """A feed-forward layer of rows (tokens, width) in a model of (batch, time, width)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> same."""
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(self.layer, StandardMoE):
            plain = rows.dtype == torch.float32  # the grouped kernel takes 16-bit numbers
            return self.layer(rows, loop if plain else None).reshape(x.shape)
        return self.layer(rows).reshape(x.shape)


class ListedMoE(nn.Module):
    """Experts as modules of their own, for quantisers that replace `nn.Linear`."""

    def __init__(self, d: int, d_ff: int, experts: int, k: int) -> None:
        super().__init__()
        self.k, self.router = k, nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, d_ff, bias=False), nn.GELU(), nn.Linear(d_ff, d, bias=False))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d) -> same."""
        weights, chosen = self.router(x).topk(self.k, dim=-1)
        weights, y = weights.softmax(-1), torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            y[rows] += weights[rows, slots].unsqueeze(1) * self.experts[expert](x[rows])
        return y


def build(size: str, form: dict[str, Any]) -> GPT:
    """The model before its numbers come, in the dtype of the form."""
    width, depth, experts, k, heads, vocabulary, context, _ = SIZES[size]
    torch.manual_seed(0)
    model = GPT(vocabulary, context, width, depth, heads)
    if form.get("moe"):
        for block in model.blocks:
            layer = StandardMoE(width, 4 * width, experts, k, torch.float32)
            block.mlp = Flat(ListedMoE(width, 4 * width, experts, k) if form.get("nf4") else layer)
    return model.bfloat16() if form.get("bf16") else model


def to_nf4(model: nn.Module) -> None:
    """Feed-forward matrices as bitsandbytes NF4; they are quantised when they move to a device."""
    import bitsandbytes as bnb

    for block in model.blocks:
        for module in list(block.mlp.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name != "router":
                    narrow = bnb.nn.Linear4bit(
                        child.in_features, child.out_features, bias=child.bias is not None,
                        compute_dtype=torch.bfloat16, quant_type="nf4",
                    )  # fmt: skip
                    if not child.weight.is_meta:
                        narrow.load_state_dict(child.state_dict())
                    setattr(module, name, narrow)


def write(size: str, form: dict[str, Any], path: Path) -> int:
    """The model's file; its bytes."""
    model = build(size, form)
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
    assert not any(p.is_meta for p in model.parameters()), "the file lacks a tensor"
    return model.eval()


def take_nf4(module: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """A quantised matrix from its stored parts, which go out of the state."""
    import bitsandbytes as bnb

    parts = {key: state.pop(key) for key in list(state) if key.startswith(name + ".")}
    data = state.pop(name)
    module.weight = bnb.nn.Params4bit.from_prequantized(
        data, quantized_stats=parts, requires_grad=False, device=data.device
    )
