"""What a swap cannot carry over, said instead of lost in silence."""

import warnings

from torch import nn

from lightning_bfmoe.swap.candidate import Candidate


def warn_of_losses(c: Candidate) -> None:
    """Warn of hooks on what is replaced, and of a block that is frozen in part.

    Hooks of `torch.nn.utils` (weight norm, pruning) only make the weights that are taken over; they
    are no loss.
    """
    whole = [c.module] if not c.layer_at else []
    replaced = list({id(m): m for root in (*whole, *c.leaves) for m in root.modules()}.values())
    hooked = [type(m).__name__ for m in replaced if _has_foreign_hook(m)]
    if hooked:
        warnings.warn(
            f"The forward hooks on {', '.join(hooked)} of block {c.path!r} do not run after the "
            "swap: register them anew on the ButterflyMoE layer, or leave the block alone with "
            f"exclude={c.path!r}.",
            stacklevel=4,
        )
    trains = {p.requires_grad for m in c.leaves for p in m.parameters()}
    if len(trains) > 1:
        warnings.warn(
            f"Block {c.path!r} is frozen in part; all of the new layer trains. Freeze what should "
            "not with requires_grad_(False) on its parameters, e.g. experts.up.substrate.latent.",
            stacklevel=4,
        )


def _has_foreign_hook(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    kinds = [hook if hasattr(hook, "__module__") else type(hook) for hook in hooks]
    return any(not str(kind.__module__).startswith("torch.nn.utils") for kind in kinds)
