"""A progress bar over batches and blocks, or none."""

from types import TracebackType
from typing import Any


class Progress:
    """Shows how many batches were run and blocks fitted.

    Example:
        >>> with Progress(False, 10, 2) as progress:
        ...     progress.batch()

    Args:
        shown: Whether anything is drawn; also nothing where there is no terminal or notebook.
        batches: Batches in all passes; 0 when unknown.
        blocks: Blocks to fit.
    """

    def __init__(self, shown: bool, batches: int, blocks: int) -> None:
        self.bar: Any = None
        if shown:
            from rich import progress as rich

            self.bar = rich.Progress(
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(),
            )
            self.batches = self.bar.add_task("calibration: batches", total=batches or None)
            self.blocks = self.bar.add_task("calibration: blocks", total=blocks)

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def batch(self) -> None:
        """One batch was run."""
        if self.bar is not None:
            self.bar.advance(self.batches)

    def block(self) -> None:
        """One block was fitted."""
        if self.bar is not None:
            self.bar.advance(self.blocks)
