"""`ButterflyMoEStrategy` in two processes: their copies stay equal, and equal to one process."""

from datetime import timedelta

import lightning as L
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_bfmoe import ButterflyMoEStrategy, swap_feed_forward
from lightning_bfmoe.layers import parameter_roles, routers
from lightning_bfmoe.plan import Plan
from lightning_bfmoe.strategy import parameter_checksums
from lightning_bfmoe.strategy.buffers import KeptApart
from tests.lightning.modules import Block, InInit, Loader, make_trainer, state_of
from tests.lightning.processes import run_ranks, two_processes

pytestmark = two_processes
BATCHES, SIZE = 6, 8


class Momentum(InInit):
    """SGD on the global mean: what two processes must do as one."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class PartOf(Loader):
    """This process's rows of each global batch."""

    def __iter__(self):
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if world > 1 else 0
        for x, y in super().__iter__():
            yield x.double()[rank::world], y[rank::world]


def strategy(**settings):
    return ButterflyMoEStrategy(verbose=False, **{"num_experts": 4, **settings})


def train(folder, devices, callbacks=(), settings=None, module=Momentum, **others):
    torch.manual_seed(1)
    model = module().double()
    own = strategy(**(settings or {}))
    trainer = make_trainer(
        folder, *callbacks, devices=devices, strategy=own, use_distributed_sampler=False, **others
    )
    trainer.fit(model, PartOf(BATCHES, SIZE))
    return model, trainer


class Toggle(L.Callback):
    """Sets requires_grad of all parameters of a role before some batches: {batch: (role, flag)}."""

    def __init__(self, changes, only_rank=None):
        self.changes, self.only_rank = changes, only_rank
        self.wrappers = []

    def on_fit_start(self, trainer, module):
        self.set(trainer, module, self.changes.get("fit"))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 0:
            self.set(trainer, module, self.changes.get(batch_idx))

    def on_train_batch_end(self, trainer, *_):
        self.wrappers.append(id(trainer.strategy.model))

    def set(self, trainer, module, change):
        if change is not None and self.only_rank in (None, trainer.global_rank):
            for name, role in parameter_roles(module).items():
                if role == change[0]:
                    module.get_parameter(name).requires_grad_(change[1])


CHANGES = {"fit": ("angle", False), 2: ("angle", True), 3: ("latent", False), 5: ("latent", True)}


def phases(folder, devices):
    toggle = Toggle(CHANGES)
    model, _ = train(folder, devices, [toggle], {"check_replicas_every_n_steps": 1})
    return state_of(model), len(set(toggle.wrappers))


def test_phases_that_freeze_and_thaw_train_as_one_process(tmp_path):
    """The angles thaw after the first wrapping: plain DDP lets the processes part, silently."""
    alone, _ = phases(tmp_path, 1)
    (first, wraps), (second, _) = run_ranks(phases, tmp_path, tmp_path, 2)
    assert wraps >= 3
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)


def frozen_latents(folder, devices, freeze):
    plan = Plan(start=6, end=8, freeze_latents=4)
    model, trainer = train(folder, devices, settings={"plan": plan, "freeze": freeze})
    return state_of(model), [p.requires_grad for p in model.parameters()]


def test_a_frozen_phase_without_gradients_trains_as_one_process(tmp_path):
    alone, _ = frozen_latents(tmp_path, 1, "requires_grad")
    (first, flags), (second, _) = run_ranks(frozen_latents, tmp_path, tmp_path, 2, "requires_grad")
    assert all(flags)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)


class Save(L.Callback):
    """Saves after a number of batches."""

    def __init__(self, at, path):
        self.at, self.path, self.seen = at, path, 0

    def on_train_batch_end(self, trainer, module, *_):
        self.seen += 1
        if self.seen == self.at:
            trainer.save_checkpoint(self.path)


def resumed(folder, at, resume):
    """Train through and save on the way, or go on from there."""
    path = folder / "some.ckpt"
    torch.manual_seed(1)
    model, saves = Momentum().double(), Save(0 if resume else at, path)
    plan = Plan(start=6, end=9, freeze_latents=4)
    own = strategy(plan=plan, freeze="requires_grad", check_replicas_every_n_steps=3)
    trainer = make_trainer(folder, saves, devices=2, strategy=own, use_distributed_sampler=False)
    trainer.fit(model, PartOf(BATCHES, SIZE), ckpt_path=path if resume else None)
    return state_of(model)


@pytest.mark.parametrize("at", [2, 6])
def test_a_training_of_two_processes_is_resumed_exactly(at, tmp_path):
    """From within the frozen phase, and from behind it."""
    through, _ = run_ranks(resumed, tmp_path, tmp_path, at, False)
    for state in run_ranks(resumed, tmp_path, tmp_path, at, True):
        assert state.keys() == through.keys()
        assert all(torch.equal(state[name], value) for name, value in through.items())


def one_rank_freezes(folder, role):
    toggle = Toggle({2: (role, False)}, only_rank=1)
    train(folder, 2, [toggle], {"timeout": timedelta(seconds=6)})


def test_a_change_on_one_process_only_is_an_error_and_no_deadlock(tmp_path):
    with pytest.raises(RuntimeError, match="a change on process 1 that process 0 did not make"):
        run_ranks(one_rank_freezes, tmp_path, tmp_path, "angle")


class OtherRoles(L.Callback):
    """Each process freezes something else."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            module.net[trainer.global_rank].norm.weight.requires_grad_(False)


def each_rank_freezes_its_own(folder):
    train(folder, 2, [OtherRoles()], {"timeout": timedelta(seconds=20)})


def test_different_changes_are_an_error_that_names_them(tmp_path):
    with pytest.raises(RuntimeError, match=r"2 that are on one .*net.0.norm.weight, net.1.norm"):
        run_ranks(each_rank_freezes_its_own, tmp_path, tmp_path)


class Spoil(L.Callback):
    """Changes one number on one process."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3 and trainer.global_rank == 1:
            with torch.no_grad():
                module.net[2].bias[0] += 1e-15


def spoiled(folder):
    train(folder, 2, [Spoil()], {"check_replicas_every_n_steps": 2})


def test_parameters_that_differ_in_one_bit_are_found(tmp_path):
    with pytest.raises(RuntimeError, match=r"1 of \d+ that differ after step 4 \(net.2.bias\)"):
        run_ranks(spoiled, tmp_path, tmp_path)


class Collectives(L.Callback):
    """Counts what Python code sends during training batches, and looks at the wrapper."""

    def __init__(self):
        self.calls, self.seen = [], {}

    def on_train_start(self, trainer, module):
        for name in ("barrier", "all_reduce", "all_gather", "broadcast"):
            original = getattr(torch.distributed, name)

            def counted(*args, name=name, original=original, **kwargs):
                self.calls.append(name)
                return original(*args, **kwargs)

            setattr(torch.distributed, name, counted)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        ddp = trainer.strategy.model
        self.seen["broadcast"] = [list(b.shape) for b in ddp.modules_buffers]
        self.seen["view"] = ddp.gradient_as_bucket_view

    def on_train_end(self, trainer, module):
        self.seen["calls"] = list(self.calls)


class WithNorm(Momentum):
    """A buffer of the user's beside ours."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mine", torch.zeros(7))


def collectives(folder):
    counts = Collectives()
    model, _ = train(folder, 2, [counts], module=WithNorm)
    ours = [router.balance_bias for _, router in routers(model)]
    moved = all(bias.any() for bias in ours)
    return counts.seen, moved, hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_a_step_sends_gradients_one_sum_of_loads_and_no_buffer_of_ours(tmp_path):
    for seen, moved, still_ignored in run_ranks(collectives, tmp_path, tmp_path):
        assert seen["broadcast"] == [[7]]
        # Lightning's own broadcast tells of a SIGTERM, its own reduction has a barrier.
        assert set(seen["calls"]) <= {"all_reduce", "broadcast"}
        assert seen["calls"].count("all_reduce") == 2 * BATCHES
        assert seen["calls"].count("broadcast") <= 2 * BATCHES
        assert seen["view"] and moved and not still_ignored


def unequal_start(folder):
    """A process that comes with another balance bias, as after a half-read checkpoint."""
    torch.manual_seed(1)
    model = Momentum().double()
    swap_feed_forward(model, num_experts=4, balance_rate=0.0)
    trainer = make_trainer(
        folder, devices=2, strategy=strategy(balance_rate=0.0), use_distributed_sampler=False
    )
    for _, router in routers(model):
        router.balance_bias += trainer.global_rank
    trainer.fit(model, PartOf(2, SIZE))
    return [float(router.balance_bias.sum()) for _, router in routers(model)]


def test_balance_biases_are_shared_once_when_the_model_is_wrapped(tmp_path):
    first, second = run_ranks(unequal_start, tmp_path, tmp_path)
    assert first == second == [0.0, 0.0]


def test_what_the_user_keeps_out_of_the_broadcast_stays_out():
    module = WithNorm()
    swap_feed_forward(module, num_experts=2)
    module._ddp_params_and_buffers_to_ignore = ["mine"]
    apart = KeptApart(module)
    biases = [f"net.{i}.mlp.router.balance_bias" for i in (0, 1)]
    assert module._ddp_params_and_buffers_to_ignore == ["mine", *biases]
    assert list(apart.tensors()) == biases
    apart.release()
    assert module._ddp_params_and_buffers_to_ignore == ["mine"]


class Gradients(L.Callback):
    """The averaged gradients of the first step."""

    def __init__(self):
        self.first = None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in module.named_parameters()}


class Single(PartOf):
    """In float32, which is what is compressed."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x.float(), y


def gradients(folder, compress):
    torch.manual_seed(1)
    model, seen = Momentum(), Gradients()
    own = strategy(compress=compress)
    trainer = make_trainer(
        folder, seen, devices=2, strategy=own, use_distributed_sampler=False, max_epochs=1
    )
    trainer.fit(model, Single(BATCHES, SIZE))
    return seen.first, parameter_checksums(model), own.traffic.sent, parameter_roles(model)


def test_compression_rounds_the_shared_matrices_gradients_and_nothing_else(tmp_path):
    (plain, _, sent, _), _ = run_ranks(gradients, tmp_path, tmp_path, None)
    assert sent == 0
    (first, sums, sent, roles), (second, others, _, _) = run_ranks(
        gradients, tmp_path, tmp_path, "bf16"
    )
    assert torch.equal(sums, others)
    narrow = 0
    for name, gradient in plain.items():
        assert torch.equal(first[name], second[name]), name
        if roles.get(name) == "latent":
            narrow += gradient.numel()
            error = (first[name] - gradient).norm() / gradient.norm()
            assert 1e-5 < error < 2**-8, name
        else:
            torch.testing.assert_close(first[name], gradient, rtol=0, atol=1e-8)
    total = sum(gradient.numel() for gradient in plain.values())
    assert sent == BATCHES * (4 * (total - narrow) + 2 * narrow)


def test_equal_tensors_have_equal_checksums_and_a_bit_shows():
    layer = torch.nn.Linear(64, 3)
    before = parameter_checksums(layer)
    assert before.dtype == torch.int64 and torch.equal(before, parameter_checksums(layer))
    with torch.no_grad():
        layer.weight[1, 5] = torch.nextafter(layer.weight[1, 5], torch.tensor(9.0))
    after = parameter_checksums(layer)
    assert (after != before).tolist() == [True, False]
    kinds = [torch.bool, torch.uint8, torch.bfloat16, torch.complex64, torch.float64]
    tensors = {str(kind): torch.ones(3, dtype=kind) for kind in kinds}
    assert parameter_checksums(layer, tensors).shape == (7,)


def test_the_private_names_are_there():
    """What the strategy takes from torch and Lightning beyond their documented names."""
    assert callable(DistributedDataParallel._set_params_and_buffers_to_ignore_for_model)
    assert callable(DistributedDataParallel._remove_autograd_hooks)
    module = Block()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["a"])
    assert module._ddp_params_and_buffers_to_ignore == ["a"]
    from lightning.fabric.utilities.distributed import _distributed_is_initialized
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
    from torch.distributed.distributed_c10d import _get_default_store

    assert callable(_distributed_is_initialized) and callable(_get_default_store)
    assert callable(_MultiProcessingLauncher._recover_results_in_main_process)
    for name in ("_configure_launcher", "_setup_model", "_register_ddp_hooks", "configure_ddp"):
        assert callable(getattr(DDPStrategy, name)), name
    own = DDPStrategy()
    assert own._pl_static_graph_delay_done is False and own._start_method == "popen"
