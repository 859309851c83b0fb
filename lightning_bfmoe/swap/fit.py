r"""Fitting independent experts onto one shared matrix and its rotations.

With equal angles the least-squares start is the mean of the experts' matrices. Rotations of one
matrix share its spectrum, which independently trained experts do not, so an error remains; it is
measured and told to the user.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_bfmoe.layers import ButterflyExperts
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
    with torch.no_grad(), _latent(layer):
        misses, total = _misses(layer, experts)
    return float((misses / total).sqrt())


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

    Args:
        layer: Changed in place; lambda is put back afterwards.
        experts: The originals.
        steps: Adam steps (count).

    Returns:
        The squared relative error before each step.
    """
    trained = [
        p
        for linear in layer.linears().values()
        for n, p in linear.named_parameters()
        if n != "bias"
    ]
    optimizer = torch.optim.Adam(trained, lr=_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    history = []
    with torch.enable_grad(), _latent(layer):
        for _ in range(steps):
            misses, total = _misses(layer, experts)
            loss = misses / total
            for p, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                p.grad = grad
            optimizer.step()
            decay.step()
            history.append(float(loss.detach()))
    for p in trained:
        p.grad = None
    return history


@contextlib.contextmanager
def _latent(layer: ButterflyExperts) -> Iterator[None]:
    """Lambda 0 for as long as the context lasts."""
    blend = layer.blend
    layer.set_blend(0.0)
    try:
        yield
    finally:
        layer.set_blend(blend)


def _misses(layer: ButterflyExperts, experts: list[FeedForward]) -> tuple[Tensor, Tensor]:
    """Squared distance of all matrices from their originals at the layer's lambda, and the norm."""
    misses = total = torch.zeros((), device=layer.up.rotate_in.angles.device)
    for role, linear in layer.linears().items():
        for i, expert in enumerate(experts):
            wanted = expert.tensors()[role].to(misses.dtype)
            misses = misses + (linear.expert_weight(i) - wanted).square().sum()
            total = total + wanted.square().sum()
    return misses, total
