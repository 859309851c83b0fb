"""How many CPU threads a small model should use: measured, because it depends on the neighbours."""

import time

import torch
from torch import nn


def seconds_per_pass(threads: int, passes: int = 8) -> float:
    """Median seconds of a small forward and backward pass with so many threads."""
    torch.set_num_threads(threads)
    model = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))
    rows = torch.ones(512, 128)
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        model(rows).sum().backward()
        times.append(time.perf_counter() - start)
    return sorted(times)[passes // 2]


def choose_threads() -> int:
    """Set and return the fastest of one thread and torch's own number, measured in turns.

    A small model gains little from more threads, and on a shared machine they cost much.
    """
    most = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        rounds = [{n: seconds_per_pass(n) for n in {1, most}} for _ in range(5)]
    # more threads must win the worst round too, as one bad minute costs more than they gain
    worst = {n: max(times[n] for times in rounds) for n in rounds[0]}
    torch.set_num_threads(min(worst, key=lambda n: worst[n]))
    return torch.get_num_threads()
