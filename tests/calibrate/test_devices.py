"""Closed forms stay on the model's device: run on `meta`, no tensor of the CPU may join in."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_bfmoe.calibrate import (
    Dense,
    Moments,
    Recipe,
    fit_correction_,
    fit_inputs_,
    fit_output_,
)
from lightning_bfmoe.calibrate.bypass import (
    WeightedMoments,
    canonical_bound,
    fit_bypass,
    fit_on_basis,
    linear_error,
    merged_map,
    shared_basis,
)
from lightning_bfmoe.calibrate.feed_forward import degraded_hidden
from lightning_bfmoe.calibrate.width import Energies, atomic_scores, kept_units
from lightning_bfmoe.layers import ButterflyMoE

ATEN = torch.ops.aten


class Answers(TorchDispatchMode):
    """`meta` as if it were a GPU: refuses to mix, and answers questions about values somehow."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        mixed = len({t.is_meta for t in tensors if t.dim()}) > 1
        if mixed and func not in (ATEN.copy_.default, ATEN._to_copy.default, ATEN.index.Tensor):
            raise RuntimeError(f"{func} on two devices")
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.is_meta:
            if func is ATEN._local_scalar_dense.default:
                kind = first.dtype
                return True if kind is torch.bool else 0.5 if kind.is_floating_point else 0
            if func is ATEN._to_copy.default and str((kwargs or {}).get("device")) == "cpu":
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            if func is ATEN.index.Tensor:  # a mask: all that it could keep
                masks = [i if i is None or i.dtype is not torch.bool else i.long() for i in args[1]]
                return func(first, masks)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch):
    """`meta` has none to ask for."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: a != ("meta",) and asked(*a))
    usual = torch.autocast
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, **k: contextlib.nullcontext() if kind == "meta" else usual(kind, **k),
    )


def test_the_trick_notices_a_tensor_of_another_device():
    with Answers(), pytest.raises(RuntimeError, match="on two devices"):
        torch.zeros(3, 3, device="meta") @ torch.zeros(3, 3)
    with Answers(), pytest.raises(RuntimeError, match="on two devices"):
        torch.zeros(3, device="meta").add_(torch.zeros(3))


@pytest.mark.parametrize(("gated", "gains"), [(False, False), (True, True)])
def test_a_block_is_fitted_where_it_is(gated, gains):
    up, down = torch.empty(8, 4, device="meta"), torch.empty(4, 8, device="meta")
    dense = Dense(up=up, down=down, gate=up if gated else None, function=lambda x: x)
    layer = ButterflyMoE(
        4, 8, 3, gated=gated, gains=gains, correction_rank=2, device="meta", activation="relu"
    )
    x = torch.empty(30, 4, device="meta")
    with Answers():
        sums = [Moments(4, device="meta") for _ in range(2)]
        for moments in sums:
            moments.update(x)
        choices = fit_inputs_(layer, dense, *sums, Recipe(sweeps=1))
        assert len(choices) == 1 + gated
        both = [Moments(12, 4, device="meta") for _ in range(2)]
        hidden = degraded_hidden(layer)
        for moments in both:
            moments.update(torch.cat([hidden(x), x], dim=1), x)
        fit_output_(layer, dense, *both, Recipe(sweeps=1))
        fit_correction_(layer, *both)
    assert all(p.is_meta for p in layer.parameters())


def test_bypasses_widths_and_merged_maps_stay_there():
    x, weight = torch.empty(30, 8, device="meta"), torch.empty(30, device="meta")
    with Answers():
        moments = WeightedMoments(8, 8, "meta")
        moments.update(x, x, weight)
        found = moments.statistics()
        basis = shared_basis([found, found], 2)
        for bypass in (fit_bypass(found, 2), fit_bypass(found, 0), fit_on_basis(found, basis)):
            assert bypass(x).is_meta
        assert isinstance(linear_error(found), float) and isinstance(canonical_bound(found), float)
        assert merged_map(torch.empty(8, 20, device="meta"), found.c_xx, found.c_yx).is_meta
        energies = Energies(lambda rows: rows, 8, "meta")
        energies.watch(x, held=False)
        scores = atomic_scores(energies.mean(), torch.empty(8, 8, device="meta"))
        assert kept_units(scores, 4).shape == (4,)
