"""A Trainer's training data, read before the training and without moving it."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_leaves

from lightning_bfmoe.errors import CalibrationError


def train_data(trainer: pl.Trainer) -> Iterable[Any]:
    """Batches of a Trainer's training data, as `training_step` gets them; can be read repeatedly.

    A loader of its own: what the training reads later, and from where, does not change.

    Raises:
        CalibrationError: There is none, or it is an iterator that could be read once only.
    """
    loader = trainer.fit_loop._data_source.dataloader()
    if loader is None or _is_iterator(loader):
        raise CalibrationError(
            "training data that calibrates can be read again from its start",
            got="no training data"
            if loader is None
            else f"a {type(loader).__name__}, which gives each batch once",
            fix="Give fit a DataLoader or an iterable that starts anew; or call "
            "calibrated_swap(module, data) before fit.",
        )
    if isinstance(loader, CombinedLoader):
        return _Several(loader)
    leaves = tree_leaves(loader, is_leaf=lambda x: not isinstance(x, dict | list | tuple))
    plain = len(leaves) == 1 and leaves[0] is loader
    return loader if plain else _Several(CombinedLoader(loader, "max_size_cycle"))


def _is_iterator(data: object) -> bool:
    """Whether data is an iterator; asked without starting a loader's workers."""
    return hasattr(data, "__next__") and hasattr(data, "__iter__")


class _Several:
    """A `CombinedLoader` that yields batches alone."""

    def __init__(self, loader: CombinedLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch, _, _ in self.loader:
            yield batch


@contextlib.contextmanager
def from_here(data: Any) -> Iterator[Iterable[Any]]:
    """Loaders that remember their position start each pass where they are now, and end there."""
    loaders = data.loader.flattened if isinstance(data, _Several) else [data]
    before = [
        (loader, copy.deepcopy(loader.state_dict()))
        for loader in loaders
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    ]
    try:
        yield _Again(data, before) if before else data
    finally:
        for loader, position in before:
            loader.load_state_dict(position)


class _Again:
    """Every pass from one position."""

    def __init__(self, data: Any, before: list[tuple[Any, Any]]) -> None:
        self.data, self.before = data, before

    def __iter__(self) -> Iterator[Any]:
        for loader, position in self.before:
            loader.load_state_dict(copy.deepcopy(position))
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)
