"""Which forward passes count: those that are trained on, each once."""

import sys
from types import FrameType

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

_CHECKPOINT = torch.utils.checkpoint.__file__


def is_counted(module: nn.Module) -> bool:
    """Whether the present forward pass of a module is one to train on, and none that repeats one.

    Evaluation and passes under `no_grad` (an averaged teacher, a metric in the training step) do
    not count. Activation checkpointing runs each pass twice and counts once: the reentrant kind
    first runs without gradients, the other repeats a pass that has counted.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     inside = is_counted(layer)
        >>> is_counted(layer), inside, is_counted(layer.eval())
        (True, False, False)

    Source: ours.
    """
    if not (module.training and torch.is_grad_enabled()):
        return False
    return torch.compiler.is_compiling() or not is_recomputing()


def is_recomputing() -> bool:
    """Whether non-reentrant activation checkpointing repeats a forward pass right now.

    Called while a graph is compiled it cannot know; `count_load` asks when the graph runs.

    Source: `torch.utils.checkpoint`, whose function `recompute_fn` does the repeating.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward pass runs
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "recompute_fn" and code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def count_load(total: Tensor, load: Tensor) -> None:
    """Add the load of a pass that `is_counted` to a total, in place.

    In a compiled graph the question whether this is a repetition is asked when the graph runs.

    Args:
        total: (experts,) int64.
        load: (experts,) int64.
    """
    if torch.compiler.is_compiling():
        _count_load(total, load)
    else:
        total.add_(load)


@torch.library.custom_op("lightning_bfmoe::count_load", mutates_args=("total",))
def _count_load(total: Tensor, load: Tensor) -> None:
    if not is_recomputing():
        total.add_(load)


@_count_load.register_fake
def _(total: Tensor, load: Tensor) -> None:
    return None
