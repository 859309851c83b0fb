"""What the monitors cost, by step time: `ActivationOutliers`, `ExpertUsage`, `NotebookMonitor`.

The first two at their default interval: trains the example GPT on random tokens with one monitor at
a time at an interval of 10, and compares the steps that record with those in between; to that comes
what its hooks do in every step, which is too little to see in a step and is timed on its own, hook
by hook:

    share = ((recording step - step in between) / 50 + hooks of every step) / plain step

`NotebookMonitor` draws by time and not by steps. Its hook is timed in a training, as if in a
notebook: what it takes in a step, what a drawing takes, and so, when it draws as often as it may,

    share = hook / plain step + drawing / max(2 s, drawing / budget)

To that come two drawings whatever the length: one at the start, one at the end.

Seconds are CPU time of one thread on a CPU, wall time behind a synchronisation on a GPU. Each kind
of step is stood for by its 20th percentile, since whatever else runs on a machine only ever adds. A
step without a monitor is measured too, in turn with the others.

    python benchmarks/monitor_overhead.py --out benchmarks/results/monitor_overhead.json
    python benchmarks/monitor_overhead.py --device cuda --sizes small large --out cuda.json
"""

import argparse
import base64
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import lightning as L
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.gpt import GPT  # noqa: E402
from lightning_bfmoe.callbacks import (  # noqa: E402
    ActivationOutliers,
    ExpertUsage,
    NotebookMonitor,
)
from lightning_bfmoe.swap import swap_feed_forward  # noqa: E402
from lightning_bfmoe.viz.live import LiveOutput  # noqa: E402

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


def make_model(size: dict) -> GPT:
    """The example GPT with swapped blocks."""
    torch.manual_seed(0)
    model = GPT(256, size["context"], size["width"], size["depth"], size["heads"])
    swap_feed_forward(model, num_experts=size["experts"], top_k=2, init="scratch")
    return model


def step_times(size: dict, steps: int, monitors: list, cuda: bool) -> list[float]:
    """Seconds of the steps 1, 2, ... of a training (step 0 is not among them)."""
    model = make_model(size)
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
    plain: list[float] = []
    idle, record = {name: [] for name in make}, {name: [] for name in make}
    for _ in range(repeats):
        plain += step_times(size, steps, [], cuda)
        for name, kind in make.items():
            for step, value in enumerate(step_times(size, steps, [kind(INTERVAL)], cuda), start=1):
                (idle if (step + 1) % INTERVAL else record)[name].append(value)
    result = {"plain_step_ms": typical(plain)}
    for name, kind in make.items():
        quiet, loud = typical(idle[name]), typical(record[name])
        hooks = every_step_ms(size, kind(INTERVAL), cuda)
        extra = (loud - quiet) / DEFAULT + hooks
        result[name] = {
            "step_in_between_ms": quiet,
            "recording_step_ms": loud,
            "hooks_every_step_ms": hooks,
            "percent_of_step_time": 100 * extra / result["plain_step_ms"],
        }
    result["NotebookMonitor"] = live_chart(size, steps, result["plain_step_ms"], cuda)
    return result


class TimedMonitor(NotebookMonitor):
    """Seconds of every call of the hook, and of every drawing."""

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.clock = time.perf_counter if cuda else time.process_time
        self.hooks, self.drawings = [], []

    def on_train_batch_end(self, *args):
        """Take the time of steps without a drawing."""
        start, drawn = self.clock(), len(self.drawings)
        super().on_train_batch_end(*args)
        if len(self.drawings) == drawn:
            self.hooks.append(self.clock() - start)

    def draw(self, trainer):
        """Take the time of a drawing."""
        start = self.clock()
        super().draw(trainer)
        self.drawings.append(self.clock() - start)


def live_chart(size: dict, steps: int, plain_step_ms: float, cuda: bool) -> dict:
    """The cost of `NotebookMonitor`; the picture is made, and sent to nobody."""
    monitor = TimedMonitor(cuda)
    with (
        mock.patch("lightning_bfmoe.callbacks.live_chart.in_notebook", return_value=True),
        mock.patch.object(LiveOutput, "show", lambda self, draw, words: base64.b64encode(draw())),
    ):
        step_times(size, steps, [monitor], cuda)
        for _ in range(5):  # of the full curve
            monitor.draw(SimpleNamespace(interrupted=False, callback_metrics={}))
    hook, drawing = statistics.median(monitor.hooks), statistics.median(monitor.drawings[-5:])
    pause = max(monitor.every_n_seconds, drawing / monitor.budget)
    return {
        "hook_ms": 1e3 * hook,
        "drawing_ms": 1e3 * drawing,
        "seconds_between_drawings": pause,
        "percent_of_step_time": 100 * (1e3 * hook / plain_step_ms + drawing / pause),
    }


def every_step_ms(size: dict, monitor: L.Callback, cuda: bool) -> float:
    """Milliseconds that the hooks of a monitor take in a step that does not record."""
    model = make_model(size).to("cuda" if cuda else "cpu")
    tokens = torch.zeros(size["batch"], size["context"], dtype=torch.long, device=model.device)
    calls: list[tuple] = []
    monitor.on_fit_start(SimpleNamespace(barebones=False), model)
    if isinstance(monitor, ExpertUsage):  # which counts in every step
        monitor._switch(True)
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            named = key in module._forward_hooks_with_kwargs

            def keep(module, args, kwargs, output, hook=hook, named=named):
                inputs = (args, kwargs) if named else (args,)
                calls.append((hook, (module, *inputs, output)))

            module._forward_hooks[key] = keep
            module._forward_hooks_with_kwargs[key] = True
    model(tokens)
    if not calls:
        raise RuntimeError("the monitor hooked nothing")
    repeats = 100
    for timed in (False, True):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter() if cuda else time.process_time()
        for _ in range(repeats if timed else 1):
            for hook, inputs in calls:
                hook(*inputs)
        if cuda:
            torch.cuda.synchronize()
        end = time.perf_counter() if cuda else time.process_time()
    return 1e3 * ((end - start) / repeats + len(calls) * dispatch_seconds())


def dispatch_seconds() -> float:
    """What PyTorch needs to call a hook that does nothing."""
    module, calls, times = torch.nn.Identity(), 20_000, []
    for _ in range(2):
        start = time.process_time()
        for _ in range(calls):
            module(1)
        times.append((time.process_time() - start) / calls)
        module.register_forward_hook(lambda module, args, output: None)
    return max(times[1] - times[0], 0.0)


def typical(seconds: list[float]) -> float:
    """20th percentile, in milliseconds."""
    return 1e3 * statistics.quantiles(seconds, n=5, method="inclusive")[0]


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["quickstart"], choices=SIZES)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees")
    make = {"ActivationOutliers": ActivationOutliers, "ExpertUsage": ExpertUsage}
    results = {
        "device": torch.cuda.get_device_name() if cuda else "cpu, 1 thread, CPU time",
        "torch": torch.__version__,
        "every_n_steps": DEFAULT,
        "steps": args.steps,
        "repeats": args.repeats,
    }
    for name in args.sizes:
        results[name] = {
            "size": SIZES[name],
            **measure(SIZES[name], args.steps, make, args.repeats, cuda),
        }
        print(json.dumps(results[name], indent=2), flush=True)
        if args.out:  # after each size: a run that is cut off leaves what it has
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
