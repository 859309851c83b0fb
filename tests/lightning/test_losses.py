"""The layers' own losses act as if the user had written `loss + auxiliary`, scaled or not."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.checkpoint import checkpoint

from lightning_bfmoe import ButterflyMoECallback
from lightning_bfmoe.layers import routers, set_blend, set_loss_scale
from lightning_bfmoe.swap import swap_feed_forward
from tests.lightning.modules import (
    D,
    InInit,
    Loader,
    StopAt,
    assert_same_state,
    make_trainer,
)

SCALE = 2.0**10


class Manual(InInit):
    """The same step under manual optimisation, two batches to an optimizer step."""

    def __init__(self, lr=1e-2):
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Checkpointed(InInit):
    """Runs its blocks' forward passes twice, the first time without gradients when reentrant."""

    reentrant: bool | None = False

    def forward(self, x):
        if self.reentrant is None:
            return self.net(x)
        for block in self.net[:2]:
            x = checkpoint(block, x.requires_grad_(), use_reentrant=self.reentrant)
        return self.net[2](x)


class Reentrant(Checkpointed):
    reentrant = True


class FirstGradients(Callback):
    """Keeps a copy of the model before the first step, and the gradients that step uses."""

    def on_train_start(self, trainer, module):
        module.trainer, owner = None, module.trainer
        self.twin, self.found = copy.deepcopy(module), None
        module.trainer = owner

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.found is None:
            self.found = {n: r.weight.grad.clone() for n, r in routers(module)}


def explicit_gradients(module, batches, autocast, weight):
    """Router gradients of the mean over batches of `loss + weight * auxiliary`, written out.

    The backward pass of manual optimisation runs under autocast, as Lightning has it.
    """
    set_loss_scale(module, 0.0)  # the layers themselves add nothing
    module.reentrant = None
    terms = []
    hooks = [
        r.register_forward_hook(lambda m, a, out: terms.append(out.loss))
        for _, r in routers(module)
    ]
    for batch in batches:
        terms.clear()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = SCALE * (module.loss(batch) + weight * sum(terms)) / len(batches)
        inside = autocast and not module.automatic_optimization
        with torch.autocast("cpu", torch.float16, enabled=inside):
            loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: r.weight.grad / SCALE for name, r in routers(module)}


@pytest.mark.parametrize("kind", [InInit, Manual, Checkpointed, Reentrant])
@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "GradScaler"])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
def test_gradients_equal_those_of_an_explicit_sum(kind, scaled, z_weight, tmp_path):
    # the user divides a manual loss, so there an auxiliary loss is one per batch, not their mean
    batches, weight = (2, 2.0) if kind is Manual else (3, 1.0)
    settings = {} if kind is Manual else {"accumulate_grad_batches": batches}
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    ours = ButterflyMoECallback(num_experts=4, verbose=False, switch_weight=5.0, z_weight=z_weight)
    first = FirstGradients()
    make_trainer(tmp_path, ours, first, max_steps=2, **settings).fit(kind(), Loader())

    data = Loader().data[:batches]
    wanted = explicit_gradients(copy.deepcopy(first.twin), data, scaled, weight)
    without = explicit_gradients(copy.deepcopy(first.twin), data, scaled, 0.0)
    for name, gradient in first.found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
        assert (gradient - without[name]).abs().max() > 0.1 * gradient.abs().max()


def test_a_disabled_scaler_scales_nothing(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=False)
    trainer = make_trainer(
        tmp_path,
        ButterflyMoECallback(num_experts=4, verbose=False, switch_weight=0.1),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        accumulate_grad_batches=2,
        max_epochs=1,
    )
    module = InInit()
    trainer.fit(module, Loader())
    assert {router.loss_scale.item() for _, router in routers(module)} == {0.5}


def test_the_balance_bias_moves_once_per_optimizer_step(tmp_path):
    class Biases(Callback):
        seen: list = []

        def on_train_batch_end(self, trainer, module, *_):
            self.seen.append([r.balance_bias.clone() for _, r in routers(module)])

    biases = Biases()
    ours = ButterflyMoECallback(num_experts=4, verbose=False, balance_rate=0.125)
    trainer = make_trainer(tmp_path, ours, biases, accumulate_grad_batches=3, max_epochs=1)
    trainer.fit(InInit(), Loader())
    first = torch.stack([layer[0] for layer in biases.seen])  # (batches, experts)
    assert not first[:2].any() and first[2].any()
    assert torch.equal(first[2], first[3]) and torch.equal(first[2], first[4])
    assert not torch.equal(first[4], first[5])
    assert first[2].abs().max() <= 0.25 and first[2].sum().abs() < 1e-6


class OnRank(InInit):
    """Every rank has data of its own."""

    def train_dataloader(self):
        return Loader(4, seed=self.global_rank)


class KeepOnRank(FirstGradients):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, module):
        torch.save(self.found, self.path / f"rank{trainer.global_rank}.pt")


def test_two_processes_average_the_losses_of_the_layers_too(tmp_path):
    module = OnRank()
    swap_feed_forward(module, num_experts=4, switch_weight=5.0, z_weight=0.3)
    twin = copy.deepcopy(module)
    set_blend(twin, 0.0)  # as the plan begins
    ours = ButterflyMoECallback(num_experts=4, verbose=False, switch_weight=5.0, z_weight=0.3)
    trainer = make_trainer(
        tmp_path, ours, KeepOnRank(tmp_path), strategy="ddp_fork", devices=2, max_steps=1
    )
    trainer.fit(module)
    data = [Loader(4, seed=rank).data[0] for rank in (0, 1)]
    wanted = explicit_gradients(twin, data, False, 1.0)  # of the mean over both ranks
    for rank in (0, 1):
        for name, gradient in torch.load(tmp_path / f"rank{rank}.pt").items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_training_with_router_noise_resumes_exactly(tmp_path, stop):
    def fit(*callbacks, seed, ckpt_path=None):
        torch.manual_seed(seed)
        module = InInit()
        ours = ButterflyMoECallback(num_experts=4, verbose=False, router_noise=1.0)
        trainer = make_trainer(tmp_path, ours, *callbacks, max_epochs=2)
        trainer.fit(module, Loader(5), ckpt_path=ckpt_path)
        return module

    path = tmp_path / "at.ckpt"
    whole = fit(seed=0)
    fit(StopAt(stop, path), seed=0)
    assert_same_state(fit(seed=1, ckpt_path=path), whole)  # another seed: the state has the key


class Odd(InInit):
    """A batch of NaN whose loss is thrown away, then one without tokens."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            self.loss((batch[0] * float("nan"), batch[1]))
            return None
        if batch_idx == 3:
            return self.net(torch.zeros(0, D)).sum()
        return super().training_step(batch, batch_idx)


class Biases(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        self.seen.append(torch.stack([r.balance_bias.clone() for _, r in routers(module)]))


def test_not_a_number_and_no_tokens_move_no_balance(tmp_path):
    biases, module = Biases(), Odd()
    ours = ButterflyMoECallback(num_experts=4, verbose=False, switch_weight=1.0, z_weight=1.0)
    make_trainer(tmp_path, ours, biases, max_epochs=1).fit(module, Loader(5))
    moved = [not torch.equal(a, b) for a, b in zip(biases.seen, biases.seen[1:], strict=False)]
    assert moved == [True, False, False, True]
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_step_that_a_grad_scaler_skips_still_balances(tmp_path):
    # the load of the step was real, and the balance needs no gradient
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    biases, module = Biases(), InInit()
    ours = ButterflyMoECallback(num_experts=4, verbose=False, switch_weight=1.0, balance_rate=0.125)
    trainer = make_trainer(
        tmp_path, ours, biases, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_steps=3
    )
    torch.manual_seed(0)
    trainer.fit(module, Loader(5))
    assert scaler.get_scale() == 2.0**57, "every step was skipped"
    before = [torch.zeros(2, 4), *biases.seen]
    assert not any(torch.equal(a, b) for a, b in zip(before, biases.seen, strict=False))
    assert all(bias.isfinite().all() for bias in biases.seen)
    assert all(p.isfinite().all() for p in module.parameters())
