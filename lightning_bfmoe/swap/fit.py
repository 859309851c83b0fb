r"""Fitting independent experts onto one shared matrix and its rotations.

With equal angles the least-squares start is the mean of the experts' matrices. Rotations of one
matrix share its spectrum, which independently trained experts do not, so an error remains; it is
measured and told to the user.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_bfmoe.functional.butterfly import apply_butterfly
from lightning_bfmoe.layers import ButterflyExperts, ButterflyLinear
from lightning_bfmoe.swap.blocks import FeedForward
from lightning_bfmoe.swap.experts import mean_expert

_RATE = 0.02


def weight_error(layer: ButterflyExperts, experts: list[FeedForward]) -> float:
    r"""Relative error of all experts' matrices at lambda 0.

    .. math:: \sqrt{\sum_i \lVert W_i - \hat W_i \rVert^2 \big/ \sum_i \lVert W_i \rVert^2}

    Args:
        layer: The shared experts.
        experts: The originals.

    Returns:
        0 for a perfect fit, 1 for the error of a zero matrix.
    """
    misses = total = 0.0
    with torch.no_grad(), _latent(layer):
        for role, linear in layer.linears().items():
            for i, expert in enumerate(experts):
                wanted = expert.tensors()[role].float()
                misses += float((linear.expert_weight(i) - wanted).square().sum())
                total += float(wanted.square().sum())
    return (misses / max(total, 1e-30)) ** 0.5


def expert_spread(experts: list[FeedForward]) -> float:
    """How far experts are from their mean: what `weight_error` is when all angles are equal."""
    mean, misses, total = mean_expert(experts).tensors(), 0.0, 0.0
    for expert in experts:
        for role in ("up", "gate", "down"):
            if role in mean:
                weight = expert.tensors()[role].float()
                misses += float((weight - mean[role]).square().sum())
                total += float(weight.square().sum())
    return (misses / max(total, 1e-30)) ** 0.5


def fit_experts(layer: ButterflyExperts, experts: list[FeedForward], steps: int) -> list[float]:
    """Fits angles, shared matrices and gains to the experts' weights with Adam, at lambda 0.

    The matrices of one role do not depend on those of another, so each role is fitted alone.

    Args:
        layer: Changed in place; lambda is put back afterwards.
        experts: The originals.
        steps: Adam steps (count).

    Returns:
        The relative error (as `weight_error`) before each step.
    """
    history = torch.zeros(steps, dtype=torch.float64)
    total = 0.0
    for role, linear in layer.linears().items():
        wanted = torch.stack([e.tensors()[role].float() for e in experts])  # (experts, d_out, d_in)
        norm = float(wanted.square().sum())
        with torch.enable_grad(), _latent(layer):
            history += norm * torch.tensor(_fit_matrix(linear, wanted, steps)).double()
        total += norm
    return (history / max(total, 1e-30)).sqrt().tolist()


def _fit_matrix(linear: ButterflyLinear, wanted: Tensor, steps: int) -> list[float]:
    trained = [p for name, p in linear.named_parameters() if name != "bias"]
    optimizer = torch.optim.Adam(trained, lr=_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    norm = wanted.square().sum().clamp(min=1e-30)
    losses = []
    for _ in range(steps):
        loss = (_all_matrices(linear) - wanted).square().sum() / norm
        for p, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p.grad = grad
        optimizer.step()
        decay.step()
        losses.append(float(loss.detach()))
    for p in trained:
        p.grad = None
    return losses


def _all_matrices(linear: ButterflyLinear) -> Tensor:
    """The matrices of all experts at once, (experts, d_out, d_in); see `expert_weight` for one."""
    theta, phi = (r.angles.unsqueeze(1) for r in (linear.rotate_in, linear.rotate_out))
    weight = apply_butterfly(linear.substrate.weight().expand(linear.num_experts, -1, -1), theta)
    weight = apply_butterfly(weight.mT, phi).mT
    if linear.gain_in is not None and linear.gain_out is not None:
        weight = linear.gain_out.unsqueeze(2) * weight * linear.gain_in.unsqueeze(1)
    return weight


@contextlib.contextmanager
def _latent(layer: ButterflyExperts) -> Iterator[None]:
    """Lambda 0 for as long as the context lasts."""
    blend = layer.blend
    layer.set_blend(0.0)
    try:
        yield
    finally:
        layer.set_blend(blend)
