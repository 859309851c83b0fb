"""One output that is drawn anew: a PNG in a notebook, lines of text elsewhere; and how often."""

import base64
import sys
import time
from collections.abc import Callable
from typing import Any


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter, Colab, VS Code)."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return getattr(shell, "kernel", None) is not None


class LiveOutput:
    """Shows a picture and replaces it; the last one stays in the saved notebook.

    Without a notebook it prints the line of text that stands for the picture.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, draw: Callable[[], bytes], words: str) -> None:
        """Show or replace.

        Args:
            draw: Makes the PNG; not called where nobody could see it.
            words: What the picture says, for those who cannot see it.
        """
        if not in_notebook():
            print(words, flush=True)
            return
        from IPython.display import display

        bundle = {"image/png": base64.b64encode(draw()).decode(), "text/plain": words}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def __getstate__(self) -> dict[str, Any]:
        """Begin a new output in a copy."""
        return {"_handle": None}


class Throttle:
    """Says when to do something again, so that it takes at most a share of the time.

    Example:
        >>> throttle = Throttle(budget=0.01, at_least=2.0)
        >>> throttle.is_due(now=100.0)
        True
        >>> throttle.spent(began=100.0, ended=100.1)
        >>> throttle.is_due(now=105.0), throttle.is_due(now=110.2)
        (False, True)

    Args:
        budget: Share of the time that it may take, in (0, 1].
        at_least: Seconds between two times, at least.
    """

    def __init__(self, budget: float, at_least: float) -> None:
        self.budget, self.at_least = budget, at_least
        self._next = -float("inf")

    def is_due(self, now: float | None = None) -> bool:
        """Whether it is time again."""
        return (time.monotonic() if now is None else now) >= self._next

    def spent(self, began: float, ended: float | None = None) -> None:
        """Take note of how long the last time took."""
        ended = time.monotonic() if ended is None else ended
        self._next = ended + max(self.at_least, (ended - began) / self.budget)
