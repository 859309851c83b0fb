"""What `benchmarks/deploy.py` says beside its figures: the machine, medians of rounds, a table."""

import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def facts(device: str) -> dict:
    """The machine and the versions."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "device": device, "name": name, "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit,
    }  # fmt: skip


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (found or [platform.processor()])[0]


def medians(records: list[dict]) -> list[dict]:
    """A record for each form and number of threads: the median of each figure over the rounds."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for record in records:
        groups.setdefault((record["form"], record["threads"]), []).append(record)
    found = []
    for rows in groups.values():
        good = [row for row in rows if "failed" not in row] or rows[:1]
        numbers = [k for k, v in good[0].items() if isinstance(v, float) or k.endswith("bytes")]
        middle = {k: statistics.median(row[k] for row in good) for k in numbers}
        found.append({**good[0], **middle, "rounds": len(good)})
    return found


def table(records: list[dict]) -> str:
    """A line a record."""
    head = f"{'':30} thr   file MB   load s  resident MB   prefill/s  decode/s  decode x8/s"
    lines = [head]
    for r in records:
        start = f"{r['form']:30} {r['threads']:3} "
        if "failed" in r:
            lines.append(f"{start} {r['failed'][:70]}")
            continue
        cells = (
            r["file_bytes"] / 1e6, r.get("load_seconds", float("nan")), r["resident_bytes"] / 1e6,
            r["prefill_1"], r["decode_1"], r["decode_8"],
        )  # fmt: skip
        lines.append(start + "{:9.1f} {:8.2f} {:12.1f} {:11.0f} {:9.1f} {:12.1f}".format(*cells))
    return "\n".join(lines)
