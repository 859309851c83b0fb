"""The low-rank correction: its closed form against brute force, and its way through everything."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_bfmoe import (
    ButterflyMoECallback,
    Calibration,
    calibrated_swap,
    load_from_checkpoint,
    load_packed,
    pack,
    plan_memory,
)
from lightning_bfmoe.calibrate import Moments, low_rank_correction
from lightning_bfmoe.calibrate.correction import errors_by_rank, missed
from lightning_bfmoe.calibrate.settings import moment_bytes
from lightning_bfmoe.deploy import inspect_packed, verify_packed
from lightning_bfmoe.deploy.onnx_export.layer import ExportedMoE
from lightning_bfmoe.errors import CalibrationError, ConfigError
from lightning_bfmoe.layers import ButterflyMoE, LowRankCorrection, parameter_roles
from lightning_bfmoe.layers.correction import set_correction_
from lightning_bfmoe.layers.pruning import keep_experts_, packed_bytes
from lightning_bfmoe.swap import apply_swap_plan, plan_from_state_dict, swap_feed_forward
from tests.calibrate.test_calibrated_swap import ids, quiet
from tests.calibrate.test_selected import Lit
from tests.swap.zoo import make, relative, run


@pytest.fixture
def rows():
    """Hidden units, inputs and outputs of a small block, in double, and what a wrong W misses."""
    x = torch.randn(80, 6).double() @ torch.randn(6, 6).double() + 0.7
    h = torch.relu(x @ torch.randn(6, 10).double())
    y = h @ torch.randn(10, 5).double() + 0.1 * torch.randn(80, 5).double()
    weight, bias = torch.randn(5, 10).double(), torch.randn(5).double()
    return x, h, y, weight, bias


def moments_of(x, h, y):
    moments = Moments(h.shape[1] + x.shape[1], y.shape[1])
    for part in range(0, len(x), 32):
        cut = slice(part, part + 32)
        moments.update(torch.cat([h[cut], x[cut]], dim=1), y[cut])
    return moments


def test_what_is_missed_follows_from_the_moments(rows):
    x, h, y, weight, bias = rows
    error = missed(weight, bias, moments_of(x, h, y))
    e = y - h @ weight.T - bias
    torch.testing.assert_close(error.mean, e.mean(0))
    torch.testing.assert_close(error.c_ex, (e - e.mean(0)).T @ (x - x.mean(0)) / len(x))
    assert error.square == pytest.approx(float(e.square().sum(1).mean()), rel=1e-9)
    assert error.variance == pytest.approx(float((y - y.mean(0)).square().sum(1).mean()), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_it_is_the_best_map_of_its_rank(rows, rank):
    x, h, y, weight, bias = rows
    basis, offset, left = low_rank_correction(
        missed(weight, bias, moments_of(x, h, y)), rank, ridge=0.0
    )
    e = y - h @ weight.T - bias
    centred, target = x - x.mean(0), e - e.mean(0)
    fitted = centred @ torch.linalg.lstsq(centred, target).solution
    u, s, v = torch.linalg.svd(fitted, full_matrices=False)  # Eckart-Young on the fitted values
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    found = (x @ basis.T + offset) @ left.T
    torch.testing.assert_close(found, best)
    torch.testing.assert_close(basis.norm(dim=1), left.norm(dim=0))
    # and no step away from it is better: gradients of both factors are zero
    basis, left = (t.clone().requires_grad_() for t in (basis, left))
    (target - centred @ basis.T @ left.T).square().sum().backward()
    scale = float(target.square().sum())
    assert float(basis.grad.abs().max()) < 1e-9 * scale > float(left.grad.abs().max())


def test_with_a_ridge_it_is_ridge_regression(rows):
    x, h, y, weight, bias = rows
    basis, _, left = low_rank_correction(missed(weight, bias, moments_of(x, h, y)), 5, ridge=0.3)
    centred, e = x - x.mean(0), y - h @ weight.T - bias
    c = centred.T @ centred / len(x)
    wide = c + 0.3 * c.diagonal().mean() * torch.eye(6).double()
    wanted = torch.linalg.solve(wide, centred.T @ (e - e.mean(0)) / len(x)).T
    torch.testing.assert_close(left @ basis, wanted)


def test_errors_of_every_rank_are_those_of_the_rows(rows):
    x, h, y, weight, bias = rows
    basis, offset, left = torch.randn(3, 6), torch.randn(3), torch.randn(5, 3)
    found = errors_by_rank(missed(weight, bias, moments_of(x, h, y)), basis, offset, left)
    for rank in range(4):
        z = x @ basis[:rank].T.double() + offset[:rank]
        e = y - h @ weight.T - bias - z @ left[:, :rank].T.double()
        size = (y - y.mean(0)).square().sum()
        assert found[rank] == pytest.approx(float(e.square().sum() / size), rel=1e-9)


def test_a_rank_out_of_range_is_refused(rows):
    x, h, y, weight, bias = rows
    with pytest.raises(CalibrationError, match=r"lies in 1 to 5: got rank=6"):
        low_rank_correction(missed(weight, bias, moments_of(x, h, y)), 6, 0.0)
    with pytest.raises(ConfigError, match="lies in 1 to 8"):
        LowRankCorrection(16, 8, 9)
    with pytest.raises(ConfigError, match="correction_rank must be an integer >= 0"):
        ButterflyMoE(8, 16, 2, correction_rank=-1)


@pytest.mark.parametrize("gated", [False, True])
def test_the_layer_adds_it_once(gated):
    layer = ButterflyMoE(12, 20, 4, top_k=3, gated=gated, correction_rank=3).double().eval()
    plain = set_correction_(copy.deepcopy(layer), None)
    part = layer.correction
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    x = torch.randn(2, 7, 12).double()
    wanted = plain(x) + (x @ part.basis.T + part.offset) @ part.weight.T
    torch.testing.assert_close(layer(x), wanted)
    twin = ButterflyMoE(12, 20, 4, top_k=3, gated=gated).double().eval()
    assert torch.equal(twin(x), plain(x))  # and it draws nothing that others draw
    assert set_correction_(layer, part.leading(1)).settings["correction_rank"] == 1


def calibrated(name="llama", rank=4, **settings):
    model, probe = make(name)
    wanted = run(model, probe)
    report = calibrated_swap(
        model, ids(), num_experts=2, correction_rank=rank, calibration=quiet(), **settings
    )
    return model, probe, wanted, report


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_calibrated_swap_fits_it_and_gains_by_it(name):
    model, probe, wanted, report = calibrated(name)
    for block in report.calibration.blocks:
        assert len(block.by_rank) == 5 and block.error == block.by_rank[-1] <= block.by_rank[0]
    assert any(b.by_rank[-1] < 0.99 * b.by_rank[0] for b in report.calibration.blocks)
    assert " > " in str(report.calibration)
    layers = [layer for layer, _ in report.receipts]
    full = relative(run(model, probe), wanted)
    for layer in layers:
        set_correction_(layer, None)
    assert relative(run(model, probe), wanted) > full


def test_its_rows_tell_the_layers_bytes_and_the_moments_their_memory(tmp_path):
    model, _, _, report = calibrated()
    pack(model, tmp_path / "m.bfmoe")
    found = inspect_packed(tmp_path / "m.bfmoe")
    for row, sizes in zip(report.blocks, found.layers, strict=True):
        layer = model.get_submodule(row.path)
        assert row.packed_bytes == sizes.bytes == sizes.plan.bytes() == packed_bytes(layer, 2)
        assert sizes.parts["correction"] == 2 * 4 * (32 + 32) + 4 * 4
        assert row.parameters_after == sum(p.numel() for p in layer.parameters())
    plain = plan_memory(32, 64, 2).bytes()
    assert plan_memory(32, 64, 2, correction_rank=3).bytes() == plain + 2 * 3 * 64 + 12
    sizes = {"d_model": 8, "d_ff": 16, "d_out": 8, "gated": False}
    assert moment_bytes({**sizes, "correction_rank": 2}) > moment_bytes(sizes)


@pytest.mark.parametrize("angles", ["fp32", "fp16", "int8"])
def test_it_is_packed_and_loaded_exactly(angles, tmp_path):
    model, probe, _, report = calibrated()
    file, again = tmp_path / "m.bfmoe", tmp_path / "again.bfmoe"
    pack(model, file, angles=angles)
    loaded = load_packed(file, make("llama", seed=9)[0])
    assert verify_packed(file).layers == 2
    narrow = torch.float32 if angles == "fp32" else torch.float16
    for row in report.blocks:
        ours, theirs = (m.get_submodule(row.path).correction for m in (model, loaded))
        for leaf in ("basis", "weight", "offset"):
            wide = getattr(ours, leaf).detach()
            stored = wide if leaf == "offset" else wide.to(narrow)
            assert torch.equal(getattr(theirs, leaf), stored)
    if angles == "fp32":
        assert relative(run(loaded, probe), run(model, probe)) < 1e-6
    pack(loaded, again, angles=angles)
    assert again.read_bytes() == file.read_bytes()


def test_a_state_dict_alone_rebuilds_it():
    model, probe, _, _ = calibrated()
    fresh, _ = make("llama", seed=9)
    apply_swap_plan(fresh, plan_from_state_dict(model.state_dict()))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, probe), run(model, probe))
    assert set(parameter_roles(model).values()) >= {"correction"}


def test_it_trains_from_zero_after_a_plain_swap():
    model, _ = make("gpt2")
    before = run(model, ids(1)[0])
    swap_feed_forward(model, num_experts=2, correction_rank=2, angle_std=0.0)
    for layer in (m for m in model.modules() if isinstance(m, ButterflyMoE)):
        layer.set_blend(0.0)
    assert relative(run(model, ids(1)[0]), before) < 1e-5
    layers = [m for m in model.modules() if isinstance(m, ButterflyMoE)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):  # U learns once V has left zero
        model(ids(1)[0]).logits.square().mean().backward()
        for layer in layers:
            assert float(layer.correction.weight.grad.abs().max()) > 0
            assert (float(layer.correction.basis.grad.abs().max()) > 0) == (step > 0)
        optimizer.step()
        optimizer.zero_grad()


def test_pruned_experts_leave_it_and_the_exported_layer_has_it(tmp_path):
    model = nn.Sequential(ButterflyMoE(8, 16, 4, correction_rank=2, activation="silu"))
    with torch.no_grad():
        model[0].correction.weight.normal_()
    keep_experts_(model[0], [2, 0])
    pack(model, tmp_path / "m.bfmoe")
    loaded = load_packed(
        tmp_path / "m.bfmoe",
        nn.Sequential(ButterflyMoE(8, 16, 2, correction_rank=2, activation="silu")),
    )
    x = torch.randn(9, 8)
    with torch.no_grad():
        wanted = loaded(x)
        exported = ExportedMoE(copy.deepcopy(loaded[0]))
    torch.testing.assert_close(exported(x), wanted, rtol=1e-4, atol=1e-5)
    without = set_correction_(copy.deepcopy(loaded[0]), None)
    assert relative(without(x), wanted) > 0.05


def test_a_constant_input_gives_no_correction():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    data = [torch.ones(32, 8)] * 5
    with pytest.warns(UserWarning, match="lower rank|same value"):
        report = calibrated_swap(
            model, data, num_experts=2, correction_rank=2, calibration=Calibration(progress=False)
        )
    assert torch.isfinite(model(torch.randn(3, 8))).all()
    assert report.calibration.blocks[0].by_rank[0] == report.calibration.blocks[0].by_rank[-1]


def test_it_is_fitted_and_trained_inside_fit(tmp_path):
    module, start = Lit(), {}

    class Look(L.Callback):
        def on_train_start(self, trainer, module):
            start.update({n: p.detach().clone() for n, p in module.named_parameters()})

    ours = ButterflyMoECallback(
        2, init="calibrated", correction_rank=2, verbose=False,
        calibration=quiet(forward_fn=lambda m, batch: m.net(batch)),
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[ours, Look()],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.cat(ids()), batch_size=4))
    assert all(b.by_rank[2] <= b.by_rank[0] for b in ours.report.calibration.blocks)
    names = [n for n in start if ".correction." in n]
    assert len(names) == 6
    for name in names:
        assert float(start[name].abs().max()) > 0
        assert not torch.equal(module.get_parameter(name), start[name])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Lit, tmp_path / "a.ckpt")
    assert torch.equal(run(loaded.net, ids(1)[0]), run(module.net.eval(), ids(1)[0]))
