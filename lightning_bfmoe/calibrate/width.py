r"""Which hidden units of a feed-forward block matter: atomic scores.

A hidden unit k is an "atomic expert": row k of up and gate, column w_k of down. To second order the
loss rises without it by

.. math:: s_k = E[h_k^2]\; w_k^T M w_k ,\qquad M = E[g g^T]

with g the gradient of the loss by the block's output (empirical Fisher, hidden unit and gradient
taken as independent). Without a loss M is the identity, which leaves :math:`E[h_k^2] |w_k|^2`.

Units go before a block is rounded: behind a rotation a hidden unit is no row of the ternary matrix
any more. What is left is refitted by the recipe that rounds it (`refit`).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.calibrate.batches import MaskFn, attention_mask, select_tokens, to_device
from lightning_bfmoe.calibrate.observe import evaluating
from lightning_bfmoe.errors import CalibrationError, ConfigError

LossFn = Callable[[nn.Module, Any], Tensor]


def atomic_scores(energy: Tensor, down: Tensor, gradient: Tensor | None = None) -> Tensor:
    r"""s_k = E[h_k^2] w_k^T M w_k of every hidden unit, (d_ff,) in double.

    Example:
        >>> atomic_scores(torch.tensor([4.0, 1.0]), torch.tensor([[1.0, 3.0]])).tolist()
        [4.0, 9.0]

    Args:
        energy: E[h_k^2], (d_ff,).
        down: Output matrix with columns w_k, (d_out, d_ff).
        gradient: M = E[g g^T], (d_out, d_out); the identity when None.

    Source: HEAPr (arXiv 2509.22299), re-derived.
    """
    w = down.detach().double()
    moved = w if gradient is None else gradient.double() @ w
    return energy.double() * (w * moved).sum(dim=0)


def kept_units(scores: Tensor, width: int) -> Tensor:
    """The `width` units of the highest scores, in their old order, (width,) int64."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:width].sort().values


def resolve_width(width: int | float, d_ff: int, path: str) -> int:
    """Units to keep: a number, or a share of those that are there (at least 2).

    Raises:
        ConfigError: Out of range.
    """
    share = isinstance(width, float)
    kept = max(2, round(width * d_ff)) if share and 0 < width <= 1 else width
    if isinstance(width, bool) or not isinstance(kept, int) or not 2 <= kept <= d_ff:
        raise ConfigError(
            f"width is a number of hidden units from 2 to {d_ff}, or a share of them up to 1.0",
            got=f"width={width!r} at {path!r}",
            fix="Use width=0.75, or a power of two below it.",
        )
    return kept


class Energies:
    """Streamed E[h^2] of one block.

    Args:
        hidden: The block's hidden units as a function of rows.
        d_ff: Their number.
        device: Where the sum is kept.
    """

    def __init__(self, hidden: Callable[[Tensor], Tensor], d_ff: int, device: Any = None) -> None:
        self.hidden, self.count = hidden, 0
        self.sum = torch.zeros(d_ff, dtype=torch.float64, device=device)

    def watch(self, rows: Tensor, held: bool) -> None:
        """Take rows of the block's input that are not held out."""
        if held:
            return
        for part in rows.split(2048):
            self.sum += self.hidden(part).double().square().sum(dim=0)
        self.count += len(rows)

    def mean(self) -> Tensor:
        """E[h^2], (d_ff,)."""
        return self.sum / max(self.count, 1)


def gradient_moments(
    model: nn.Module,
    widths: dict[str, int],
    batches: Iterable[tuple[Any, bool]],
    loss_fn: LossFn,
    *,
    mask_fn: MaskFn | None = None,
    on_batch: Callable[[], Any] | None = None,
) -> dict[str, Tensor]:
    """M = E[g g^T] of each block's output, from one backward pass a batch; the model is unchanged.

    Args:
        model: Runs in eval mode; its parameters get no gradient.
        widths: Of the outputs, by the path of the module that is the block.
        batches: Each with whether it is held out; those are left out.
        loss_fn: ``(model, batch)`` to a scalar.
        mask_fn: As for a calibration.
        on_batch: Called after each batch.

    Returns:
        (d_out, d_out) in double, by path.

    Raises:
        CalibrationError: The loss is no scalar, does not depend on a block, or is not finite.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums = {p: torch.zeros(d, d, dtype=torch.float64, device=device) for p, d in widths.items()}
    counts = dict.fromkeys(widths, 0)
    mask: Tensor | None = None

    def take(path: str, gradient: Tensor) -> None:
        rows = select_tokens(gradient.detach(), mask, path).double()
        sums[path] += rows.T @ rows
        counts[path] += len(rows)

    with evaluating(model), _no_parameters(model), _hooked(model, widths, take):
        for batch, held in batches:
            if not held:
                batch = to_device(batch, device)
                mask = (mask_fn or attention_mask)(batch)
                with torch.enable_grad():
                    loss = loss_fn(model, batch)
                    _check_loss(loss)
                    loss.backward()
            if on_batch is not None:
                on_batch()
    silent = [path for path, count in counts.items() if not count]
    if silent:
        raise CalibrationError(
            "the loss depends on every block that is scored",
            got=f"no gradient at {silent[0]!r}",
            fix="Leave it alone with exclude=, or give another loss_fn.",
        )
    return {path: sums[path] / counts[path] for path in widths}


def _check_loss(loss: object) -> None:
    good = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
    if not good or not bool(torch.isfinite(loss.detach()).all()):  # type: ignore[attr-defined]
        raise CalibrationError(
            "loss_fn returns a finite scalar that depends on the model",
            got=f"{loss!r}"[:120],
            fix="Pass loss_fn=lambda model, batch: model(**batch).loss, or your own.",
        )


@contextlib.contextmanager
def _no_parameters(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; what did, does so again afterwards."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


@contextlib.contextmanager
def _hooked(
    model: nn.Module, paths: Iterable[str], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    def watch(path: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            if not output.requires_grad:  # the first block: the graph begins at its output
                output = output.detach().requires_grad_()
            output.register_hook(lambda gradient: take(path, gradient))
            return output

        return hook

    with contextlib.ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(watch(path))
            stack.callback(handle.remove)
        yield
