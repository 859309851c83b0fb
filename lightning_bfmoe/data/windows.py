"""Windows of a token sequence as torch datasets: random ones to train, consecutive ones to judge.

An item is ``(inputs, targets)``, both int64 ``[context]``; targets are the inputs one step later.
"""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_bfmoe.errors import BFMoEError


class SequentialWindows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows that do not overlap; every target is predicted exactly once.

    The last, incomplete window is dropped.

    Args:
        tokens: int64 ``[n]``, n > context.
        context: Tokens in a window.

    Example:
        >>> windows = SequentialWindows(torch.arange(9), context=4)
        >>> [x.tolist() for x, _ in windows], windows[1][1].tolist()
        ([[0, 1, 2, 3], [4, 5, 6, 7]], [5, 6, 7, 8])
    """

    def __init__(self, tokens: Tensor, context: int) -> None:
        _check(tokens, context)
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.context
        return _window(self.tokens, start, self.context)


class RandomWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows at places drawn once from an own generator: the same seed is the same training.

    Args:
        tokens: int64 ``[n]``, n > context.
        context: Tokens in a window.
        num_windows: How many windows an epoch has.
        seed: Seed of the places; the global random state is not touched.

    Example:
        >>> len(RandomWindows(torch.arange(100), context=8, num_windows=5))
        5
    """

    def __init__(self, tokens: Tensor, context: int, num_windows: int, seed: int = 0) -> None:
        _check(tokens, context)
        self.tokens, self.context = tokens, context
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(tokens) - context, (num_windows,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return _window(self.tokens, int(self.starts[index]), self.context)


def _window(tokens: Tensor, start: int, context: int) -> tuple[Tensor, Tensor]:
    return tokens[start : start + context], tokens[start + 1 : start + context + 1]


def _check(tokens: Tensor, context: int) -> None:
    if tokens.dim() != 1 or context < 1 or len(tokens) <= context:
        raise BFMoEError(
            "windows need a 1-D token tensor longer than the context, and a context of at least 1",
            got=f"tokens of shape {tuple(tokens.shape)}, context={context}",
            fix="Use a longer text or a shorter context.",
        )
