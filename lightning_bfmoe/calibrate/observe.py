"""Watching the inputs of modules during forward passes that leave no trace in the model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.calibrate.batches import (
    ForwardFn,
    MaskFn,
    attention_mask,
    run_batch,
    select_tokens,
    to_device,
)
from lightning_bfmoe.errors import CalibrationError

Watcher = Callable[[Tensor, bool], None]
"""Takes rows (tokens, d) of one call, and whether they are held out."""


class _EnoughSeenError(BaseException):
    """Ends a forward pass behind the last watched module; no `except Exception` swallows it."""


def observe(
    model: nn.Module,
    batches: Iterable[tuple[Any, bool]],
    watchers: Mapping[str, Watcher],
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    on_batch: Callable[[], Any] | None = None,
) -> list[str]:
    """Runs the model over the batches in eval mode and shows each watcher its module's inputs.

    A pass ends as soon as the watched modules have been called as often as in the first batch.
    Afterwards hooks are gone and training flags are as they were, whatever happened.

    Args:
        model: Any module.
        batches: What it is fed: batches, each with whether it is held out.
        watchers: By the path of the module whose first input they take.
        forward_fn: ``(model, batch)``, runs one batch; `batches.call_model` when None.
        mask_fn: Mask of the tokens of a batch that count; `batches.attention_mask` when None.
        on_batch: Called after each batch, for a progress bar.

    Returns:
        The watched paths in the order of their first call.

    Raises:
        CalibrationError: The model does not take a batch, a mask does not fit, or a watched module
            was never called.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    session = _Session(dict(watchers))
    with evaluating(model), _hooked(model, session), torch.no_grad():
        for batch, held in batches:
            batch = to_device(batch, device)
            session.begin(held, (mask_fn or attention_mask)(batch))
            with contextlib.suppress(_EnoughSeenError):
                run_batch(model, batch, forward_fn)
            session.end()
            if on_batch is not None:
                on_batch()
    silent = sorted(set(watchers) - set(session.seen))
    if silent:
        raise CalibrationError(
            "every block that is calibrated takes part in the forward pass",
            got=f"no token at {', '.join(map(repr, silent[:3]))}"
            + (f" and {len(silent) - 3} more" if len(silent) > 3 else ""),
            fix="Leave it alone with exclude=, or give a forward_fn that runs it "
            "(and no compiled model: hooks do not fire inside a graph).",
        )
    return list(session.seen)


class _Session:
    """What one pass knows: the batch's mask, who was called, when enough was seen."""

    def __init__(self, watchers: dict[str, Watcher]) -> None:
        self.watchers = watchers
        self.seen: dict[str, None] = {}  # in the order of the first call
        self.held = False
        self.mask: Tensor | None = None
        self.calls, self.enough = 0, 0

    def begin(self, held: bool, mask: Tensor | None) -> None:
        self.held, self.mask, self.calls = held, mask, 0

    def end(self) -> None:
        if set(self.seen) == set(self.watchers):
            self.enough = self.enough or self.calls

    def take(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None:
            raise CalibrationError(
                "a block takes a tensor of tokens",
                got=f"no tensor in the call of {name!r}",
                fix="Leave it alone with exclude=.",
            )
        rows = select_tokens(x.detach(), self.mask, name)
        if len(rows):
            self.watchers[name](rows, self.held)
            self.seen[name] = None
        self.calls += 1
        if self.enough and self.calls >= self.enough:
            raise _EnoughSeenError


@contextlib.contextmanager
def _hooked(model: nn.Module, session: _Session) -> Iterator[None]:
    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            session.take(name, args, kwargs)

        return hook

    with contextlib.ExitStack() as stack:
        for name in session.watchers:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own flag comes back.

    torch's encoders run no fused path meanwhile: in it no module is called, and padded batches
    become nested tensors.
    """
    flags = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in flags:
            module.training = training
