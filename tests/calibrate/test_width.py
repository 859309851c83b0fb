"""Atomic scores against autograd, and the narrower swap they serve."""

import pytest
import torch
from torch.nn import functional as F

from lightning_bfmoe import calibrated_swap, restore
from lightning_bfmoe.calibrate import Moments, Recipe
from lightning_bfmoe.calibrate.refit import best_bias, refit_output
from lightning_bfmoe.calibrate.width import atomic_scores, gradient_moments, kept_units
from lightning_bfmoe.errors import CalibrationError, ConfigError
from tests.calibrate.test_calibrated_swap import ids, quiet
from tests.swap.zoo import W123, Plain, make, relative, run, state


def language_loss(model, batch):
    logits = run(model, batch)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch[:, 1:].flatten())


def batches(count=4):
    return [(batch, i == count - 1) for i, batch in enumerate(ids(count))]


def test_scores_are_those_of_the_formula():
    energy, down = torch.rand(7).double(), torch.randn(4, 7).double()
    g = torch.randn(90, 4).double()
    wanted = [float(energy[k] * sum((row @ down[:, k]) ** 2 for row in g) / 90) for k in range(7)]
    found = atomic_scores(energy, down, g.T @ g / 90)
    torch.testing.assert_close(found, torch.tensor(wanted).double())
    plain = energy * down.square().sum(0)
    torch.testing.assert_close(atomic_scores(energy, down), plain)
    assert kept_units(torch.tensor([1.0, 5.0, 3.0, 5.0]), 2).tolist() == [1, 3]


def test_gradients_are_those_of_autograd():
    model = make("llama")[0].double()
    paths = {f"model.layers.{i}.mlp": 32 for i in range(2)}
    found = gradient_moments(model, paths, batches(), language_loss)
    for path in paths:  # by hand: add a zero to the block's output, and differentiate by it
        total, count = torch.zeros(32, 32).double(), 0
        for batch, held in batches():
            if held:
                continue
            zero = torch.zeros(*batch.shape, 32, dtype=torch.float64, requires_grad=True)
            handle = model.get_submodule(path).register_forward_hook(lambda m, a, y: y + zero)  # noqa: B023
            (g,) = torch.autograd.grad(language_loss(model, batch), zero)
            handle.remove()
            g = g.flatten(0, 1)
            total, count = total + g.T @ g, count + len(g)
        torch.testing.assert_close(found[path], total / count, rtol=1e-6, atol=1e-12)


def test_the_model_is_left_as_it_was():
    model = make("llama")[0].train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    gradient_moments(model, {"model.layers.0.mlp": 32}, batches(), language_loss)
    assert [p.requires_grad for p in model.parameters()] == before and not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_dropped_units_are_the_ones_that_cost_least():
    """The score is the loss of a quadratic model without the unit, exactly, where both factor."""
    torch.manual_seed(0)
    h, down = torch.randn(4000, 9).double() * torch.rand(9).double(), torch.randn(5, 9).double()
    root = torch.randn(5, 5).double()
    m = root.T @ root  # the Hessian of |root y|^2 / 2 by the output y
    scores = atomic_scores(h.square().mean(0), down, m)
    brute = [
        (h[:, k : k + 1] @ down[:, k : k + 1].T @ root.T).square().sum(1).mean() for k in range(9)
    ]
    torch.testing.assert_close(scores, torch.stack(brute))


def test_the_refit_of_what_is_left_is_least_squares():
    """The recipe's refit, from moments of kept units and targets of all, against rows in double."""
    h = torch.randn(500, 10).double() @ torch.randn(10, 10).double() + 1
    down = torch.randn(4, 10).double()
    kept = torch.tensor([0, 2, 3, 7, 8])
    moments = Moments(5, 4)
    moments.update(h[:, kept], h @ down.T)
    found = refit_output(down[:, kept], moments, 0.0)
    ones = torch.cat([h[:, kept], torch.ones(500, 1).double()], dim=1)
    wanted = torch.linalg.lstsq(ones, h @ down.T).solution
    torch.testing.assert_close(found, wanted[:5].T)
    torch.testing.assert_close(best_bias(found, moments), wanted[5])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "encoder", "fused-gate"])
def test_a_narrower_swap_is_undone_exactly(name):
    model, probe = make(name)
    before, wanted = state(model), run(model, probe)
    report = calibrated_swap(model, ids(), num_experts=4, calibration=quiet(), width=0.5)
    errors = [relative(run(model, probe), wanted)]
    dense = {row.d_ff for row in report.blocks}
    restore(model, report)
    assert all(torch.equal(before[k], v) for k, v in state(model).items() if torch.is_tensor(v))
    report = calibrated_swap(model, ids(), num_experts=4, calibration=quiet())
    errors.append(relative(run(model, probe), wanted))
    assert {2 * d for d in dense} == {row.d_ff for row in report.blocks}
    assert errors[1] < errors[0] < 0.6


def test_scores_choose_better_than_chance():
    """Half of the units hardly move: they go, with and without a loss, and little is lost."""
    found = {}
    for loss_fn in (None, language_loss):
        model = make("llama")[0]
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data[::2] *= 1e-3
        probe = ids(1, seed=9)[0]
        wanted = run(model, probe)
        settings = quiet(recipe=Recipe(noise=0.0))
        calibrated_swap(model, ids(), calibration=settings, width=24, loss_fn=loss_fn)
        assert model.model.layers[0].mlp.d_ff == 24
        found[loss_fn] = relative(run(model, probe), wanted)
    whole = make("llama")[0]
    for layer in whole.model.layers:
        layer.mlp.up_proj.weight.data[::2] *= 1e-3
    calibrated_swap(whole, ids(), calibration=quiet(recipe=Recipe(noise=0.0)))
    bound = 1.3 * relative(run(whole, probe), wanted)
    assert all(error < bound for error in found.values()), (found, bound)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"width": 1}, "from 2 to 40"),
        ({"width": 41}, "from 2 to 40"),
        ({"width": 1.5}, "from 2 to 40"),
        ({"loss_fn": language_loss}, "loss_fn scores the hidden units that width= keeps"),
        ({"width": 8, "loss_fn": lambda m, b: m(b)}, "loss_fn returns a finite scalar"),
        ({"width": 8, "loss_fn": lambda m, b: m(b).sum() * float("nan")}, "finite scalar"),
        ({"width": 8, "loss_fn": lambda m, b: m.embed(b).sum()}, "finite scalar that depends"),
    ],
)
def test_what_cannot_be_narrowed_is_refused(settings, match):
    model = Plain(W123())
    before = list(model.named_modules())
    with pytest.raises((ConfigError, CalibrationError), match=match):
        calibrated_swap(model, ids(), calibration=quiet(), **settings)
    assert list(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_blocks_that_are_spread_need_scores_without_a_loss():
    with pytest.raises(ConfigError, match="spread over several"):
        calibrated_swap(
            make("bert")[0], ids(), calibration=quiet(), width=0.5, loss_fn=language_loss
        )
