"""`OrbitRecorder`: the experts' angles over a training, in one small file, for `OrbitExplorer`."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_bfmoe.callbacks.recording import Interval, check_count, gather_ranks
from lightning_bfmoe.callbacks.settings import resolve_patterns
from lightning_bfmoe.callbacks.step_loss import step_loss
from lightning_bfmoe.callbacks.tally import Tally
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.viz.recording import Key, Recording, Snapshot, read_recording
from lightning_bfmoe.viz.snapshot import find_rotations, read_angles


class OrbitRecorder(pl.Callback):
    """Writes the experts' angles, loads and losses at some steps into one file.

    The first record is made before the first step, the last one when the training ends, and one
    after every `every_n_steps` optimizer steps between. The file (see `viz.recording`) is written
    anew at each record, so it is whole at any time, and stays small: when `max_records` or
    `max_bytes` is reached, every other record is dropped and the interval doubles, so that the
    whole training stays visible. A resumed training goes on with the file and drops what was
    recorded after its checkpoint; a new training replaces it. Nothing that is trained changes.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> recorder = OrbitRecorder(every_n_steps=100)
        >>> trainer = Trainer(callbacks=[recorder], logger=False)

    Args:
        every_n_steps: Optimizer steps from one record to the next (count).
        dirpath: Folder of the file, made when needed. None: the logger's, or `default_root_dir`.
        filename: Its name, to which ``.safetensors`` is added.
        layers: Paths or patterns of the ButterflyMoE layers; all when None.
        rotations: Patterns of ``up/in``, ``up/out``, ``down/in``, ...; all when None.
        metrics: Patterns of logged values to keep beside the training loss.
        max_records: Records kept (count, >= 4).
        max_bytes: Bytes of all records (count).
        name: Tells several callbacks apart, in checkpoints.

    Raises:
        ConfigError: A setting is out of range; on fit, when no layer fits, or four records are
            larger than `max_bytes`.
        CheckpointError: On resume, when the file comes from another model.
    """

    path: Path | None
    """The file; None before the training starts."""

    def __init__(
        self,
        every_n_steps: int = 100,
        dirpath: str | None = None,
        filename: str = "orbits",
        *,
        layers: str | Sequence[str] | None = None,
        rotations: str | Sequence[str] | None = None,
        metrics: str | Sequence[str] = ("*loss*",),
        max_records: int = 64,
        max_bytes: int = 64 << 20,
        name: str | None = None,
    ) -> None:
        super().__init__()
        check_count("max_records - 3", max_records - 3)
        check_count("max_bytes", max_bytes)
        self.interval = Interval(every_n_steps)
        self.every = every_n_steps
        self.dirpath, self.filename, self.name = dirpath, filename, name
        self.layers, self.rotations = resolve_patterns(layers), resolve_patterns(rotations)
        self.metrics = [metrics] if isinstance(metrics, str) else list(metrics)
        self.max_records, self.max_bytes = max_records, max_bytes
        self.path = None
        self._recording: Recording | None = None
        self._rotations: dict[Key, tuple[nn.Module, int]] = {}
        self._tally = Tally()
        self._resumed: dict[str, Any] | None = None
        self._count, self._last_step, self._warned = 0, -1, False

    @property
    def recording(self) -> Recording:
        """What was recorded so far, on rank zero; from the file where other processes trained.

        Raises:
            ConfigError: No training has started.
        """
        if self._recording is None and self.path is not None and self.path.is_file():
            return read_recording(self.path)
        if self._recording is None:
            raise ConfigError(
                "a recording is there once a training has started",
                got="no record",
                fix="Call trainer.fit, or use viz.record_model(model).",
            )
        return self._recording

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: by name only, so that settings may change."""
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()
        if trainer.barebones:
            return
        self._rotations = find_rotations(pl_module, self.layers, self.rotations)
        recorded = {layer for layer, _ in self._rotations}
        layers = {name or "model": layer for name, layer in moe_layers(pl_module)}
        self._tally.attach({name: layers[name] for name in layers if name in recorded})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._rotations:
            return
        self._check_room()
        resumed, self._resumed = self._resumed, None
        self.interval.every = self.every if resumed is None else max(self.every, resumed["every"])
        self.interval.start(trainer.global_step)
        self.path = self._find_folder(trainer) / f"{self.filename}.safetensors"
        widths = {key: d for key, (_, d) in self._rotations.items()}
        self._recording = Recording(widths, [])
        self._tally.clear()
        self._count, self._last_step = 0, -1
        if resumed is not None:
            self._go_on(trainer, resumed)
        else:
            self.interval.clock.step = trainer.global_step  # it may come to a training on its way
            self._record(trainer)

    def _go_on(self, trainer: pl.Trainer, state: dict[str, Any]) -> None:
        """Take over the records that the checkpoint knows; only rank zero reads the file."""
        assert self._recording is not None
        self._last_step = state["last"]
        if trainer.is_global_zero:
            self._tally.load_state_dict(state["tally"])  # the sums of all ranks
            places = (self.path, Path(state["path"]))
            source = next((path for path in places if path and path.is_file()), None)
            if source is None:
                rank_zero_warn(
                    f"OrbitRecorder found no recording at {state['path']}: it goes on without what "
                    f"came before step {self.interval.clock.step}."
                )
            for snapshot in read_recording(source).snapshots if source else ():
                if snapshot.step <= self._last_step:
                    self._recording.append(snapshot)
        count = torch.tensor(len(self._recording), device=trainer.strategy.root_device)
        self._count = int(gather_ranks(trainer, count)[0])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._tally.switch(True)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._tally.switch(False)  # validation may come before the next batch
        if not self._rotations:
            return
        self._tally.add_loss(step_loss(trainer, pl_module, outputs))
        full = self.interval.is_full
        if self.interval.tick(trainer.global_step) and full:
            self._record(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._rotations and self.interval.clock.step != self._last_step:
            self._record(trainer)

    def _record(self, trainer: pl.Trainer) -> None:
        """Read the angles, reduce loads and loss over ranks, and write the file on rank zero."""
        assert self._recording is not None
        angles = {key: read_angles(module) for key, (module, _) in self._rotations.items()}
        loads, loss = self._tally.take(trainer)
        logged = self._logged(trainer)
        self._last_step = self.interval.clock.step
        snapshot = Snapshot(
            self._last_step,
            {key: value.numpy() for key, value in angles.items()},
            {name: load.numpy() for name, load in loads.items()},
            loss,
            logged,
        )
        self._count += 1  # on every rank, so that all double the interval at once
        if trainer.is_global_zero:
            self._recording.append(snapshot)
        if self._count % 2 and self._count > 2 and self._is_full(snapshot.nbytes):
            self._count = self._count // 2 + 1
            self.interval.every *= 2
            self._recording.thin()  # on other ranks than zero nothing is there to thin
        if trainer.is_global_zero:
            self._write(trainer)

    def _is_full(self, size: int) -> bool:
        """Whether the next two records, of `size` bytes each, would be too many."""
        return self._count + 2 > self.max_records or (self._count + 2) * size > self.max_bytes

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            self.recording.write(self.path or "")
        except OSError as error:  # a monitor never stops a training
            if not self._warned:
                rank_zero_warn(f"OrbitRecorder cannot write {self.path}: {error}")
            self._warned = True

    def _logged(self, trainer: pl.Trainer) -> dict[str, float]:
        """Logged values that fit the patterns, finite ones only; asked on every rank."""
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        return {
            key: value
            for key, value in values.items()
            if math.isfinite(value) and any(fnmatchcase(key, p) for p in self.metrics)
        }

    def _check_room(self) -> None:
        """Raise when the smallest recording, four records, is too large."""
        modules: list[Any] = [module for module, _ in self._rotations.values()]
        size = sum(2 * module.angles.numel() for module in modules)
        if 4 * size > self.max_bytes:
            raise ConfigError(
                f"four records fit into max_bytes={self.max_bytes}",
                got=f"{size} bytes a record: {len(self._rotations)} rotations in float16",
                fix="Choose layers= or rotations= (as rotations='up/in'), or raise max_bytes.",
            )

    def _find_folder(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        self._tally.detach()
        self._rotations = {}

    # State: plain data, so that `torch.load(weights_only=True)` reads it.

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.interval.clock.step, "every": self.interval.every, "path": str(self.path),
            "last": self._last_step, "tally": self._tally.state_dict(),
        }  # fmt: skip

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the counts of all ranks into the state; Lightning calls this on every rank."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and self._rotations and trainer.world_size > 1:
            state["tally"] = self._tally.reduced_state(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.interval.load(int(state_dict["step"]))
        self.path, self._resumed = Path(state_dict["path"]), dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model behind when copied or pickled."""
        return {**self.__dict__, "_rotations": {}}
