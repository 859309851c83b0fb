"""Freezing the latent matrices for real while the plan says that they stand still."""

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_bfmoe.callbacks import AngleWarmup
from lightning_bfmoe.layers import parameter_roles


class LatentFreezer:
    """Takes the latent matrices out of the gradient while the plan says that they stand still.

    What the callback's factor of 0 on the learning rate leaves to be computed, kept in memory and
    sent to all processes, is then not there at all. Parameters that the user has frozen stay so.

    Args:
        trainer: Whose callbacks hold the plan.
        module: The model with its layers.
    """

    def __init__(self, trainer: pl.Trainer, module: nn.Module) -> None:
        parameters, roles = dict(module.named_parameters()), parameter_roles(module)
        latents = {id(parameters[n]) for n, role in roles.items() if role == "latent"}
        self._driven: list[tuple[AngleWarmup, list[nn.Parameter]]] = []
        for part in _warmups(trainer):
            own = [p for layer in part.layers(module) for p in layer.parameters()]
            chosen = [p for p in own if id(p) in latents and p.requires_grad]
            self._driven.append((part, chosen))

    def follow(self) -> None:
        """Freeze or thaw by the plan of the step that comes."""
        for part, parameters in self._driven:
            if part.clock.total is not None:
                self._set(parameters, part.now.latent_factor > 0)

    def thaw(self) -> None:
        """Leave the model as it came."""
        for _, parameters in self._driven:
            self._set(parameters, True)

    @staticmethod
    def _set(parameters: list[nn.Parameter], trainable: bool) -> None:
        for parameter in parameters:
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)
                if not trainable:
                    parameter.grad = None  # of the last step


def _warmups(trainer: pl.Trainer) -> list[AngleWarmup]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    parts = [part for c in callbacks for part in (c, *getattr(c, "parts", ()))]
    return [part for part in parts if isinstance(part, AngleWarmup)]
