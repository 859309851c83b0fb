"""Finished runs as one JSON file: `about` (setting, device, versions, commit) and `runs` by key."""

import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


class Store:
    """The records of one size and split, kept on disk after each run.

    Args:
        path: The JSON file; read when it is there.
        about: What holds for all runs.

    Raises:
        ValueError: The file was made with another device, data or size.
    """

    def __init__(self, path: Path, about: Record | None = None) -> None:
        self.path = path
        found = (
            json.loads(path.read_text()) if path.exists() else {"about": about or {}, "runs": {}}
        )
        self.about: Record = found["about"]
        self.runs: dict[str, Record] = found["runs"]
        fixed = ("size", "steps", "judge_split", "device", "data")
        changed = [k for k in fixed if about and self.about.get(k) != about.get(k)]
        if changed:
            raise ValueError(
                f"{path.name} was recorded with another {', '.join(changed)}; use --out"
            )

    def add(self, key: str, record: Record) -> None:
        """Keep a record, on disk at once."""
        self.runs[key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"about": self.about, "runs": self.runs}, indent=1) + "\n")
        partial.replace(self.path)

    def groups(self) -> Iterator[tuple[str, str, list[Record]]]:
        """(training, name, records of all seeds), in the order of the file."""
        groups: dict[tuple[str, str], list[Record]] = {}
        for key, record in self.runs.items():
            mode, name, _ = key.split(" | ")
            groups.setdefault((mode, name), []).append(record)
        for (mode, name), records in groups.items():
            yield mode, name, records


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation over seeds where there are several."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def about(size: str, settings: Record, judge: str, origin: Record) -> Record:
    """What a reader needs to know of all runs of a file."""
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    )  # a copy of the tree elsewhere has no git: set COMMIT there
    return {
        "size": size, **settings, "judge_split": judge,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__, "commit": commit, "data": origin,
    }  # fmt: skip


def table(store: Store) -> str:
    """Mean and spread over seeds, as Markdown."""
    lines = [
        f"{store.path.name}: {store.about['device']}, {store.about['steps']} steps, "
        f"{store.about['judge_split']} split",
        "",
        "| training | feed-forward | loss | seeds | MB / layer | load max / mean |",
        "|---|---|---|---|---|---|",
    ]
    for mode, name, records in store.groups():
        loss, spread = mean_and_spread([r["loss"] for r in records])
        loads = [r["load_max_over_mean"] for r in records if r["load_max_over_mean"]]
        lines.append(
            f"| {mode} | {name} | {loss:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
            + f" | {len(records)} | {records[0]['ffn_bytes_per_layer'] / 1e6:.3f} | "
            + (f"{max(loads):.2f} |" if loads else "|")
        )  # fmt: skip
    return "\n".join(lines)


def figure(store: Store, path: Path, mode: str = "scratch") -> None:
    """Loss against bytes of a feed-forward layer; bars are one standard deviation over seeds.

    Left out are rotations that are never learned, 4-bit activations and the paper's preset, which
    would squeeze the rest; the table has them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {  # Okabe-Ito colours as in examples/report.py, distinct in shape too
        "butterfly": ("#009E73", "o", "ButterflyMoE"),
        "ternary standard": ("#CC79A7", "s", "standard MoE, ternary experts"),
        "standard": ("#0072B2", "D", "standard MoE, fp32"),
        "ternary dense": ("#E69F00", "^", "ternary dense"),
        "dense": ("#000000", "v", "dense fp32"),
    }
    axes = plt.figure(figsize=(8.5, 5.5), layout="constrained").subplots()
    seen, notes = set(), []
    for each, name, records in store.groups():
        kind = next((k for k in kinds if name.startswith(k)), None)
        if each != mode or kind is None or "frozen" in name or "int4" in name:
            continue
        colour, marker, label = kinds[kind]
        loss, spread = mean_and_spread([r["loss"] for r in records])
        size = records[0]["ffn_bytes_per_layer"] / 1e6
        axes.errorbar(
            size, loss, yerr=spread, color=colour, marker=marker, markersize=8, capsize=3,
            ls="none", label=None if kind in seen else label,
        )  # fmt: skip
        note = name.removeprefix(kind).strip(" ,").replace("bytes of butterfly 8", "wider")
        notes.append(("ternary" in kind, size, loss, note))
        seen.add(kind)
    axes.set(xscale="log", xlabel="bytes of one feed-forward layer (MB)",
             ylabel=f"{store.about['judge_split']} loss (nats per byte)")  # fmt: skip
    axes.margins(x=0.12)
    _write_beside(axes, notes)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=120)
    plt.close(axes.figure)


def _write_beside(axes: Any, notes: list[tuple[bool, float, float, str]]) -> None:
    """Labels left or right of their points, pushed apart where points of one side are near."""
    bottom, top = axes.get_ylim()
    gap = 0.028 * (top - bottom)
    for left in (True, False):
        placed: list[tuple[float, float]] = []
        for _, size, loss, text in sorted(n for n in notes if n[0] == left):
            level = loss
            while any(0.5 < size / x < 2 and abs(level - y) < gap for x, y in placed):
                level += 0.1 * gap
            placed.append((size, level))
            axes.annotate(
                text, (size, level), xytext=(-9 if left else 9, 0), textcoords="offset points",
                ha="right" if left else "left", va="center", fontsize=8,
            )  # fmt: skip
