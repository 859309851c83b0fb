"""Where a module builds its layers x what is done with it: every cell works, on one code path."""

import copy
import pickle

import pytest
import torch

from lightning_bfmoe import ButterflyMoECallback, load_from_checkpoint
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.layers.state import decode_extra_state
from lightning_bfmoe.plan import Plan
from tests.lightning.modules import (
    MODULES,
    PLACES,
    Loader,
    StopAt,
    assert_same_state,
    make_trainer,
    state_of,
)


def callback(**settings) -> ButterflyMoECallback:
    return ButterflyMoECallback(num_experts=4, verbose=False, switch_weight=0.01, **settings)


def fitted(place, tmp_path, **settings):
    """A trained module, its trainer and a checkpoint of its end."""
    torch.manual_seed(1)
    module = MODULES[place]()
    trainer = make_trainer(tmp_path, callback(), **settings)
    trainer.fit(module, Loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    return module, trainer, tmp_path / "end.ckpt"


@pytest.mark.parametrize("place", PLACES)
def test_fit_swaps_every_block_and_trains_every_parameter(place, tmp_path):
    module, trainer, _ = fitted(place, tmp_path, max_epochs=3)
    assert [name for name, _ in moe_layers(module)] == ["net.0.mlp", "net.1.mlp"]
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    moments = trainer.optimizers[0].state
    assert [n for n, p in module.named_parameters() if not moments[p]["exp_avg"].any()] == []
    assert len(trainer.callbacks[0].report) == 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stop", [4, 9])
def test_a_resumed_training_is_bit_equal(place, stop, tmp_path):
    def run(name, *others):
        torch.manual_seed(1)
        module = MODULES[place]()
        cb = callback(plan=Plan(start=0.1, end=0.9, angle_warmup=0.5))
        return module, cb, make_trainer(tmp_path / name, cb, *others)

    whole, whole_callback, trainer = run("whole")
    trainer.fit(whole, Loader())

    first, _, trainer = run("first", StopAt(stop, tmp_path / "stop.ckpt"))
    trainer.fit(first, Loader())
    assert trainer.global_step == stop

    second, second_callback, trainer = run("second")
    trainer.fit(second, Loader(), ckpt_path=tmp_path / "stop.ckpt")
    assert_same_state(whole, second)
    assert second.losses == whole.losses[stop:]
    assert second_callback.state_dict() == whole_callback.state_dict()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_new_trainer_tests_and_predicts_from_the_file(place, weights_only, tmp_path):
    module, trainer, path = fitted(place, tmp_path)
    if weights_only:
        trainer.save_checkpoint(path, weights_only=True)
    expected = trainer.predict(module, Loader())
    loss = trainer.test(module, Loader(), verbose=False)

    for_test, for_predict = MODULES[place](), MODULES[place]()
    fresh = make_trainer(tmp_path, callback())
    assert fresh.test(for_test, Loader(), ckpt_path=path, verbose=False) == loss
    found = make_trainer(tmp_path, callback()).predict(for_predict, Loader(), ckpt_path=path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_same_state(for_test, module)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weights_only", [False, True])
def test_load_from_checkpoint_needs_no_trainer(place, weights_only, tmp_path):
    module, trainer, path = fitted(place, tmp_path)
    if weights_only:
        trainer.save_checkpoint(path, weights_only=True)
    loaded = load_from_checkpoint(MODULES[place], path)
    assert_same_state(loaded, module)
    assert "on_load_checkpoint" not in vars(MODULES[place])
    # a loaded module is swapped already, so a callback takes it as it is
    trainer = make_trainer(tmp_path, callback())
    assert trainer.test(loaded, Loader(), verbose=False)[0]["test_loss"] > 0
    assert_same_state(loaded, module)


@pytest.mark.parametrize("place", PLACES)
def test_checkpoints_are_plain_data(place, tmp_path):
    _, trainer, path = fitted(place, tmp_path)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for file in (path, tmp_path / "weights.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        extra = decode_extra_state(checkpoint["state_dict"]["net.0.mlp._extra_state"])
        assert extra["blend"] == 1.0


@pytest.mark.parametrize("place", PLACES)
def test_a_fitted_module_is_copied_and_pickled(place, tmp_path):
    module, trainer, _ = fitted(place, tmp_path)
    cb = trainer.callbacks[0]
    module.trainer = None
    copied = copy.deepcopy(module)
    assert_same_state(copied, module)
    assert_same_state(pickle.loads(pickle.dumps(module)), module)
    before = state_of(module)
    trainer = make_trainer(tmp_path, callback())
    trainer.fit(copied, Loader())
    assert all(torch.equal(before[key], value) for key, value in state_of(module).items())
    for twin in (copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))):
        assert twin.state_dict() == cb.state_dict() and len(twin.report) == 2


@pytest.mark.parametrize("place", PLACES)
def test_fit_validate_test_and_fit_again_with_one_trainer(place, tmp_path):
    module, trainer, _ = fitted(place, tmp_path)
    layers = [layer for _, layer in moe_layers(module)]
    trainer.validate(module, Loader(), verbose=False)
    trainer.test(module, Loader(), verbose=False)
    trainer.fit_loop.max_epochs = 3
    with pytest.warns(UserWarning, match="planned for 12 steps and would now take 18"):
        trainer.fit(module, Loader())
    assert [layer for _, layer in moe_layers(module)] == layers
    assert not {"setup", "configure_model"} & set(vars(module))


def test_a_swap_does_not_move_the_random_state(tmp_path):
    drawn = {}
    for name, callbacks in {"dense": (), "swapped": (callback(),)}.items():
        torch.manual_seed(3)
        trainer = make_trainer(tmp_path, *callbacks, max_epochs=1)
        trainer.fit(MODULES["init"](), Loader())
        drawn[name] = torch.rand(3)
    assert torch.equal(drawn["dense"], drawn["swapped"])
