"""Several processes train as one: losses, checksums, traffic and step times, by Lightning's engine.

    python benchmarks/scale_out.py --devices 2 --out DIR                    # Lightning starts both
    torchrun --nproc-per-node 2 benchmarks/scale_out.py --accelerator cpu   # torchrun does

First the correctness, in float64 and in float32: the example GPT is trained for a few steps by one
process, and by all of them on the same global batch under plain `ddp` with the callback, under
`bfmoe`, and under `bfmoe` with compressed gradients. Each loss curve (mean over the processes) is
held against that of one process and the checksums of all parameters against each other; a failure
ends the run. In float64 lambda rises to 1. In float32 it stays below 0.1: rounding to trits is a
step function, and at lambda 1 an error of 1e-7 that moves one trit over its step shows as a jump of
some 1e-5, whatever the number of processes.

Then a larger model is timed, once more with the shared matrices frozen. What is written: difference
of the curves, checksum of each process, bytes that a process gives to the collectives in a step,
milliseconds a step and their ratio to one process with the whole batch (1 / processes would be
ideal).

Bytes: of the gradients as the wrapper (or the communication hook) counts them, and of the buffers
that are sent before a forward pass. Times: a window of steps between two synchronisations.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.gpt import GPT  # noqa: E402
from lightning_bfmoe import ButterflyMoECallback, ButterflyMoEStrategy  # noqa: E402
from lightning_bfmoe.plan import Plan  # noqa: E402
from lightning_bfmoe.strategy import parameter_checksums  # noqa: E402

STARTED = time.perf_counter()
LIMITS = {"64-true": 1e-10, "32-true": 1e-5, "bf16-mixed": 1.0}  # nats
COMPRESSED = 1e-2  # nats, where gradients are rounded
CHECK = {"width": 64, "depth": 2, "heads": 2, "context": 64, "batch": 16, "experts": 8}
SIZES = {
    "tiny": {"width": 128, "depth": 2, "heads": 2, "context": 64, "batch": 16, "experts": 8},
    "full": {"width": 768, "depth": 4, "heads": 12, "context": 512, "batch": 32, "experts": 64},
}


class Text:
    """Global batches of the standard library's source, as bytes; each process takes its rows."""

    def __init__(self, size: dict, steps: int, rank: int, world: int) -> None:
        files = sorted(Path(os.__file__).parent.glob("[a-d]*.py"))
        text = bytearray(b"".join(file.read_bytes() for file in files))
        data = torch.frombuffer(text, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        length = size["context"] + 1
        starts = torch.randint(len(data) - length, (steps, size["batch"]), generator=generator)
        self.batches = [torch.stack([data[s : s + length] for s in row]).long() for row in starts]
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for rows in self.batches:
            own = rows[self.rank :: self.world]
            yield own[:, :-1], own[:, 1:]


class Plain(GPT):
    """Trained by SGD: Adam would blow up rounding errors of gradients that are zero in truth."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


class Watch(L.Callback):
    """Losses of all steps, seconds of the last ones, bytes of a step."""

    def __init__(self, warm: int, steps: int) -> None:
        self.warm, self.steps = warm, steps
        self.losses, self.started, self.seconds, self.traffic = [], None, None, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())
        if batch_idx + 1 == self.warm:
            self.started = self._now(module)
        if batch_idx + 1 == self.steps:
            self.seconds = (self._now(module) - self.started) / (self.steps - self.warm)
            self._count(trainer)

    @staticmethod
    def _now(module) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()

    def _count(self, trainer) -> None:
        wrapper, hook = trainer.strategy.model, getattr(trainer.strategy, "traffic", None)
        if isinstance(wrapper, torch.nn.parallel.DistributedDataParallel):
            wanted = [p.nbytes for p in wrapper.parameters() if p.requires_grad]
            sent = hook.sent // self.steps if hook is not None and hook.sent else sum(wanted)
            buffers = sum(b.nbytes for b in wrapper.modules_buffers)
            self.traffic = {"gradient_bytes": sent, "buffer_bytes": buffers}


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def layers(size: dict, plan: Plan) -> dict:
    """Settings that the callback and the strategy both take."""
    return {"num_experts": size["experts"], "top_k": 2, "plan": plan, "verbose": False}


def cases(size: dict, plan: Plan, precision: str, frozen: bool) -> dict:
    """Name -> strategy and callbacks, made when they are needed."""

    def ours(**settings):
        return lambda: (ButterflyMoEStrategy(**layers(size, plan), **settings), [])

    found = {
        "ddp": lambda: ("ddp", [ButterflyMoECallback(**layers(size, plan))]),
        "bfmoe": ours(),
    }
    if precision != "64-true":  # float64 is sent as it is
        found["bfmoe, bf16"] = ours(compress="bf16")
    if frozen:
        still = Plan(start=1000, end=2000, freeze_latents=1000)
        found["bfmoe, frozen"] = lambda: (
            ButterflyMoEStrategy(**layers(size, still), freeze="requires_grad"), []
        )  # fmt: skip
    return found


def train(args, kind: type, size: dict, steps: int, precision: str, made, alone: bool) -> dict:
    """Train on the same batches as every other run; what this process saw."""
    torch.manual_seed(0)
    model = kind(256, size["context"], size["width"], size["depth"], size["heads"])
    strategy, callbacks = made
    world = 1 if alone else args.devices * args.nodes
    watch = Watch(steps // 3, steps)
    devices = ([local_rank()] if args.accelerator == "gpu" else 1) if alone else args.devices
    trainer = L.Trainer(
        accelerator=args.accelerator, devices=devices, num_nodes=1 if alone else args.nodes,
        strategy=strategy, callbacks=[*callbacks, watch], max_steps=steps, precision=precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    rank = 0 if alone else trainer.global_rank
    trainer.fit(model, Text(size, steps, rank, world))
    checksum = hashlib.sha256(parameter_checksums(model).cpu().numpy().tobytes()).hexdigest()[:16]
    losses = torch.stack(watch.losses).double().tolist()
    return {"losses": losses, "checksum": checksum, "ms": 1e3 * watch.seconds, **watch.traffic}


def gathered(own: dict) -> list[dict]:
    """The records of all processes, on every one of them."""
    records: list = [None] * dist.get_world_size()
    dist.all_gather_object(records, own)
    return records


def everybody(value):
    """The first process's value."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def summary(name: str, precision: str, ranks: list[dict], alone: dict) -> dict:
    """One case against one process."""
    curve = torch.tensor([r["losses"] for r in ranks], dtype=torch.float64).mean(0)
    reference = torch.tensor(alone["losses"], dtype=torch.float64)
    limit = COMPRESSED if "bf16" in name else LIMITS[precision]
    difference = (curve - reference).abs().max().item()
    checksums = [r["checksum"] for r in ranks]
    ms = max(r["ms"] for r in ranks)
    return {
        "case": name, "processes": len(ranks), "max_loss_difference": difference, "limit": limit,
        "first_loss": curve[0].item(), "last_loss": curve[-1].item(), "checksums": checksums,
        "equal_checksums": len(set(checksums)) == 1, "ms_per_step": ms,
        "time_over_one_process": ms / alone["ms"],
        **{key: ranks[0][key] for key in ("gradient_bytes", "buffer_bytes")},
    }  # fmt: skip


def run(args, kind: type, size: dict, steps: int, precision: str, frozen: bool) -> dict:
    """One process (the first only), then each case on all of them."""
    first = local_rank() == 0 and args.node_rank == 0
    end = steps // 2 if precision != "32-true" else 10 * steps
    plan = Plan(start=steps // 5, end=end, shape="linear")
    made = "auto", [ButterflyMoECallback(**layers(size, plan))]
    alone = train(args, kind, size, steps, precision, made, alone=True) if first else None
    found, left_out = [], []
    for name, make in cases(size, plan, precision, frozen).items():
        if dist.is_initialized() and everybody(time.perf_counter() - STARTED > args.limit_s):
            left_out.append(name)
            continue
        ranks = gathered(train(args, kind, size, steps, precision, make(), alone=False))
        alone = everybody(alone)
        found.append(summary(name, precision, ranks, alone))
    return {
        "size": size, "steps": steps, "precision": precision, "one_process": everybody(alone),
        "cases": found, "left_out": left_out,
    }  # fmt: skip


def correct(result: dict) -> bool:
    """Whether every case trained as one process did, on equal copies."""
    return not result["left_out"] and all(
        c["equal_checksums"] and c["max_loss_difference"] <= c["limit"] for c in result["cases"]
    )


def table(title: str, result: dict, compare: bool) -> list[str]:
    """Lines for people."""
    one = result["one_process"]
    lines = [
        f"{title} ({result['precision']}, {result['steps']} steps)",
        f"{'case':15} {'loss diff':>10} {'copies':>10} {'MB/step':>9} {'ms/step':>9} {'x one':>6}",
        f"{'one process':15} {'':10} {'':10} {'':9} {one['ms']:9.2f} {1:6.2f}",
    ]
    for c in result["cases"]:
        difference = f"{c['max_loss_difference']:10.1e}" if compare else f"{'':10}"
        lines.append(
            f"{c['case']:15} {difference} {'equal' if c['equal_checksums'] else 'DIFFER':>10} "
            f"{(c['gradient_bytes'] + c['buffer_bytes']) / 1e6:9.3f} {c['ms_per_step']:9.2f} "
            f"{c['time_over_one_process']:6.2f}"
        )
    return lines


def commit() -> str:
    if commit := os.environ.get("COMMIT"):  # of a copy of the tree inside another checkout
        return commit
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()


def about(args) -> dict:
    cuda = args.accelerator == "gpu"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": args.devices, "nodes": args.nodes, "backend": dist.get_backend(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "lightning": L.__version__,
        "python": platform.python_version(), "commit": commit(),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    env = os.environ
    here = int(env.get("LOCAL_WORLD_SIZE", env.get("SLURM_NTASKS_PER_NODE", 2)))
    nodes = int(env.get("SLURM_NNODES", int(env.get("WORLD_SIZE", here)) // here or 1))
    parser.add_argument("--devices", type=int, default=here, help="processes on each machine")
    parser.add_argument("--nodes", type=int, default=nodes, help="machines")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--size", choices=SIZES, help="of the timed model; tiny on a CPU")
    parser.add_argument("--check-steps", type=int, default=20, help="steps of the correctness runs")
    parser.add_argument("--steps", type=int, default=24, help="steps of the timed runs; 0: none")
    parser.add_argument("--limit-s", type=float, default=140, help="no new case after (seconds)")
    parser.add_argument("--out", type=Path, help="JSON file, or a folder for scale_out.json")
    args = parser.parse_args()
    if args.accelerator == "auto":
        args.accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    args.size = args.size or ("full" if args.accelerator == "gpu" else "tiny")
    args.node_rank = int(env.get("GROUP_RANK", env.get("SLURM_NODEID", env.get("NODE_RANK", 0))))
    return args


def write(out: Path | None, results: dict) -> None:
    if out is not None:
        path = out if out.suffix == ".json" else out / "scale_out.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Check, then time; the table comes last."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args = arguments()
    checks = [
        run(args, Plain, CHECK, args.check_steps, precision, frozen=False)
        for precision in ("64-true", "32-true")
    ]
    results = {**about(args), "correct": all(map(correct, checks)), "correctness": checks}
    lines = [line for check in checks for line in [*table("correctness", check, True), ""]]
    if results["correct"] and args.steps:
        precision = "bf16-mixed" if args.accelerator == "gpu" else "32-true"
        timed = run(args, GPT, SIZES[args.size], args.steps, precision, frozen=True)
        results["timing"] = timed
        results["equal_copies"] = all(c["equal_checksums"] for c in timed["cases"])
        lines += table(f"timing, {args.size}", timed, compare=False)
    results["seconds"] = time.perf_counter() - STARTED
    if dist.get_rank() == 0:
        write(args.out, results)
        print("\n".join(["", f"{results['device']}, {results['backend']}", *lines]), flush=True)
        print(f"correct: {results['correct']}, {results['seconds']:.0f} s", flush=True)
    dist.destroy_process_group()
    sys.exit(not (results["correct"] and results.get("equal_copies", True)))


if __name__ == "__main__":
    main()
