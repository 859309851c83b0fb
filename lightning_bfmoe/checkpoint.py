"""`load_from_checkpoint`: Lightning's own, for modules whose blocks a callback has swapped.

Lightning's runs no callbacks, so it builds the dense model and finds its weights missing. What was
swapped, and how, stands in the checkpoint's state_dict (`layers.state`), with `save_weights_only`
too; the swap is repeated between the building and the loading.
"""

import contextlib
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_bfmoe.errors import BFMoEError, CheckpointError, SwapError
from lightning_bfmoe.layers.surgery import find_slot
from lightning_bfmoe.swap import apply_swap_plan, plan_from_state_dict

Module = TypeVar("Module", bound=pl.LightningModule)

_ONE_AT_A_TIME = threading.RLock()


def load_from_checkpoint(
    cls: type[Module],
    path: str | os.PathLike[str],
    *,
    setup_stage: str = "predict",
    weights_only: bool = True,
    **kwargs: Any,
) -> Module:
    """Load a module whose feed-forward blocks were swapped, without a Trainer.

    ``cls.load_from_checkpoint`` builds the module and loads all weights; in between the layers are
    put in as the checkpoint says. Lambda is that of the saved step.

    Example:
        >>> load_from_checkpoint(pl.LightningModule, "last.ckpt")
        Traceback (most recent call last):
            ...
        FileNotFoundError: [Errno 2] No such file or directory: ...last.ckpt'

    Args:
        cls: The LightningModule class.
        path: Checkpoint of a Trainer, of LightningCLI, or saved with `save_weights_only=True`.
        setup_stage: Stage given to the module's own `setup`, which is called only when the blocks
            are not there without it.
        weights_only: Whether the file may hold plain data only; False runs the code in its pickle.
        **kwargs: As for ``cls.load_from_checkpoint``: map_location, strict, hparams_file, and
            arguments of the class.

    Raises:
        CheckpointError: The checkpoint is no such file, holds no swapped layers, or does not fit
            the module.
        FileNotFoundError: There is no file.
    """
    path = os.fspath(path)
    checkpoint = _read(path, weights_only)
    plan = _read_plan(checkpoint["state_dict"], path, cls)
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        kinds: set[type[pl.LightningModule]] = {cls, _written_class(cls, checkpoint)}
        for kind in kinds:
            stack.enter_context(_before_loading(kind, lambda m: _prepare(m, plan, setup_stage)))
        try:
            return cls.load_from_checkpoint(path, weights_only=weights_only, **kwargs)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):
                raise
            raise _unfit(cls, str(error)) from error
        except SwapError as error:
            raise _unfit(cls, str(error)) from error


def _read(path: str, weights_only: bool) -> Mapping[str, Any]:
    """The checkpoint, its tensors left on the disk where that is possible."""
    try:
        checkpoint = _load_lazily(path, weights_only)
    except OSError:
        raise
    except Exception as error:  # a foreign file may raise anything
        text = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            "a checkpoint is a file that torch.load reads",
            got=f"{Path(path).name!r}: {type(error).__name__}: {text}",
            fix="A packed file is read by lightning_bfmoe.load_packed; a file that you trust and "
            "that holds more than plain data, with weights_only=False.",
        ) from error
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        keys = sorted(map(str, checkpoint))[:8] if isinstance(checkpoint, Mapping) else []
        raise CheckpointError(
            "a checkpoint of a Trainer has a state_dict",
            got=f"{Path(path).name!r}, a {type(checkpoint).__name__} with the keys {keys}",
            fix="Save it with Trainer.save_checkpoint or ModelCheckpoint.",
        )
    return checkpoint


def _load_lazily(path: str, weights_only: bool) -> Any:
    if zipfile.is_zipfile(path):  # a local file in torch's present format
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    return _load(path, map_location="cpu", weights_only=weights_only)  # type: ignore[arg-type]


def _read_plan(state: Mapping[str, Any], path: str, cls: type) -> dict[str, Any]:
    try:
        plan = plan_from_state_dict(state)
    except BFMoEError as error:
        raise CheckpointError(
            "the swap written in a checkpoint is well formed",
            got=str(error),
            fix="The file is damaged, or another version of the library wrote it.",
        ) from error
    if not plan["replacements"]:
        raise CheckpointError(
            "a checkpoint that is loaded here holds swapped ButterflyMoE layers",
            got=f"none in {Path(path).name!r}",
            fix=f"Use {cls.__name__}.load_from_checkpoint(path).",
        )
    return plan


def _written_class(cls: type[Module], checkpoint: Mapping[str, Any]) -> type[pl.LightningModule]:
    """The subclass that Lightning may build instead: LightningCLI writes it into a checkpoint."""
    written = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    class_path = written.get("_class_path") if isinstance(written, Mapping) else None
    place, _, name = str(class_path or "").rpartition(".")
    built = getattr(sys.modules.get(place), name, None)
    return built if isinstance(built, type) and issubclass(built, cls) else cls


@contextlib.contextmanager
def _before_loading(
    cls: type[pl.LightningModule], prepare: Callable[[pl.LightningModule], None]
) -> Iterator[None]:
    """Call `prepare` on a module of `cls` when it is built and its weights are still to come."""
    original, own = cls.on_load_checkpoint, "on_load_checkpoint" in vars(cls)

    def on_load_checkpoint(self: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        prepare(self)
        original(self, checkpoint)

    cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if own:
            cls.on_load_checkpoint = original  # type: ignore[method-assign]
        else:
            del cls.on_load_checkpoint  # type: ignore[misc]


def _prepare(module: pl.LightningModule, plan: Mapping[str, Any], setup_stage: str) -> None:
    paths = [entry["path"] for entry in plan["replacements"]]
    if not all(_exists(module, path) for path in paths) and is_overridden(
        "setup", module, pl.LightningModule
    ):
        module.setup(setup_stage)
    apply_swap_plan(module, plan)


def _exists(module: pl.LightningModule, path: str) -> bool:
    try:
        find_slot(module, path)
    except SwapError:
        return False
    return True


def _unfit(cls: type, got: str) -> CheckpointError:
    return CheckpointError(
        "a checkpoint fits a module that is built like the one that wrote it",
        got=got,
        fix=f"Pass the arguments that {cls.__name__} had then (or call save_hyperparameters() in "
        "its __init__); a module that builds its layers in setup may need another setup_stage.",
    )
