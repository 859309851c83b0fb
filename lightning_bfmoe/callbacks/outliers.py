"""`ActivationOutliers`: what the rotations do to the outliers of the activations they rotate."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_bfmoe.callbacks.recording import (
    Interval,
    check_count,
    gather_ranks,
    log_values,
    select,
)
from lightning_bfmoe.callbacks.settings import resolve_patterns
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional.butterfly import apply_butterfly, hadamard_angles
from lightning_bfmoe.functional.outliers import (
    MEASURES,
    empty_moments,
    measures_from,
    merge_moments,
    outlier_moments,
)
from lightning_bfmoe.layers import ButterflyMoE, CodedRotation, Rotation, moe_layers
from lightning_bfmoe.layers.passes import is_counted

Measured = Rotation | CodedRotation | nn.Linear


class ActivationOutliers(pl.Callback):
    """Logs outlier measures of the activations before and after each input rotation.

    Every `every_n_steps` optimizer steps (and in the first of a training) a sample of the rows that
    enter `up`, `gate` and `down` of each layer is measured on both sides of the rotation, over all
    forward passes of the step that are trained on (`layers.passes.is_counted`), micro-batches and
    ranks included. Logged as
    ``outliers/<layer>/<matrix>/<measure>_before`` and ``..._after``, and their means over all
    matrices as ``outliers/<measure>_before``. A monitor never stops a training: where activations
    are NaN, so are the measures.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ActivationOutliers(every_n_steps=100)], logger=False)

    Args:
        every_n_steps: Optimizer steps from one record to the next (count).
        max_rows: Rows measured per matrix and forward pass, evenly spaced (count).
        layers: Paths or patterns of the ButterflyMoE layers; all when None.
        dense: Paths or patterns of `nn.Linear` modules to measure as a control. Nothing rotates
            their input, so they have a "before" only.
        hadamard: Also measure each input behind a fixed Hadamard rotation (``..._hadamard``): what
            a learned rotation has to beat.
        measures: Names in `functional.outliers.MEASURES`; all when None.
        name: Tells several callbacks apart, in checkpoints and in logged names.

    Raises:
        ConfigError: A setting is out of range; on fit, when no module fits.

    Source: measures `functional.outliers`; the claim they test arXiv 2601.13563.
    """

    latest: dict[str, float]
    """The last record, by logged name."""

    def __init__(
        self,
        every_n_steps: int = 50,
        max_rows: int = 1024,
        layers: str | Sequence[str] | None = None,
        *,
        dense: str | Sequence[str] | None = None,
        hadamard: bool = False,
        measures: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        check_count("max_rows", max_rows)
        self.measures = list(MEASURES if measures is None else measures)
        if not self.measures or not set(self.measures) <= set(MEASURES):
            raise ConfigError(
                f"measures are some of {list(MEASURES)}", got=self.measures, fix="None takes all."
            )
        self.interval = Interval(every_n_steps)
        self.max_rows, self.hadamard, self.name = max_rows, hadamard, name
        self.layers, self.dense = resolve_patterns(layers), resolve_patterns(dense)
        self.latest = {}
        self._sites: list[_Site] = []
        self._handles: list[Any] = []

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: by name only, so that settings may change."""
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()
        if trainer.barebones:
            return
        for path, module in self._modules(pl_module):
            site = _Site(path, module, self.max_rows, self.hadamard)
            self._handles.append(module.register_forward_hook(site.record))
            self._sites.append(site)

    def _modules(self, pl_module: pl.LightningModule) -> list[tuple[str, Measured]]:
        found: list[tuple[str, Measured]] = []
        if self.dense is not None:
            modules = pl_module.named_modules()
            linears = [(name, m) for name, m in modules if isinstance(m, nn.Linear)]
            found += [
                ("/".join(name.rpartition(".")[::2]).lstrip("/"), linear)
                for name, linear in select(linears, self.dense, "an nn.Linear")
            ]
        ours = list(moe_layers(pl_module))
        if ours or self.layers is not None or self.dense is None:
            for name, layer in select(ours, self.layers, "a ButterflyMoE layer"):
                experts = layer.experts if isinstance(layer, ButterflyMoE) else layer
                prefix = f"{name}/" if name else ""
                found += [(prefix + role, m.rotate_in) for role, m in experts.linears().items()]
        return found

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.interval.start(trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._switch(self.interval.is_due)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._switch(False)  # validation may come before the next batch
        due = self.interval.is_due
        if self.interval.tick(trainer.global_step) and due and self._sites:
            self._report(trainer)

    def _switch(self, active: bool) -> None:
        for site in self._sites:
            site.active = active

    @torch.no_grad()
    def _report(self, trainer: pl.Trainer) -> None:
        """Reduce all sites of all ranks at once, log, and start afresh."""
        local = torch.cat([site.moments for site in self._sites])  # (columns, moments)
        moments = merge_moments(gather_ranks(trainer, local))
        computed = measures_from(moments)
        table = torch.stack([moments[:, 0], *(computed[name] for name in self.measures)])
        columns = [(site, view) for site in self._sites for view in site.views]
        seen, *rows = table.tolist()  # (1 + measures, columns): the one copy from the device
        values: dict[str, float] = {}
        prefix = "outliers" if self.name is None else f"outliers/{self.name}"
        for view in dict.fromkeys(view for _, view in columns):
            at = [i for i, (s, v) in enumerate(columns) if s.rotated and v == view and seen[i]]
            for name, row in zip(self.measures, rows, strict=True):
                if at:
                    values[f"{prefix}/{name}_{view}"] = sum(row[i] for i in at) / len(at)
        for name, row in zip(self.measures, rows, strict=True):
            for (site, view), value, there in zip(columns, row, seen, strict=True):
                if there:  # a layer that was not called has no rows
                    values[f"{prefix}/{site.path}/{name}_{view}"] = value
        log_values(trainer, values)
        self.latest = values
        for site in self._sites:
            site.moments.zero_()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._sites = []

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.interval.clock.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.interval.load(int(state_dict["step"]))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the hooks behind when copied or pickled."""
        return {**self.__dict__, "_handles": [], "_sites": []}


class _Site:
    """One hooked module and the moments of what passes it; idle unless `active`."""

    def __init__(self, path: str, module: Measured, max_rows: int, hadamard: bool) -> None:
        self.path, self.max_rows, self.hadamard = path, max_rows, hadamard
        self.rotated = not isinstance(module, nn.Linear)
        self.views = ["before"] + ["after"] * self.rotated + ["hadamard"] * hadamard
        # a packed layer's angles may be codes, which need not be decoded for the question
        device = next(t.device for t in (*module.parameters(), *module.buffers()))
        empty = empty_moments(device)
        self.moments = torch.stack([empty] * len(self.views))  # (views, moments)
        self.active = False

    def record(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The forward hook."""
        if self.active and args and is_counted(module):
            self._take(args[0], output)

    @torch.no_grad()
    def _take(self, x: Tensor, output: Tensor) -> None:
        tensors = [self._sample(x)]
        if self.rotated:
            tensors.append(self._sample(output))
        if self.hadamard:
            rows = tensors[0].float()
            angles = hadamard_angles(rows.shape[1]).to(rows.device)
            tensors.append(apply_butterfly(rows, angles, inverse=True))
        new = torch.stack([outlier_moments(rows) for rows in tensors])
        self.moments.copy_(merge_moments(torch.stack([self.moments, new.to(self.moments)])))

    def _sample(self, x: Tensor) -> Tensor:
        # rows are sorted by expert, so evenly spaced ones take from each its share
        rows = x.detach().reshape(-1, x.shape[-1])
        return rows[:: max(1, -(-rows.shape[0] // self.max_rows))]
