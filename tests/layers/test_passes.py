"""What the router counts: each pass that is trained on, once; and its noise, step by step."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_bfmoe.functional import balance_step
from lightning_bfmoe.layers import ButterflyMoE, TopKRouter, balance_together, update_balance

KINDS = {"plain": None, "reentrant": True, "non-reentrant": False}


def make(**settings):
    return ButterflyMoE(12, 20, num_experts=4, top_k=2, **settings)


def run(layer, x, kind):
    """Forward and backward; gradients of the router's weight."""
    x = x.clone().requires_grad_()
    reentrant = KINDS[kind]
    y = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
    y.square().mean().backward()
    return layer.router.weight.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"switch_weight": 2.0, "z_weight": 1.0}])
def test_checkpointing_counts_once_and_changes_no_gradient(kind, settings):
    x, plain, layer = torch.randn(10, 12), make(**settings), make(**settings)
    expected = run(plain, x, "plain")
    assert torch.equal(run(layer, x, kind), expected)
    assert layer.router.pending_load.equal(plain.last_routing.load)
    run(layer, x, "plain")  # a micro-batch without checkpointing weighs as much
    assert layer.router.pending_load.equal(2 * plain.last_routing.load)


@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("inner", KINDS)
def test_checkpoints_inside_checkpoints_count_once(outer, inner):
    layer, x = make(), torch.randn(10, 12, requires_grad=True)

    def call(function, kind):
        reentrant = KINDS[kind]
        return function if reentrant is None else lambda x: checkpoint(
            function, x, use_reentrant=reentrant
        )  # fmt: skip

    call(call(layer, inner), outer)(x).sum().backward()
    assert layer.router.pending_load.sum() == 10 * 2


@pytest.mark.slow
def test_compiled_layers_count_once():
    # in a process of its own: dynamo does not trace through the shape checker of the tests
    code = """
        import torch
        from torch.utils.checkpoint import checkpoint
        from lightning_bfmoe.layers import ButterflyMoE

        class Model(torch.nn.Module):
            def __init__(self, reentrant):
                super().__init__()
                self.layer = ButterflyMoE(12, 20, num_experts=4, top_k=2, switch_weight=0.5,
                                          router_noise=0.5)
                self.reentrant = reentrant

            def forward(self, x):
                if self.reentrant is None:
                    return self.layer(x)
                return checkpoint(self.layer, x, use_reentrant=self.reentrant)

        x, loads, gradients = torch.randn(10, 12), [], []
        for reentrant in (None, True, False):
            for where in ("nowhere", "model", "layer"):
                model = Model(reentrant)
                if where == "model":
                    model.compile(backend="aot_eager")
                elif where == "layer":
                    model.layer.compile(backend="aot_eager", fullgraph=True)
                model(x.clone().requires_grad_()).square().mean().backward()
                loads.append(model.layer.router.pending_load)
                gradients.append(model.layer.router.weight.grad)
        assert all(load.equal(loads[0]) for load in loads), loads
        assert loads[0].sum() == 20
        for gradient in gradients:
            torch.testing.assert_close(gradient, gradients[0])
        print("same")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["same"], done.stderr[-3000:]


def test_a_frozen_router_is_not_balanced():
    layer, x = make(balance_rate=0.1), torch.randn(10, 12)
    layer.router.requires_grad_(False)
    layer(x).sum().backward()
    update_balance(layer)
    assert layer.router.balance_bias.eq(0).all() and layer.last_routing.load.sum() == 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_tokens_without_a_finite_logit_do_not_move_the_balance(bad):
    layer, x = make(balance_rate=0.1, switch_weight=1.0), torch.randn(10, 12)
    layer(x)
    good = layer.last_routing
    expected = balance_step(torch.zeros(4), layer.router.pending_load, 0.1)
    mixed = torch.cat([x, torch.full((30, 12), bad)])
    layer.router._pending_load.zero_()
    layer(mixed)
    assert layer.last_routing.load.equal(good.load)
    update_balance(layer)
    torch.testing.assert_close(layer.router.balance_bias, expected - expected.mean())
    moved = layer.router.balance_bias.clone()
    layer(mixed[10:])
    update_balance(layer)
    assert layer.router.balance_bias.equal(moved), "nothing but NaN: nothing moves"


def test_a_batch_without_tokens_has_no_loss_and_moves_nothing():
    layer = make(switch_weight=1.0, z_weight=1.0)
    layer(torch.zeros(0, 12)).sum().backward()
    assert layer.last_routing.loss == 0
    assert all(p.grad is None or p.grad.eq(0).all() for p in layer.parameters())
    update_balance(layer)
    assert layer.router.balance_bias.eq(0).all()


def test_routers_are_balanced_together_as_one_by_one():
    sizes = [(4, 0.1), (4, 0.1), (7, 0.1), (4, 0.0), (4, 0.2), (4, 0.1)]
    together = [TopKRouter(6, n, 2, balance_rate=rate) for n, rate in sizes]
    for i, router in enumerate(together[:-1]):  # the last saw nothing
        router(torch.randn(5 + i, 6))
    one_by_one = copy.deepcopy(together)
    balance_together(together)
    for router, (_, rate), twin in zip(together, sizes, one_by_one, strict=True):
        twin.update_balance()
        assert router.balance_bias.equal(twin.balance_bias)
        assert router.pending_load.eq(0).all()
        assert router.balance_bias.any() == (rate > 0 and router is not together[-1])


class Synchronisations(TorchDispatchMode):
    """Counts the operations that bring a number to the host."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(function) or "nonzero.default" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_routing_and_balancing_never_wait_for_the_device():
    settings = {"switch_weight": 1.0, "z_weight": 1.0, "noise": 1.0}
    routers = [TopKRouter(12, 4, 2, **settings) for _ in range(2)]
    x, scale = torch.randn(10, 12), torch.tensor(0.5)
    with Synchronisations() as seen:
        for router in routers:
            router.set_loss_scale(scale)
            routing = router(x)
            (routing.weights.square().sum() + routing.loss).backward()
        balance_together(routers)
    assert seen.names == []
    with seen:
        assert bool(x.any())
    assert len(seen.names) == 1, "the check sees one"


def test_noise_acts_in_training_and_is_new_each_step():
    layer = make(router_noise=3.0)
    x = torch.randn(64, 12)
    before = torch.get_rng_state()
    first, again = layer.router(x).experts, layer.router(x).experts
    update_balance(layer)
    assert first.equal(again) and not layer.router(x).experts.equal(first)
    layer.eval()
    quiet = layer.router(x).experts
    assert quiet.equal(layer.router(x).experts) and not quiet.equal(first)
    assert torch.get_rng_state().equal(before), "the global generator never moves"
    assert "router.noise_counter" not in make().state_dict()


def test_noise_has_its_strength_and_follows_both_seeds():
    def logits(seed, global_seed):
        torch.manual_seed(global_seed)
        router = make(router_noise=0.5, seed=seed).router
        torch.nn.init.zeros_(router.weight)
        return router(torch.zeros(4000, 12)).probs.log()

    first = logits(0, 0)
    assert first.std(dim=1).square().mean().sqrt().item() == pytest.approx(0.5, rel=0.03)
    assert first.equal(logits(0, 0))
    assert not first.equal(logits(1, 0)) and not first.equal(logits(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_repeated_by_checkpointing_and_goes_on_after_loading(kind):
    x, plain = torch.randn(30, 12), make(router_noise=2.0)
    expected = run(plain, x, "plain")
    other = make(router_noise=2.0)
    assert torch.equal(run(other, x, kind), expected)
    update_balance(plain)
    torch.manual_seed(99)
    resumed = make(router_noise=2.0, seed=5)
    resumed.load_state_dict(plain.state_dict())
    assert resumed.router(x).experts.equal(plain.router(x).experts)


def test_the_loss_scale_may_be_a_tensor():
    router = make(switch_weight=1.0).router
    router.set_loss_scale(torch.tensor(0.25, dtype=torch.float64))
    assert router.loss_scale == 0.25 and router.loss_scale.dtype == torch.float32
