"""What `ActivationOutliers` and `ExpertUsage` cost at their default interval, by step time.

Trains the example GPT on random tokens with one monitor at a time at an interval of 10, and
compares the steps that record with those in between:

    share = (recording step - idle step) / 50 / idle step

What an idle step costs is too little to see so: it is one call of an idle hook for every hooked
module, timed on its own.

CPU time of one thread on a CPU, wall time behind a synchronisation on a GPU. Each kind of step is
stood for by its 20th percentile, since whatever else runs on a machine only ever adds.

    python benchmarks/monitor_overhead.py --steps 60 --out benchmarks/results/monitor_overhead.json
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.gpt import GPT  # noqa: E402
from lightning_bfmoe.callbacks import ActivationOutliers, ExpertUsage  # noqa: E402
from lightning_bfmoe.swap import swap_feed_forward  # noqa: E402

INTERVAL, DEFAULT = 10, 50
SIZES = {
    "quickstart": {"width": 128, "depth": 3, "heads": 4, "context": 64, "batch": 16, "experts": 8},
    "small": {"width": 256, "depth": 4, "heads": 4, "context": 128, "batch": 16, "experts": 8},
    "large": {"width": 768, "depth": 12, "heads": 12, "context": 512, "batch": 16, "experts": 64},
}


class StepTimes(L.Callback):
    """Seconds of every step, from one batch's end to the next."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.seconds, self.at = cuda, [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Take the time."""
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter() if self.cuda else time.process_time()
        if self.at is not None:
            self.seconds.append(now - self.at)
        self.at = now


def step_times(size: dict, steps: int, monitors: list, cuda: bool) -> list[float]:
    """Seconds of the steps 1, 2, ... of a training (step 0 is not among them)."""
    torch.manual_seed(0)
    model = GPT(256, size["context"], size["width"], size["depth"], size["heads"])
    swap_feed_forward(model, num_experts=size["experts"], top_k=2, init="scratch")
    tokens = torch.randint(256, (steps * size["batch"], size["context"] + 1))
    pairs = [(t[:-1], t[1:]) for t in tokens]
    times = StepTimes(cuda)
    trainer = L.Trainer(
        max_steps=steps, callbacks=[*monitors, times], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, devices=1,
        accelerator="gpu" if cuda else "cpu", precision="bf16-mixed" if cuda else "32-true",
    )  # fmt: skip
    trainer.fit(model, DataLoader(pairs, batch_size=size["batch"]))
    return times.seconds


def measure(size: dict, steps: int, make: dict, repeats: int, cuda: bool) -> dict:
    """Each kind of step (milliseconds) and the share of each monitor (percent)."""
    result = {}
    for name, kind in make.items():
        idle, record = [], []
        for _ in range(repeats):
            seconds = step_times(size, steps, [kind(INTERVAL)], cuda)
            for step, value in enumerate(seconds, start=1):
                (idle if (step + 1) % INTERVAL else record).append(value)
        quiet, loud = typical(idle), typical(record)
        result[name] = {
            "idle_step_ms": quiet,
            "recording_step_ms": loud,
            "percent_of_step_time": 100 * (loud - quiet) / DEFAULT / quiet,
        }
    return result


def idle_hook_us() -> float:
    """Microseconds that an idle hook adds to a call of its module."""

    class Idle:
        active = False

        def record(self, module, args, output):
            if self.active and args:
                raise AssertionError

    module, calls, times = torch.nn.Identity(), 20_000, []
    for _ in range(2):
        start = time.process_time()
        for _ in range(calls):
            module(1)
        times.append(time.process_time() - start)
        module.register_forward_hook(Idle().record)
    return 1e6 * (times[1] - times[0]) / calls


def typical(seconds: list[float]) -> float:
    """20th percentile, in milliseconds."""
    return 1e3 * statistics.quantiles(seconds, n=5, method="inclusive")[0]


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["quickstart"], choices=SIZES)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    make = {"ActivationOutliers": ActivationOutliers, "ExpertUsage": ExpertUsage}
    results = {
        "device": torch.cuda.get_device_name() if cuda else "cpu, 1 thread, CPU time",
        "torch": torch.__version__,
        "every_n_steps": DEFAULT,
        "idle_hook_us": idle_hook_us(),
    }
    for name in args.sizes:
        results[name] = {
            "size": SIZES[name],
            **measure(SIZES[name], args.steps, make, args.repeats, cuda),
        }
        print(json.dumps(results[name], indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
