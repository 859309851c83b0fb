"""Training and measuring one model of the comparison."""

import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from comparison.runs import Run
from examples.control_files import feed_forward_bytes
from examples.controls import GPTWithBalanceLoss
from examples.gpt import GPT
from examples.watch import BlendRamp
from lightning_bfmoe import ButterflyMoECallback, pack
from lightning_bfmoe.layers import Rotation, moe_layers

SIZES = {
    "tiny": {"width": 64, "depth": 2, "context": 64, "batch": 16, "steps": 60, "judge": 20_000},
    "small": {"width": 128, "depth": 2, "context": 64, "batch": 16, "steps": 400, "judge": 60_000},
    "full": {"width": 256, "depth": 4, "context": 256, "batch": 64, "steps": 1200, "judge": 10**6},
}  # fmt: skip


class Batches:
    """The same random windows for every model: (inputs, targets), int64 [batch, context]."""

    def __init__(self, data: Tensor, size: dict[str, int], seed: int, steps: int) -> None:
        self.data, self.size, self.seed, self.steps = data, size, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        span = torch.arange(self.size["context"] + 1)
        for _ in range(self.steps):
            top = len(self.data) - self.size["context"] - 1
            start = torch.randint(top, (self.size["batch"], 1), generator=generator)
            window = self.data[start + span].long()
            yield window[:, :-1], window[:, 1:]


class FixAngles(L.Callback):
    """Control: rotations that are never learned."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the angles where they are to stay, and freeze them."""
        for module in pl_module.modules():
            if isinstance(module, Rotation):
                if self.kind != "frozen":
                    module.angles.data.fill_(math.pi / 4 if self.kind == "hadamard" else 0.0)
                module.angles.requires_grad_(False)


def train_one(
    mode: str, run: Run, size: dict[str, int], data: dict[str, Tensor], judge: str, seed: int,
    base: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Any], nn.Module]:  # fmt: skip
    """Train one model from random weights or from `base`, and measure it.

    Returns:
        Loss (nats per byte), bytes of a feed-forward layer, seconds, worst load; and the model.
    """
    L.seed_everything(seed, verbose=False)
    fresh = mode != "continue"
    kind = GPTWithBalanceLoss if run.balance_loss else GPT
    model = kind(
        vocab_size=256, context=size["context"], width=size["width"], depth=size["depth"],
        heads=size["width"] // 64 or 1, learning_rate=2e-3 if fresh else 1e-3,
    )  # fmt: skip
    steps = size["steps"] if fresh else size["steps"] // 2
    if base is not None:
        model.load_state_dict(base)
    callbacks: list[L.Callback] = []
    if run.block is not None:
        for block in model.blocks:
            block.mlp = run.block(block.mlp)
        callbacks.append(BlendRamp(run.plan))
    else:
        callbacks.append(ButterflyMoECallback(verbose=False, seed=seed, **run.settings))
        if run.angles != "learned":
            callbacks.append(FixAngles(run.angles))
    gpu = torch.cuda.is_available()
    trainer = L.Trainer(
        max_epochs=1, accelerator="gpu" if gpu else "cpu", logger=False,
        devices=[torch.cuda.current_device()] if gpu else 1,
        precision="bf16-mixed" if gpu else "32-true", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        gradient_clip_val=1.0,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(model, Batches(data["train"], size, seed + (not fresh), steps))
    seconds = time.perf_counter() - started
    loss, load = evaluate(model, data[judge][: size["judge"]], size["context"], gpu)
    count = feed_forward_bytes(model) if run.block is not None else packed_bytes(model)
    record = {
        "loss": loss, "ffn_bytes_per_layer": count // size["depth"], "seconds": seconds,
        "steps": steps, "load_max_over_mean": load,
    }  # fmt: skip
    return record, model


def packed_bytes(model: nn.Module) -> int:
    """Bytes that `pack` writes for the swapped layers (fp16 angles, 1.6-bit trits)."""
    with tempfile.TemporaryDirectory() as folder:
        return pack(model.cpu(), os.path.join(folder, "model.bfmoe")).layer_bytes


@torch.no_grad()
def evaluate(model: GPT, tokens: Tensor, context: int, gpu: bool) -> tuple[float, float | None]:
    """Mean nats per byte over consecutive windows, and the worst load of any layer."""
    device = "cuda" if gpu else "cpu"
    model.to(device).eval()
    count = (len(tokens) - 1) // context
    inputs = tokens[: count * context].view(count, context).long()
    targets = tokens[1 : count * context + 1].view(count, context).long()
    total, loads = 0.0, {}
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=gpu):
            loss = model.loss((x.to(device), y.to(device)))
        total += float(loss) * len(x)
        for name, layer in moe_layers(model):
            loads[name] = loads.get(name, 0) + layer.last_routing.load
    worst = max((float(v.max() / v.float().mean()) for v in loads.values()), default=None)
    return total / count, worst


def load_data(folder: Path) -> dict[str, Tensor]:
    """The three splits, uint8."""
    return {
        name: torch.frombuffer(bytearray((folder / f"{name}.bin").read_bytes()), dtype=torch.uint8)
        for name in ("train", "tuning", "test")
    }
