"""Running a foreign block without leaving a trace: no hooks, no state, no random numbers moved."""

import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@contextlib.contextmanager
def keep_rng() -> Iterator[None]:
    """Leaves the global generators of torch (CPU, CUDA), numpy and Python as they were.

    Example:
        >>> before = torch.random.get_rng_state()
        >>> with keep_rng():
        ...     drawn = torch.rand(3)
        >>> torch.equal(before, torch.random.get_rng_state())
        True
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def quiet(module: nn.Module, training: bool = False) -> Iterator[None]:
    """Runs code on `module` with hooks off and puts everything back afterwards.

    Attributes, buffers (values too) and training flags of all submodules are restored, also after
    an exception, and no gradient is recorded.

    Args:
        module: The block that is going to be called.
        training: The mode it is called in.
    """
    parts = list(module.modules())
    saved = [
        (part, dict(part.__dict__), [dict(part.__dict__[name]) for name in _STORES])
        for part in parts
    ]
    buffers = [b for b in module.buffers() if type(b) is Tensor and not b.is_meta]
    values = [(b, b.detach().clone()) for b in buffers]
    for part in parts:
        part.__dict__["training"] = training
        for name in _HOOKS:
            part.__dict__[name] = OrderedDict()
    try:
        with keep_rng(), torch.no_grad(), _no_autocast():
            yield
    finally:
        for part, attributes, stores in saved:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            for name, store in zip(_STORES, stores, strict=True):
                part.__dict__[name].clear()
                part.__dict__[name].update(store)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


_STORES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Builds tensors in float32 on the CPU unless told otherwise, whatever the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


class DropoutRecorder(TorchFunctionMode):
    """Turns every dropout into the identity and writes down what it was applied to, and with p.

    Example:
        >>> with DropoutRecorder() as dropouts:
        ...     y = nn.Dropout(0.3)(torch.ones(2))
        >>> [(p, tensor.tolist()) for p, tensor in dropouts.seen], y.tolist()
        ([(0.3, [1.0, 1.0])], [1.0, 1.0])
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, Tensor]] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DROPOUTS:
            return func(*args, **kwargs)
        names = ("input", "p", "training")
        given = dict(zip(names, args, strict=False)) | kwargs
        p = float(given.get("p", 0.5))
        if given.get("training", given.get("train", True)) and p > 0:
            self.seen.append((p, given["input"].detach().clone()))
        return given["input"]


_DROPOUTS = {
    F.dropout,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    torch.dropout,
    torch.dropout_,
    torch.feature_dropout,
    torch.alpha_dropout,
}
