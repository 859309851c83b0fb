"""`ExpertUsage`: how evenly the experts are used, and a warning when some are dead."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_bfmoe.callbacks.recording import (
    Interval,
    check_count,
    gather_ranks,
    log_histogram,
    log_values,
    select,
)
from lightning_bfmoe.callbacks.settings import resolve_patterns
from lightning_bfmoe.functional.routing import expert_load
from lightning_bfmoe.functional.usage import dead_experts, load_entropy, max_violation
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE, moe_layers
from lightning_bfmoe.layers.passes import count_load, is_counted

_FEW_EXPERTS = 16


class ExpertUsage(pl.Callback):
    """Logs load, its entropy, MaxVio and dead experts of each layer, and warns of dead experts.

    The load is summed over every forward pass of an interval that is trained on
    (`layers.passes.is_counted`), micro-batches and ranks included. Logged as
    ``usage/<layer>/load_entropy`` (1 is even use), ``.../max_violation`` (0 is even use) and
    ``.../dead_experts`` (count), and over all layers as ``usage/load_entropy`` (mean),
    ``usage/max_violation`` (worst) and ``usage/dead_experts`` (sum). ``.../load/<expert>`` is the
    load of one expert over the mean (1 is even use); a logger with TensorBoard's
    ``add_histogram_raw`` gets all of a layer as the histogram ``.../load`` over expert ids. The
    first step of a training is logged too, so that the names exist, but does not end the interval.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ExpertUsage(every_n_steps=100)], logger=False)

    Args:
        every_n_steps: Optimizer steps in an interval (count).
        dead_after: Intervals in a row without a token after which an expert is called dead (count).
        layers: Paths or patterns of the ButterflyMoE layers; all when None.
        log_load: Whether to log the load of every single expert. None: in layers of at most 16.
        max_history: Records kept (count, >= 2); when full, every other one is dropped, so that the
            whole training stays visible.
        name: Tells several callbacks apart, in checkpoints and in logged names.

    Raises:
        ConfigError: A setting is out of range; on fit, when no layer fits.

    Source: measures `functional.usage`.
    """

    history: list[dict[str, Any]]
    """One record per interval, oldest first, plain data: {"step": steps finished, "layers":
    {path: {"load": slots of each expert, "load_entropy", "max_violation", "dead_experts"}}}."""

    def __init__(
        self,
        every_n_steps: int = 50,
        dead_after: int = 3,
        layers: str | Sequence[str] | None = None,
        *,
        log_load: bool | None = None,
        max_history: int = 512,
        name: str | None = None,
    ) -> None:
        super().__init__()
        check_count("dead_after", dead_after)
        check_count("max_history - 1", max_history - 1)
        self.interval = Interval(every_n_steps)
        self.dead_after, self.max_history, self.name = dead_after, max_history, name
        self.layers, self.log_load = resolve_patterns(layers), log_load
        self._forget()
        self._counters: list[_Counter] = []
        self._handles: list[Any] = []

    def _forget(self) -> None:
        self.history = []
        self._pending: dict[str, list[int]] = {}  # this rank's load of the unfinished interval
        self._idle: dict[str, list[int]] = {}  # intervals in a row without a token
        self._warned: dict[str, list[int]] = {}  # experts
        self._of_all_ranks = False  # whether _pending comes from a checkpoint

    @property
    def dead(self) -> dict[str, list[int]]:
        """Experts that are dead now, by layer; one that receives a token again is none of them."""
        found = {
            name: [i for i, n in enumerate(counts) if n >= self.dead_after]
            for name, counts in self._idle.items()
        }
        return {name: experts for name, experts in found.items() if experts}

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: by name only, so that settings may change."""
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()
        if trainer.barebones:
            return
        for name, layer in select(moe_layers(pl_module), self.layers, "a ButterflyMoE layer"):
            counter = _Counter(name or "model", layer)
            self._handles.append(layer.register_forward_hook(counter.record, with_kwargs=True))
            self._counters.append(counter)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.interval.start(trainer.global_step)
        if self.interval.clock.step == 0:
            self._forget()
        takes = trainer.is_global_zero or not self._of_all_ranks
        for counter in self._counters:
            counter.load_list(self._pending.get(counter.name, []) if takes else [])
        self._pending, self._of_all_ranks = {}, False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._switch(True)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._switch(False)  # validation may come before the next batch
        due, full = self.interval.is_due, self.interval.is_full
        if not (self.interval.tick(trainer.global_step) and due and self._counters):
            return
        loads = self._reduced(trainer)
        layers = {name: _measure(load) for name, load in loads.items() if int(load.sum())}
        log_values(trainer, self._named(layers))
        for name, record in layers.items():
            log_histogram(trainer, f"{self._prefix}/{name}/load", record["load"])
        if full:
            self._close_interval(loads, layers)

    def _switch(self, active: bool) -> None:
        for counter in self._counters:
            counter.active = active

    def _reduced(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        """The loads of all layers over all ranks, by one collective and one copy to the CPU."""
        flat = torch.cat([counter.load for counter in self._counters])
        total = gather_ranks(trainer, flat).sum(dim=0).cpu()
        parts = total.split([len(counter.load) for counter in self._counters])
        return {counter.name: part for counter, part in zip(self._counters, parts, strict=True)}

    def _named(self, layers: dict[str, dict[str, Any]]) -> dict[str, float]:
        prefix = self._prefix
        values: dict[str, float] = {}
        for measure in ("load_entropy", "max_violation", "dead_experts") if layers else ():
            each = {name: float(record[measure]) for name, record in layers.items()}
            values[f"{prefix}/{measure}"] = _overall(measure, list(each.values()))
            values |= {f"{prefix}/{name}/{measure}": value for name, value in each.items()}
        for name, record in layers.items():
            load = record["load"]
            if len(load) <= _FEW_EXPERTS if self.log_load is None else self.log_load:
                mean = sum(load) / len(load)
                values |= {f"{prefix}/{name}/load/{i}": n / mean for i, n in enumerate(load)}
        return values

    @property
    def _prefix(self) -> str:
        return "usage" if self.name is None else f"usage/{self.name}"

    def _close_interval(self, loads: dict[str, Tensor], layers: dict[str, dict[str, Any]]) -> None:
        self.history.append({"step": self.interval.clock.step, "layers": layers})
        if len(self.history) > self.max_history:
            del self.history[-2::-2]  # keeps the newest
        for counter in self._counters:
            if counter.name in layers:
                self._watch(counter, loads[counter.name])
            counter.load.zero_()

    def _watch(self, counter: "_Counter", load: Tensor) -> None:
        idle = self._idle.get(counter.name, [0] * len(load))
        if len(idle) != len(load):
            idle = [0] * len(load)
        idle = [0 if n else count + 1 for n, count in zip(load.tolist(), idle, strict=True)]
        self._idle[counter.name] = idle
        warned = self._warned.setdefault(counter.name, [])
        dead = [i for i, n in enumerate(idle) if n >= self.dead_after and i not in warned]
        if dead:
            warned += dead
            rank_zero_warn(
                f"Layer {counter.name!r}: {_listed(dead)} of {len(load)} received no token during "
                f"the last {self.dead_after * self.interval.every} optimizer steps. "
                + _advice(counter.layer)
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._counters:
            self._pending = self._own_pending()
            self._counters = []

    def _own_pending(self) -> dict[str, list[int]]:
        if not self._counters:
            return self._pending
        return {counter.name: counter.load.tolist() for counter in self._counters}

    # State: plain data, so that `torch.load(weights_only=True)` reads it.

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.interval.clock.step,
            "history": list(self.history),
            "pending": self._own_pending(),
            "idle": {name: list(counts) for name, counts in self._idle.items()},
            "warned": {name: list(experts) for name, experts in self._warned.items()},
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the load of all ranks into the state; Lightning calls this on every rank."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and self._counters and trainer.world_size > 1:
            state["pending"] = {name: x.tolist() for name, x in self._reduced(trainer).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.interval.load(int(state_dict["step"]))
        self.history = list(state_dict["history"])
        self._pending, self._of_all_ranks = dict(state_dict["pending"]), True
        self._idle, self._warned = dict(state_dict["idle"]), dict(state_dict["warned"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the hooks behind when copied or pickled."""
        return {**self.__dict__, "_handles": [], "_counters": [], "_pending": self._own_pending()}


class _Counter:
    """One hooked layer and the load of its experts since the interval began."""

    def __init__(self, name: str, layer: ButterflyMoE | ButterflyExperts) -> None:
        self.name, self.layer = name, layer
        experts = layer.experts if isinstance(layer, ButterflyMoE) else layer
        device = experts.up.rotate_in.angles.device
        self.load = torch.zeros(experts.num_experts, dtype=torch.int64, device=device)
        self.active = False

    def record(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """The forward hook."""
        if not (self.active and is_counted(layer)):
            return
        if isinstance(layer, ButterflyMoE) and layer.last_routing is not None:
            count_load(self.load, layer.last_routing.load)
        else:
            experts = args[1] if len(args) > 1 else kwargs["experts"]
            count_load(self.load, expert_load(experts, len(self.load)))

    def load_list(self, load: list[int]) -> None:
        """Go on from the load of an unfinished interval; one that does not fit is dropped."""
        if len(load) == len(self.load):
            self.load.copy_(torch.tensor(load))


def _measure(load: Tensor) -> dict[str, Any]:
    return {
        "load": load.tolist(),
        "load_entropy": load_entropy(load).item(),
        "max_violation": max_violation(load).item(),
        "dead_experts": int(dead_experts(load)),
    }


def _overall(measure: str, values: list[float]) -> float:
    if measure == "load_entropy":
        return sum(values) / len(values)
    return max(values) if measure == "max_violation" else sum(values)


def _listed(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
    return f"expert{'s' if len(experts) > 1 else ''} {shown}"


def _advice(layer: ButterflyMoE | ButterflyExperts) -> str:
    if not isinstance(layer, ButterflyMoE):
        return "The model's own router decides: balance it, or use fewer experts."
    router = layer.router
    if not router.weight.requires_grad:
        return "The router is frozen, and with it its balance: train it, or use fewer experts."
    return (
        f"Raise balance_rate (now {router.balance_rate:g}), lower num_experts (now "
        f"{router.num_experts}), or raise top_k (now {router.top_k})."
    )
