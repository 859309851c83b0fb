"""Running a function on two gloo processes of this machine."""

import pickle
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing


def run_on_two_ranks(function):
    """[function(0), function(1)], each run with a process group of two."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _work, (function, folder, list(sys.path)), nprocs=2, start_method="fork"
        )
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in (0, 1)]


def _work(rank, function, folder, path):
    sys.path[:] = path
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(rank)))
    torch.distributed.destroy_process_group()
