"""Spawned and forked workers: what they trained must find its way into the caller's module.

Lightning's launcher sends the workers' weights back as a state_dict and loads it with
``strict=False``. The swap was made in the workers, so the caller's module is still dense, the keys
of its feed-forward blocks do not fit, and nobody says so. Here the caller's module is swapped
first, by what stands in that very state_dict, and the states of our callbacks come back as well.
"""

import io
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_bfmoe.errors import SwapError
from lightning_bfmoe.swap import apply_swap_plan, plan_from_state_dict

_STATES = "bfmoe_callback_states"


class SwappingLauncher(_MultiProcessingLauncher):
    """Lightning's launcher for processes that are spawned or forked, with a swap at the end."""

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """As Lightning's; the callback is put into this process's Trainer too."""
        if trainer is not None:
            self._strategy.bring_callback(trainer)  # type: ignore[attr-defined]
        return super().launch(function, *args, trainer=trainer, **kwargs)

    def _recover_results_in_main_process(self, worker_output: Any, trainer: pl.Trainer) -> None:
        if worker_output.weights_path is not None:
            state = self._strategy.checkpoint_io.load_checkpoint(worker_output.weights_path)
            swap_like(trainer.lightning_module, state, _way_out(worker_output.best_model_path))
        super()._recover_results_in_main_process(worker_output, trainer)

    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        """In the first worker: the states of our callbacks, as bytes that need no shared memory."""
        buffer = io.BytesIO()
        torch.save({key: c.state_dict() for key, c in _ours(trainer).items()}, buffer)
        return {**super().get_extra_results(trainer), _STATES: buffer.getvalue()}

    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        """In the caller's process: what the callbacks counted and recorded."""
        super().update_main_process_results(trainer, extra)
        states = torch.load(io.BytesIO(extra[_STATES]), weights_only=True)
        for key, callback in _ours(trainer).items():
            if states.get(key):
                callback.load_state_dict(states[key])


def swap_like(module: pl.LightningModule, state: Mapping[str, Tensor], way_out: str) -> None:
    """Swap a module as the one was that a state_dict comes from; warn where that is not possible.

    Layers that the module builds in `setup` or `configure_model` are built first: those hooks have
    run in the workers only. No error: the training is over and its results must not be lost.

    Args:
        module: The caller's.
        state: State_dict of a worker's module.
        way_out: How to come by the weights otherwise.
    """
    plan = plan_from_state_dict(state)
    try:
        try:
            apply_swap_plan(module, plan)
        except SwapError:
            _build(module)
            apply_swap_plan(module, plan)
    except Exception as error:  # whatever a user's hook may raise outside of a worker
        lost = str(error).partition("\n")[0]
        rank_zero_warn(_lost(f"{type(error).__name__}: {lost}", way_out))
        return
    missing = sorted(set(state) - set(module.state_dict()))
    if missing:
        rank_zero_warn(_lost(f"it has no {', '.join(missing[:4])}", way_out))


def _build(module: pl.LightningModule) -> None:
    if is_overridden("setup", module, pl.LightningModule):
        module.setup("fit")
    if is_overridden("configure_model", module, pl.LightningModule):
        module.configure_model()


def _lost(reason: str, way_out: str) -> str:
    return (
        "The training was done in other processes, and this process's module could not take all of "
        f"its weights ({reason}). {way_out} Layers that are built in __init__ come back by "
        "themselves; so do all with strategy='bfmoe'."
    )


def _way_out(best_model_path: Any) -> str:
    path = repr(str(best_model_path)) if best_model_path else "a checkpoint of the training"
    return f"Read them with lightning_bfmoe.load_from_checkpoint(YourModule, {path})."


def _ours(trainer: pl.Trainer) -> dict[str, pl.Callback]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return {c.state_key: c for c in callbacks if type(c).__module__.startswith("lightning_bfmoe.")}
