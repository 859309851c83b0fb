"""The honest comparison: losses of equal trainings beside the bytes of the feed-forward layers.

    python benchmarks/accuracy.py prepare                             # text to bytes, once
    python benchmarks/accuracy.py run --size small --seeds 0,1        # minutes on a CPU
    python benchmarks/accuracy.py run --size full --seeds 0,1,2 --workers 6 --limit 540   # one GPU
    python benchmarks/accuracy.py table                               # results/accuracy/*.json
    python benchmarks/accuracy.py figure                              # loss against bytes

Every model sees the same tokens in the same order with the same optimiser. Two settings:
`scratch` trains from random weights; `continue` starts from one trained dense model, as a user of
the callback does. Finished runs are kept, so a call that hits its limit is simply repeated.
Loss: nats per byte. Tune with --judge tuning; what is reported is --judge test, never tuned on.
"""

import argparse
import json
import math
import multiprocessing
import os
import queue
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from comparison.runs import Run, candidates, dense, reported  # noqa: E402
from comparison.store import Store, about, figure, table  # noqa: E402
from comparison.train import SIZES, load_data, train_one  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "accuracy"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "accuracy.png"


def prepare(options: argparse.Namespace) -> None:
    """Write train, tuning and test bytes (whole documents each) and where they come from."""
    from lightning_bfmoe.data import load_corpus

    folder = Path(options.data)
    folder.mkdir(parents=True, exist_ok=True)
    text = load_corpus(options.corpus)
    held = text.validation.encode()
    middle = held.index(b"\n", len(held) // 2) + 1
    parts = {"train": text.train.encode(), "tuning": held[:middle], "test": held[middle:]}
    for name, value in parts.items():
        (folder / f"{name}.bin").write_bytes(value)
    sizes = {name: len(value) for name, value in parts.items()}
    origin = {"corpus": options.corpus, "sha256": text.sha256, "bytes": sizes}
    (folder / "origin.json").write_text(json.dumps(origin))


def table_of(mode: str, judge: str, size: str) -> dict[str, Run]:
    """The runs of a mode by name."""
    budgets = {"tiny": 50_106, "small": 123_528, "full": 319_930}  # ButterflyMoE 8, packed
    if judge == "tuning":
        return candidates(mode)
    return reported(mode, budgets[size], 10.0 if size == "full" else 20.0)


def size_of(options: argparse.Namespace) -> dict[str, int]:
    """Sizes of the model and its training."""
    size = SIZES[options.size]
    return {**size, "steps": options.steps} if options.steps else size


def work(options: argparse.Namespace, index: int, tasks: Any, results: Any) -> None:
    """A process that trains one model after another; process i uses GPU i mod their number."""
    import torch

    if count := torch.cuda.device_count():
        torch.cuda.set_device(index % count)

    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    size, data = size_of(options), load_data(Path(options.data))
    while (task := tasks.get()) is not None:
        mode, name, seed = task
        try:
            base = None
            if mode == "continue":
                base = torch.load(base_path(options, seed), weights_only=True)
            run = (
                Run(dense) if mode == "base" else table_of(mode, options.judge, options.size)[name]
            )
            record, model = train_one(mode, run, size, data, options.judge, seed, base)
            if mode == "base":
                torch.save(
                    {k: v.cpu() for k, v in model.state_dict().items()}, base_path(options, seed)
                )
            results.put((task, record, ""))
        except Exception:  # the other runs go on; the parent prints it
            results.put((task, None, traceback.format_exc()))


def base_path(options: argparse.Namespace, seed: int) -> Path:
    """Weights of the dense model that `continue` starts from."""
    steps = size_of(options)["steps"]
    return Path(options.data) / f"base-{options.size}-{steps}-{seed}.pt"


def run(options: argparse.Namespace) -> None:
    """Train what is missing, several at once, until the time limit."""
    origin = json.loads((Path(options.data) / "origin.json").read_text())
    setting = about(options.size, size_of(options), options.judge, origin)
    name = options.size if not options.steps else f"{options.size}-{options.steps}"
    store = Store(Path(options.out) / f"accuracy-{name}-{options.judge}.json", setting)
    wanted = []
    for seed in map(int, options.seeds.split(",")):  # seed by seed: a stopped call has whole rows
        for mode in options.modes.split(","):
            names = options.only.split(";") if options.only else None
            found = table_of(mode, options.judge, options.size)
            if names and (unknown := set(names) - set(found)):
                raise SystemExit(f"no run is called {sorted(unknown)}; there are {sorted(found)}")
            wanted += [(mode, name, seed) for name in names or found]
    todo = [task for task in wanted if key(task) not in store.runs]
    bases = {seed for mode, _, seed in todo if mode == "continue"}
    todo = [
        ("base", "dense", s) for s in sorted(bases) if not base_path(options, s).exists()
    ] + todo
    print(f"{len(todo)} runs to do, {len(store.runs)} kept in {store.path.name}", flush=True)
    Pool(options, store).finish(todo)
    print("\n" + table(store))


class Pool:
    """Worker processes, the runs they are given, and when to stop."""

    def __init__(self, options: argparse.Namespace, store: Store) -> None:
        self.options, self.store, self.started = options, store, time.perf_counter()
        context = multiprocessing.get_context("spawn")
        self.tasks, self.results = context.Queue(), context.Queue()
        self.processes = [
            context.Process(target=work, args=(options, i, self.tasks, self.results), daemon=True)
            for i in range(options.workers)
        ]

    def finish(self, todo: list[tuple[str, str, int]]) -> None:
        """Hand out runs; none is begun that would end after the limit."""
        for process in self.processes:
            process.start()
        running: dict[tuple[str, str, int], float] = {}
        longest, failed = 0.0, []
        while todo or running:
            elapsed = time.perf_counter() - self.started
            ready = [
                t for t in todo if t[0] != "continue" or base_path(self.options, t[2]).exists()
            ]
            while ready and len(running) < self.options.workers:
                if elapsed + longest > self.options.limit:
                    print(f"time limit: {len(todo)} runs are left; call again", flush=True)
                    todo, ready = [], []
                    break
                task = ready.pop(0)
                todo.remove(task)
                running[task] = time.perf_counter()
                self.tasks.put(task)
            try:
                task, record, error = self.results.get(timeout=1.0)
            except queue.Empty:
                if not any(p.is_alive() for p in self.processes):
                    raise SystemExit("all worker processes have died") from None
                continue
            longest = max(longest, time.perf_counter() - running.pop(task))
            if record is None:
                failed.append(task)
                print(f"{key(task)} FAILED\n{error}", flush=True)
                continue
            if task[0] != "base":
                self.store.add(key(task), record)
            print(
                f"{time.perf_counter() - self.started:5.0f} s  {key(task):60}{record['loss']:.4f}"
                f"  {record['ffn_bytes_per_layer'] / 1e6:7.3f} MB/layer {record['seconds']:5.0f} s"
                f"  load {record['load_max_over_mean'] or 0:.2f}",
                flush=True,
            )
        for _ in self.processes:
            self.tasks.put(None)
        for process in self.processes:
            process.join(timeout=10)
        if failed:
            raise SystemExit(f"{len(failed)} runs failed: {[key(task) for task in failed]}")

    def _can_start(self, task: tuple[str, str, int]) -> bool:
        return task[0] != "continue" or base_path(self.options, task[2]).exists()


def key(task: tuple[str, str, int]) -> str:
    """Name of a run in the file."""
    return " | ".join(map(str, task))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["prepare", "run", "table", "figure"])
    parser.add_argument("--data", default="outputs/accuracy-data", help="Folder of the bytes.")
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--steps", type=int, default=0, help="In place of the size's own.")
    parser.add_argument("--modes", default="scratch", help="scratch, continue, or both.")
    parser.add_argument("--judge", choices=["test", "tuning"], default="test")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="Names, with ; between, in order.")
    parser.add_argument("--limit", type=float, default=math.inf, help="Begin no run past it (s).")
    parser.add_argument("--workers", type=int, default=1, help="Trainings at once on the device.")
    parser.add_argument("--threads", type=int, default=max((os.cpu_count() or 1) // 2, 1))
    parser.add_argument("--out", default=str(RESULTS), help="Folder of the JSON files.")
    options = parser.parse_args()
    if options.action in ("prepare", "run"):
        {"prepare": prepare, "run": run}[options.action](options)
        return
    for path in sorted(Path(options.out).glob("accuracy-*.json")):
        if options.action == "table":
            print(table(Store(path)) + "\n")
        elif path.name == "accuracy-full-test.json":
            figure(Store(path), FIGURE)
            print(f"wrote {FIGURE}")


if __name__ == "__main__":
    main()
