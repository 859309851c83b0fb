"""One language model as it is deployed, in every form: bytes, load time, memory, tokens a second.

    python benchmarks/deploy.py --size tiny --out outputs/deploy.json                    # seconds
    python benchmarks/deploy.py --threads 1 2 --out benchmarks/results/deploy_cpu.json   # minutes
    python benchmarks/deploy.py --device cuda --size full --out benchmarks/results/deploy_cuda.json

The model is `examples.gpt.GPT` with random weights (no time depends on them) and one of `FORMS` as
its feed-forward blocks. Each form is written to a file and measured in a process of its own:

* file bytes; seconds from the file to a model that answers; bytes that loading and generating add
  to the process (CPU: resident after, and at the peak; CUDA: allocated, and at the peak);
* prefill: a prompt of 128 tokens to its first new token; decode: each further token, end to end as
  `TokenGenerator` streams them (with the CUDA graph where there is one), for 1 and 8 prompts at
  once; medians.

First the logits with the cache are compared with those of the whole prefix, in the same process;
a form that is wrong is not timed. A form that cannot run here is a record with `failed`. What the
file at --out already holds is not measured again (`--rounds` takes all forms in turn
several times; a figure is the median then). The standard MoE has the same top-k, and its
"ternary" form the same trits a matrix as ours, in every expert; the dense model is as wide as a
single expert, so it computes less than the others. Where every expert in full takes more than
2 GiB (--size full) the file is counted instead of written, and the model made on the device:
`file_written` and `load_seconds` say so.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import benchmarks.bare  # noqa: F401  before examples
from benchmarks.deploy_forms import FORMS, SIZES, is_huge, make, read, write
from benchmarks.deploy_report import facts, medians, table
from examples.gpt import GPT
from lightning_bfmoe.deploy import KVCache, Sampling, TokenGenerator

ROOT = Path(__file__).resolve().parents[1]
PROMPT, BATCHES = 128, (1, 8)
COUNTED = Path("-")
LIMIT = 150  # seconds a form


def check(model: nn.Module, size: str, device: str) -> float:
    """Relative difference of the logits with a cache to those without, at the median place.

    In 16 bit a token whose second and third expert are nearly even may take the other one.
    """
    vocabulary = SIZES[size][5]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, 24), generator=generator).to(device)
    cache = KVCache(2, 24, device)
    with torch.no_grad():
        whole, parts = model(ids).double(), []
        for first, stop in ((0, 17), (17, 18), (18, 24)):
            cache.begin(stop - first, stop)
            parts.append(model(ids[:, first:stop], cache).double())
            cache.lengths.add_(stop - first)
    difference = (torch.cat(parts, 1) - whole).norm(dim=-1) / whole.norm(dim=-1)
    error = float(difference.median())
    narrow = next(model.parameters()).dtype != torch.float32 or any(
        "Linear4bit" in type(m).__name__ for m in model.modules()
    )
    assert error < (5e-2 if narrow else 1e-4), f"wrong by {error}"
    return error


def pace(generator: TokenGenerator, vocabulary: int, batch: int, new: int) -> tuple[float, float]:
    """Seconds of the prefill and of a decode step, medians."""
    prompts = torch.randint(vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    first, steps = [], []
    for repeat in range(4):
        start = time.perf_counter()
        for number, _ in enumerate(generator.stream(list(prompts), Sampling(new, temperature=0))):
            now = time.perf_counter()
            if repeat > 0:  # the first round warms up and captures
                (steps if number else first).append(now - start)
            start = now
    return statistics.median(first), statistics.median(steps)


class Peak:
    """Most bytes of this process that are in memory while it is open (Linux)."""

    def __enter__(self) -> "Peak":
        self.bytes, self._open = resident(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, resident())
            time.sleep(0.002)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])


def check_onnx(model: Any, vocabulary: int) -> None:
    """As `check`, for a folder of onnxruntime: with a cache as without one."""
    import numpy as np

    ids = np.random.default_rng(0).integers(vocabulary, size=(2, 24))
    (whole, _), past, parts = model(ids), None, []
    for first, stop in ((0, 17), (17, 18), (18, 24)):
        logits, past = model(ids[:, first:stop], past)
        parts.append(logits)
    norm = np.linalg.norm
    error = norm(np.concatenate(parts, 1) - whole, axis=-1) / norm(whole, axis=-1)
    assert np.isfinite(whole).all() and np.median(error) < 1e-2, f"wrong by {np.median(error)}"


def onnx_pace(path: Path, threads: int, vocabulary: int, batch: int, new: int) -> tuple:
    """As `pace`, by onnxruntime alone."""
    import numpy as np

    from lightning_bfmoe.deploy.onnx_export.runner import OnnxModel

    model = OnnxModel(path, threads)
    check_onnx(model, vocabulary)
    ids = np.random.default_rng(1).integers(vocabulary, size=(batch, PROMPT))
    first, steps = [], []
    for repeat in range(4):
        fresh, past = ids, None
        for number in range(new):
            start = time.perf_counter()
            logits, past = model(fresh, past)
            fresh = logits[:, -1].argmax(-1)[:, None]
            if repeat > 0:
                (steps if number else first).append(time.perf_counter() - start)
    return statistics.median(first), statistics.median(steps)


def measure(size: str, name: str, path: Path, device: str, graph: bool, threads: int) -> dict:
    """One form, in this process; the path `COUNTED` makes the model instead of reading it."""
    torch.set_num_threads(threads)
    form, vocabulary, new = FORMS[name], SIZES[size][5], SIZES[size][7]
    cuda = device == "cuda"
    tiny = GPT(8, 8, 8, 1, 1).to(device)  # whatever is set up at the first use
    TokenGenerator(tiny).generate([[1]], Sampling(2))
    del tiny
    if form.get("onnx"):
        import onnxruntime  # noqa: F401  what the library takes is no part of a model
    gc.collect()
    before = torch.cuda.memory_allocated() if cuda else resident()
    record: dict[str, Any] = {}
    start = time.perf_counter()
    if form.get("onnx"):
        for batch in BATCHES:
            first, step = onnx_pace(path, threads, vocabulary, batch, new)
            record |= rates(batch, first, step)
            if batch == 1:  # one text, as on a small device; the prompt's peak is in it
                record["resident_bytes"] = resident() - before
        return record
    with Peak() as peak:
        if path == COUNTED:
            model, record["file_bytes"] = make(size, form, device)
            torch.cuda.synchronize()
        else:
            model = read(size, form, path, device)
        generator = TokenGenerator(model, cuda_graph=None if graph else False)
        generator.generate([[1, 2, 3]], Sampling(2, 0))
        record["cuda_graph"] = generator.decoding.graph
        if path != COUNTED:
            record["load_seconds"] = time.perf_counter() - start
        gc.collect()
        after = torch.cuda.memory_allocated() if cuda else resident()
        record["resident_bytes"] = after - before
        record["error"] = check(model, size, device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # that of the measurement, not of the making
        for batch in BATCHES:
            record |= rates(batch, *pace(generator, vocabulary, batch, new))
    most = torch.cuda.max_memory_allocated() if cuda else peak.bytes
    return record | {"peak_bytes": most - before}


def rates(batch: int, first: float, step: float) -> dict[str, float]:
    """Seconds as tokens a second."""
    rate = {"prefill": batch * PROMPT / first, "decode": batch / step}
    return {f"{what}_{batch}": value for what, value in rate.items()}


def child(size: str, name: str, path: Path, device: str, threads: int) -> dict:
    """The record of `measure` in a fresh process; what went wrong, else.

    A step that waits for the GPU cannot be captured (experts that are found on the host): it is
    measured without a graph then, in another fresh process, and the record says so.
    """
    for graph in ("graph", ""):
        arguments = [size, name, str(path), device, graph, str(threads)]
        command = [sys.executable, __file__, "--child", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {LIMIT} s"}
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if "CUDA graph" not in done.stderr:
            break
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"failed": (last or [f"exit status {done.returncode}"])[0][:300]}


def jobs(options: argparse.Namespace) -> Iterator[tuple[int, str, int]]:
    """Round, form and threads: all forms in turn, so that a busy minute slows more than one."""
    for number in range(options.rounds):
        for name in options.forms or FORMS:
            yield from ((number, name, threads) for threads in options.threads)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the file does not hold yet; its content."""
    out: Path = options.out
    content = json.loads(out.read_text()) if out.exists() else {"records": []}
    content.setdefault("facts", facts(options.device))
    content |= {"size": options.size, "sizes": SIZES[options.size], "note": options.note}
    done = {(r["form"], r["threads"], r.get("round", 0)) for r in content["records"]}
    end = time.monotonic() + options.limit
    with tempfile.TemporaryDirectory(prefix="bfmoe-") as folder:
        for number, name, threads in jobs(options):
            if (name, threads, number) in done:
                continue
            if time.monotonic() > end:
                print("the limit is reached; repeat the command for the rest", flush=True)
                break
            record: dict[str, Any] = {"form": name, "threads": threads, "round": number}
            content["records"].append(record | one(options, name, threads, Path(folder)))
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = out.with_suffix(".part")
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            temporary.replace(out)
            print(table(content["records"][-1:]).splitlines()[1], flush=True)
    return content


def one(options: argparse.Namespace, name: str, threads: int, folder: Path) -> dict[str, Any]:
    """One form's file, where it is not there yet, and its measurement."""
    form, path = FORMS[name], folder / f"model{list(FORMS).index(name)}"
    if options.device == "cuda" and form.get("onnx"):
        return {"failed": "onnxruntime runs on the CPU here"}
    huge = is_huge(options.size, form)
    if huge and options.device == "cpu":
        return {"failed": "gigabytes of experts in full; measured on a GPU"}
    record: dict[str, Any] = {"file_written": not huge}
    try:
        if not huge and not path.exists():
            write(options.size, form, path)
    except Exception as error:  # a library that is not there is a result too
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    if huge:
        path = COUNTED
    else:
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        record["file_bytes"] = sum(item.stat().st_size for item in files)
    return record | child(options.size, name, path, options.device, threads)


def main() -> None:
    """Measure, write, print."""
    if sys.argv[1:2] == ["--child"]:
        size, name, path, device, graph, threads = sys.argv[2:]
        print(json.dumps(measure(size, name, Path(path), device, bool(graph), int(threads))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), help="only these")
    parser.add_argument("--rounds", type=int, default=1, help="a figure is the median of them")
    parser.add_argument(
        "--limit", type=float, default=1e9, help="start nothing after these seconds"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "deploy.json")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    content = run(parser.parse_args())
    print(table(medians(content["records"])))


if __name__ == "__main__":
    main()
