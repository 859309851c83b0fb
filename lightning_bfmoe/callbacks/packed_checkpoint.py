"""`PackedCheckpoint`: the best and the last model of a training as packed files, while it runs."""

import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_bfmoe.callbacks import guards
from lightning_bfmoe.callbacks.butterfly_moe import ButterflyMoECallback
from lightning_bfmoe.callbacks.ternary_schedule import TernarySchedule
from lightning_bfmoe.deploy import PackReport, check_choices, pack
from lightning_bfmoe.errors import CheckpointError, ConfigError
from lightning_bfmoe.layers import Substrate, moe_layers

_STATE_VERSION = 1


class PackedCheckpoint(pl.Callback):
    """Writes packed files during `fit`: ``model-best.bfmoe`` and ``model-last.bfmoe``.

    Beside a `ModelCheckpoint`, not instead of it: nobody can go on training from a packed file.
    It waits for lambda 1, when the model computes with its ternary matrices, and says so; values
    monitored before that do not count. Files are written by rank zero, whole or not at all; the
    training is the same, bit for bit, with and without it. Where a callback averages the weights,
    the average is packed, which is also what validation measures.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> packed = PackedCheckpoint(monitor="val_loss", angles="int8")
        >>> trainer = Trainer(callbacks=[packed], logger=False)

    Args:
        dirpath: Folder of the files, made when needed. None: ``packed`` in the logger's folder, or
            in `default_root_dir`.
        filename: What their names start with. A new training does not replace the files of an
            older one, it adds ``-v1``, ``-v2``, ...; a resumed one replaces its own.
        monitor: Logged value that says which model is best; None writes no best one.
        mode: Whether the best value is the smallest (`min`) or the largest (`max`).
        save_last: Write the newest model after every validation and at the end of the training.
            None: only when nothing is monitored.
        angles: See `pack`, as for all that follow.
        gains: Encoding of the gains.
        rest: `keep` or `bf16`.
        bits: Bits of a trit.
        finalize: Do not wait for lambda 1: pack what the layers are at lambda 1. Combine it with
            ``evaluate_ternary=True``, or the monitored value is that of another function.

    Raises:
        ConfigError: A setting is unknown; when fitting, no layer to pack, a monitored value that
            nobody logs, or two callbacks with one file.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "model",
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_last: bool | None = None,
        angles: Literal["fp16", "int8", "int4", "fp32"] = "fp16",
        gains: Literal["fp16", "int8", "fp32"] | None = None,
        rest: Literal["keep", "bf16"] = "keep",
        bits: Literal["1.6", "2"] = "1.6",
        finalize: bool = False,
    ) -> None:
        super().__init__()
        check_choices(angles, gains, rest, bits)
        self.save_last = monitor is None if save_last is None else save_last
        if mode not in ("min", "max") or (monitor is None and not self.save_last):
            raise ConfigError(
                "something is saved: the best by `monitor` and `mode` (min or max), or the last",
                got=f"monitor={monitor!r}, mode={mode!r}, save_last={save_last}",
                fix="Use monitor='val_loss', or save_last=True.",
            )
        if not filename or Path(filename).name != filename:
            raise ConfigError(
                "filename is a name without a folder", got=repr(filename), fix="Use dirpath=."
            )
        self.dirpath, self.filename, self.monitor, self.mode = dirpath, filename, monitor, mode
        self.encodings: dict[str, Any] = {
            "angles": angles, "gains": gains, "rest": rest, "bits": bits
        }  # fmt: skip
        self.finalize = finalize
        self.best_value: float | None = None
        """Value of the model in `best_path`."""
        self.report: PackReport | None = None
        """Sizes of the file that was written last."""
        self._folder: Path | None = None
        self._version = 0
        self._written = {"best": -1, "last": -1}  # global step of each file
        self._restored = self._told = self._validated = False
        self._place: str | None = None  # where the monitored value was seen first

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: by file name, so that settings may change."""
        return self._generate_state_key(filename=self.filename)

    @property
    def best_path(self) -> Path | None:
        """The best model's file; None before it is written."""
        return self._path("best") if self._written["best"] >= 0 else None

    @property
    def last_path(self) -> Path | None:
        """The newest model's file; None before it is written."""
        return self._path("last") if self._written["last"] >= 0 else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._folder = self._find_folder(trainer)
        others = [c for c in _callbacks(trainer) if isinstance(c, PackedCheckpoint)]
        if len({(c._find_folder(trainer), c.filename) for c in others}) < len(others):
            raise ConfigError(
                "every PackedCheckpoint has files of its own",
                got=f"{len(others)} with equal ones",
                fix="Give each another filename.",
            )
        if not list(moe_layers(pl_module)):
            raise ConfigError(
                "PackedCheckpoint packs ButterflyMoE layers",
                got=f"{type(pl_module).__name__} without one",
                fix="Add ButterflyMoECallback, or call swap_feed_forward in the module.",
            )
        kinds = {type(p).__name__ for p in pl_module.parameters() if type(p) is not nn.Parameter}
        kinds |= {type(p.data).__name__ for p in pl_module.parameters()} - {"Tensor"}
        if kinds:
            raise ConfigError(
                "PackedCheckpoint needs whole tensors on rank zero",
                got=f"parameters of type {', '.join(sorted(kinds))}",
                fix="Save a sharded model with ModelCheckpoint, and run `bfmoe pack`.",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._told = self._validated = False
        self._place = None
        if not self._restored:
            self.best_value, self._written, self._version = None, {"best": -1, "last": -1}, 0
            while any(self._path(kind).exists() for kind in self._written):
                self._version += 1
        elif self._written["best"] >= 0 and not self._path("best").exists():
            rank_zero_warn(f"{self._path('best')} is gone; the next model is the best one.")
            self.best_value, self._written["best"] = None, -1
        self._restored = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = True
            if self._found(trainer) is not None:
                self._place = self._place or "validation"
            self._save(trainer, pl_module, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._place == "validation":
            return
        known = trainer.callback_metrics
        if self.monitor is not None and self.monitor not in known:
            names = ", ".join(sorted(known)) or "nothing"
            if self._validated or not trainer.enable_validation:
                raise ConfigError(
                    "a monitored value is one that the module logs",
                    got=f"monitor={self.monitor!r}, logged: {names}",
                    fix=f"Call self.log({self.monitor!r}, ...) in validation_step.",
                )
        elif self.monitor is not None or not trainer.enable_validation:
            self._place = "training"
            self._save(trainer, pl_module, "training")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.save_last and self._is_ready(trainer, pl_module):
            self._write(trainer, pl_module, ["last"])
        if max(self._written.values()) < 0:
            rank_zero_warn(
                f"PackedCheckpoint wrote no file: at the end lambda was "
                f"{self._blend(trainer, pl_module):.3f}"
                + (f", {self.monitor!r} {self._found(trainer)}" if self.monitor else "")
                + ". Let the plan end earlier, or give finalize=True to pack what the layers of an "
                "unfinished training are at lambda 1."
            )

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, place: str) -> None:
        if trainer.fast_dev_run or not self._is_ready(trainer, module):  # type: ignore[attr-defined]
            return
        kinds = ["last"] if self.save_last else []
        found = self._found(trainer)
        if found is not None and self._place == place and self._is_better(found):
            self.best_value, kinds = found, ["best", *kinds]
        self._write(trainer, module, kinds)

    def _is_ready(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Whether the layers are ternary, or are packed as if they were; else says so, once."""
        blend = self._blend(trainer, module)
        if blend < 1 and not self._told:
            self._told = True
            if not self.finalize:
                rank_zero_info(
                    f"PackedCheckpoint waits: lambda is {blend:.3f}, and a packed file holds what "
                    "the model computes at lambda 1."
                )
            elif self.monitor and not any(s.evaluate_ternary for s in _schedules(trainer)):
                rank_zero_warn(
                    f"PackedCheckpoint(finalize=True) packs at lambda {blend:.3f} what the layers "
                    f"are at lambda 1, but {self.monitor!r} was measured at {blend:.3f}: with "
                    "ButterflyMoECallback(evaluate_ternary=True) both are the same function."
                )
        return blend >= 1 or self.finalize

    def _blend(self, trainer: pl.Trainer, module: pl.LightningModule) -> float:
        """Lambda of the training: `evaluate_ternary` lends the layers another in validation."""
        planned = [s.now.blend for s in _schedules(trainer) if s.clock.total is not None]
        live = [float(m.blend) for m in module.modules() if isinstance(m, Substrate)]
        return min([*planned, *live, 1.0])

    def _found(self, trainer: pl.Trainer) -> float | None:
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        return None if value is None else float(value)

    def _is_better(self, value: float) -> bool:
        if value != value:  # a NaN is never the best
            return False
        if self.best_value is None:
            return True
        return value < self.best_value if self.mode == "min" else value > self.best_value

    @torch.no_grad()
    def _write(self, trainer: pl.Trainer, module: pl.LightningModule, kinds: list[str]) -> None:
        step = trainer.global_step
        due = [kind for kind in kinds if self._written[kind] != step]
        if due and trainer.is_global_zero:
            averaged = [copy.module for copy in guards.averaged_copies(trainer)]
            model = averaged[0] if averaged else module
            assert self._folder is not None and isinstance(model, nn.Module)
            self._folder.mkdir(parents=True, exist_ok=True)
            first, *others = (self._path(kind) for kind in due)
            self.report = pack(
                model, first, overwrite=True, finalize=self.finalize, **self.encodings
            )
            for path in others:
                _copy(first, path)
        self._written |= dict.fromkeys(due, step)

    def _path(self, kind: str) -> Path:
        version = f"-v{self._version}" if self._version else ""
        return (self._folder or Path()) / f"{self.filename}-{kind}{version}.bfmoe"

    def _find_folder(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir) / "packed"

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION, "monitor": self.monitor, "mode": self.mode,
            "best_value": self.best_value, "written": dict(self._written), "files": self._version,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != _STATE_VERSION:
            raise CheckpointError(
                f"the callback's state has version {_STATE_VERSION}",
                got=state_dict.get("version"),
                fix="Resume with the library version that wrote the checkpoint.",
            )
        self._restored, self._version = True, state_dict["files"]
        self._written, self.best_value = dict(state_dict["written"]), state_dict["best_value"]
        before, now = (state_dict["monitor"], state_dict["mode"]), (self.monitor, self.mode)
        if before != now:
            rank_zero_warn(f"The best model was chosen by {before}; going on with {now}.")
            self.best_value = None


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _schedules(trainer: pl.Trainer) -> list[TernarySchedule]:
    """What drives lambda: schedules of their own, and those in our main callback."""
    found = _callbacks(trainer)
    inner = [c.schedule for c in found if isinstance(c, ButterflyMoECallback)]
    return [c for c in found if isinstance(c, TernarySchedule)] + inner


def _copy(source: Path, target: Path) -> None:
    """A copy that appears at once and whole."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
