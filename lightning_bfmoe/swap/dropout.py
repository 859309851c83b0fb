"""Where a block's dropouts stand: found by recording them, not by their names."""

from dataclasses import replace

from torch import Tensor, nn

from lightning_bfmoe.swap.blocks import FeedForward, NotFeedForwardError, relative_error, tolerance
from lightning_bfmoe.swap.quiet import DropoutRecorder, quiet


def find_dropout(block: nn.Module, parts: FeedForward, x: Tensor, wanted: Tensor) -> FeedForward:
    """Runs the block in training mode with recorded dropouts, and finds where each one stands.

    Raises:
        NotFeedForwardError: A dropout stands elsewhere, or training changes something else too.
    """
    with quiet(block, training=True), DropoutRecorder() as dropouts:
        try:
            y = block.forward(x.clone())
        except Exception as error:  # a foreign forward may raise anything
            raise NotFeedForwardError(f"in training mode it raises {error!r}") from error
    limit = tolerance(wanted.dtype)
    if not isinstance(y, Tensor) or relative_error(y, wanted) > limit:
        raise NotFeedForwardError("in training mode it changes by more than its dropout")
    with quiet(block):
        hidden = parts.hidden(x)
    keep = {"dropout": 1.0, "output_dropout": 1.0}
    for p, tensor in dropouts.seen:
        places = [("dropout", hidden), ("output_dropout", wanted)]
        place = next((name for name, at in places if relative_error(tensor, at) <= limit), None)
        if place is None:
            raise NotFeedForwardError(
                f"its dropout (p={p}) is neither on the hidden units nor on the output"
            )
        keep[place] *= 1 - p
    hidden_p, output_p = (round(1 - kept, 10) for kept in keep.values())
    return replace(parts, dropout=hidden_p, output_dropout=output_p)
