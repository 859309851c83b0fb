"""Two processes of one test, forked from it: nothing is imported twice, none outlives it."""

import os
import pickle
import socket
import time
import traceback

import pytest
import torch
from torch.multiprocessing import get_context

WAIT = 90  # seconds for all processes of one call
two_processes = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_ranks(function, folder, *args, world=2):
    """What `function(*args)` returns on each rank, started as torchrun would.

    Raises:
        RuntimeError: The first failure, with its traceback; the other processes are ended.
    """
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses CUDA cannot be forked")
    port, context = free_port(), get_context("fork")
    paths = [folder / f"result{rank}-{port}.pkl" for rank in range(world)]
    workers = [
        context.Process(target=_work, args=(rank, world, port, paths[rank], function, args))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + WAIT
    try:
        while any(w.is_alive() for w in workers) and time.monotonic() < end:
            if any(w.exitcode for w in workers):
                end = min(end, time.monotonic() + 10)  # the others may have an error of their own
            time.sleep(0.02)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    results = [pickle.loads(p.read_bytes()) if p.exists() else (False, "no result") for p in paths]
    failures = [f"rank {rank}: {value}" for rank, (ok, value) in enumerate(results) if not ok]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [value for _, value in results]


def _work(rank, world, port, path, function, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    code = 0
    try:
        result = (True, function(*args))
    except BaseException:
        result, code = (False, traceback.format_exc()), 1
    path.write_bytes(pickle.dumps(result))
    os._exit(code)
