"""The honest comparison: losses of equal trainings beside the bytes of the feed-forward layers.

    python benchmarks/accuracy.py prepare --data DIR            # text to bytes, once
    python benchmarks/accuracy.py run --size full --data DIR --seeds 0,1 --limit 540
    python benchmarks/accuracy.py table                         # results/accuracy/*.json to a table

Every model sees the same tokens in the same order with the same optimiser. Two settings:
`scratch` trains from random weights; `continue` starts from one trained dense model, as a user of
the callback does. Finished runs are kept, so a call that hits its limit is simply repeated.
Loss: nats per byte. Tune with --judge tuning; what is reported is --judge test, never tuned on.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from torch import Tensor, nn

from examples.control_files import feed_forward_bytes
from examples.controls import GPTWithBalanceLoss, StandardMoE, TernaryFeedForward
from examples.gpt import GPT, FeedForward
from examples.watch import BlendRamp
from lightning_bfmoe import ButterflyMoECallback
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.plan import Plan

RESULTS = Path(__file__).parent / "results" / "accuracy"
SIZES = {
    "tiny": {"width": 64, "depth": 2, "context": 64, "batch": 16, "steps": 60, "judge": 20_000},
    "small": {"width": 128, "depth": 2, "context": 64, "batch": 16, "steps": 400, "judge": 60_000},
    "full": {"width": 256, "depth": 4, "context": 256, "batch": 64, "steps": 1200, "judge": 10**6},
}  # fmt: skip


class Batches:
    """The same random windows for every model: (inputs, targets), int64 [batch, context]."""

    def __init__(self, data: Tensor, size: dict, seed: int, steps: int) -> None:
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


def initialise(moe: StandardMoE, seed: int) -> StandardMoE:
    """Independent experts N(0, 0.02^2), as the dense block starts; not copies of one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (moe.up, moe.down):
            weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    return moe


def dense(block: FeedForward) -> FeedForward:
    return block


def standard(experts: int, top_k: int, *, ternary: bool = False, scratch: bool = True) -> Callable:
    def make(block: FeedForward) -> StandardMoE:
        moe = StandardMoE(block, experts, top_k, ternary=ternary)
        return initialise(moe, seed=experts) if scratch else moe

    return make


def butterfly(**settings: object) -> dict:
    return settings


ALWAYS = Plan(start=0, end=0)  # ternary from the first step


def runs(mode: str) -> dict[str, object]:
    """Name -> how its feed-forward blocks are made: a callable, or settings of the callback."""
    fresh = mode == "scratch"
    start = {"init": "scratch"} if fresh else {}
    table: dict[str, object] = {
        "dense": dense,
        "ternary dense": TernaryFeedForward,
        "standard 8 top-2": standard(8, 2, scratch=fresh),
        "ternary standard 8 top-2": standard(8, 2, ternary=True, scratch=fresh),
        "ternary standard 3 top-2": standard(3, 2, ternary=True, scratch=fresh),
        "butterfly 8 top-2": butterfly(num_experts=8, top_k=2, **start),
        "butterfly 64 top-2": butterfly(num_experts=64, top_k=2, **start),
        "standard 8 top-4": standard(8, 4, scratch=fresh),
        "ternary standard 8 top-4": standard(8, 4, ternary=True, scratch=fresh),
        "butterfly 64 top-4": butterfly(num_experts=64, top_k=4, **start),
        "butterfly 256 top-4": butterfly(num_experts=256, top_k=4, **start),
    }
    if fresh:
        table |= {
            "paper preset 8 top-2": butterfly(preset="paper", num_experts=8),
            "butterfly 8 top-2, angles frozen": butterfly(num_experts=8, freeze=True, **start),
            "butterfly 8 top-2, angle lr x1": butterfly(
                num_experts=8, angle_lr_factor=1.0, **start
            ),
        }
    return table


def variants(mode: str) -> dict[str, object]:
    """Candidates for the defaults; judged on the tuning split only."""
    start = {"init": "scratch"} if mode == "scratch" else {}
    table: dict[str, object] = {}
    for factor in (1.0, 5.0, 20.0):
        for std in (0.02, 0.1, 0.5) if mode == "continue" else (0.1, 0.5):
            name = f"tune: 8 top-2 lr x{factor:g} std {std}"
            table[name] = butterfly(num_experts=8, angle_lr_factor=factor, angle_std=std, **start)
    table["tune: lambda always 1"] = butterfly(num_experts=8, plan=ALWAYS, **start)
    table["tune: lambda 0.1-0.9"] = butterfly(num_experts=8, plan=Plan(0.1, 0.9), **start)
    table["tune: lambda 0-0.3"] = butterfly(num_experts=8, plan=Plan(0.0, 0.3), **start)
    table["tune: absmean"] = butterfly(num_experts=8, scale="absmean", **start)
    table["tune: gains"] = butterfly(num_experts=8, gains=True, **start)
    table["tune: switch 0.01"] = butterfly(
        num_experts=8, switch_weight=0.01, balance_rate=0.0, **start
    )
    table["tune: 64 balance 0.01"] = butterfly(num_experts=64, balance_rate=0.01, **start)
    return table


class Freeze(L.Callback):
    """Control: random rotations that are never learned."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_) -> None:
        for name, parameter in pl_module.named_parameters():
            if name.endswith("angles"):
                parameter.grad = None
                parameter.requires_grad_(False)


def train_one(mode: str, how: object, size: dict, data: dict, judge: str, seed: int, base) -> dict:
    """Train one model and measure it."""
    L.seed_everything(seed, verbose=False)
    needs_loss = callable(how) and getattr(how, "__qualname__", "").startswith("standard")
    kind = GPTWithBalanceLoss if needs_loss else GPT
    heads = size["width"] // 64 or 1
    model = kind(
        vocab_size=256, context=size["context"], width=size["width"], depth=size["depth"],
        heads=heads, learning_rate=2e-3 if mode == "scratch" else 1e-3,
    )  # fmt: skip
    steps = size["steps"] if mode != "continue" else size["steps"] // 2
    if base is not None:
        model.load_state_dict(base)
    callbacks: list[L.Callback] = []
    if callable(how):
        for block in model.blocks:
            block.mlp = how(block.mlp)
        callbacks.append(BlendRamp(Plan()))
    else:
        settings = dict(how)
        if settings.pop("freeze", False):
            callbacks.append(Freeze())
        callbacks.append(ButterflyMoECallback(verbose=False, seed=seed, **settings))
    gpu = torch.cuda.is_available()
    trainer = L.Trainer(
        max_epochs=1, accelerator="gpu" if gpu else "cpu", devices=1, logger=False,
        precision="bf16-mixed" if gpu else "32-true", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        gradient_clip_val=1.0,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(model, Batches(data["train"], size, seed + (mode == "continue"), steps))
    seconds = time.perf_counter() - started
    loss, load = evaluate(model, data[judge][: size["judge"]], size["context"], gpu)
    report = next((c.report for c in callbacks if isinstance(c, ButterflyMoECallback)), None)
    count = feed_forward_bytes(model) if report is None else packed_bytes(model)
    return {
        "loss": loss, "ffn_bytes_per_layer": count // size["depth"], "seconds": seconds,
        "steps": steps, "load_max_over_mean": load, "state": model,
    }  # fmt: skip


def packed_bytes(model: nn.Module) -> int:
    """Bytes that `pack` writes for the swapped layers (fp16 angles, 1.6-bit trits)."""
    from lightning_bfmoe.deploy import pack

    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"accuracy-{os.getpid()}.bfmoe"
    try:
        return pack(model.cpu(), path, overwrite=True).layer_bytes
    finally:
        path.unlink(missing_ok=True)


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


def prepare(folder: Path, corpus: str) -> None:
    """Write train, tuning and test bytes (whole documents each) and where they come from."""
    from lightning_bfmoe.data import load_corpus

    folder.mkdir(parents=True, exist_ok=True)
    text = load_corpus(corpus)
    held = text.validation.encode()
    middle = held.index(b"\n", len(held) // 2) + 1
    parts = {"train": text.train.encode(), "tuning": held[:middle], "test": held[middle:]}
    for name, value in parts.items():
        (folder / f"{name}.bin").write_bytes(value)
    origin = {
        "corpus": corpus,
        "sha256": text.sha256,
        "bytes": {k: len(v) for k, v in parts.items()},
    }
    (folder / "origin.json").write_text(json.dumps(origin))


def load_data(folder: Path) -> dict[str, Tensor]:
    """The three splits, uint8."""
    return {
        name: torch.frombuffer(bytearray((folder / f"{name}.bin").read_bytes()), dtype=torch.uint8)
        for name in ("train", "tuning", "test")
    }


def run(options: argparse.Namespace) -> None:
    """Train whatever is missing until the time limit."""
    size, data = SIZES[options.size], load_data(Path(options.data))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    started, longest = time.perf_counter(), 0.0
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    )  # a copy of the tree elsewhere has no git: set COMMIT there
    about = {
        "size": options.size, **size, "judge_split": options.judge,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__, "commit": commit,
        "data": json.loads((Path(options.data) / "origin.json").read_text()),
    }  # fmt: skip
    records = {}
    path = out / f"accuracy-{options.size}-{options.judge}.json"
    if path.exists():
        records = json.loads(path.read_text())["runs"]
    for mode in options.modes.split(","):
        table = variants(mode) if options.judge == "tuning" else runs(mode)
        if options.only:
            table = {n: table[n] for n in options.only.split(",") if n in table}
        for seed in map(int, options.seeds.split(",")):
            todo = [n for n in table if f"{mode} | {n} | {seed}" not in records]
            base = None
            for name in todo:
                if time.perf_counter() - started + longest > options.limit:
                    print("time limit: call again for the rest")
                    return
                begun = time.perf_counter()
                if mode == "continue" and base is None:
                    trained = train_one("base", dense, size, data, options.judge, seed, None)
                    base = {k: v.cpu() for k, v in trained["state"].state_dict().items()}
                    about[f"base loss, seed {seed}"] = trained["loss"]
                    print(f"base dense: {trained['loss']:.4f}", flush=True)
                record = train_one(mode, table[name], size, data, options.judge, seed, base)
                record.pop("state")
                records[f"{mode} | {name} | {seed}"] = record
                path.write_text(json.dumps({"about": about, "runs": records}, indent=1))
                longest = max(longest, time.perf_counter() - begun)
                print(
                    f"{mode:9}{name:36} seed {seed}: loss {record['loss']:.4f}  "
                    f"{record['ffn_bytes_per_layer'] / 1e6:.3f} MB/layer  {record['seconds']:.0f} s"
                    f"  load {record['load_max_over_mean'] or 0:.2f}",
                    flush=True,
                )


def table(options: argparse.Namespace) -> None:
    """Mean and spread over seeds, as a Markdown table."""
    for path in sorted(Path(options.out).glob("accuracy-*.json")):
        found = json.loads(path.read_text())
        print(f"\n{path.name}: {found['about']['device']}\n")
        groups: dict[str, list[dict]] = {}
        for key, record in found["runs"].items():
            groups.setdefault(key.rsplit(" | ", 1)[0], []).append(record)
        print("| training | feed-forward | loss | seeds | MB / layer |\n|---|---|---|---|---|")
        for key, records in groups.items():
            losses = torch.tensor([r["loss"] for r in records])
            spread = f" ± {losses.std():.4f}" if len(records) > 1 else ""
            mode, name = key.split(" | ")
            print(
                f"| {mode} | {name} | {losses.mean():.4f}{spread} | {len(records)} "
                f"| {records[0]['ffn_bytes_per_layer'] / 1e6:.3f} |"
            )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["prepare", "run", "table"])
    parser.add_argument("--data", default="outputs/accuracy-data")
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--modes", default="scratch,continue")
    parser.add_argument("--judge", choices=["test", "tuning"], default="test")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="Names of runs, comma-separated.")
    parser.add_argument("--limit", type=float, default=math.inf, help="Seconds.")
    parser.add_argument("--out", default=str(RESULTS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.action == "prepare":
        prepare(Path(options.data), options.corpus)
    else:
        {"run": run, "table": table}[options.action](options)


if __name__ == "__main__":
    main()
