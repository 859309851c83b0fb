"""The way out of a compiled graph. Imported while something is compiled, not before.

`torch.compiler.disable` imports `torch._dynamo`, 76 MB of resident memory that a deployed model
does without.
"""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call_eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in plain Python; a graph is compiled up to it, and from it on."""
    return function(*args)
