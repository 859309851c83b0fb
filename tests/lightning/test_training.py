"""The plan in a running Trainer: counting, lambda, logs, precision, and unusual ways to train."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_bfmoe import ButterflyMoECallback
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.layers.state import decode_extra_state
from lightning_bfmoe.plan import Plan, plan_at
from tests.lightning.modules import (
    MODULES,
    PLACES,
    InInit,
    Loader,
    StopAt,
    assert_same_state,
    blend_in,
    make_trainer,
)
from tests.plan.spy import spy_on_steps


def callback(**settings) -> ButterflyMoECallback:
    return ButterflyMoECallback(**{"num_experts": 4, "verbose": False, **settings})


class Blends(Callback):
    """Lambda as training and validation see it."""

    def __init__(self):
        self.training, self.validation = [], []

    def on_before_backward(self, trainer, module, loss):
        self.training.append(next(moe_layers(module))[1].blend)

    def on_validation_batch_start(self, trainer, module, *_):
        if not trainer.sanity_checking:
            self.validation.append(next(moe_layers(module))[1].blend)


class TwoOptimizers(InInit):
    """Manual optimisation: both optimizers step on every batch."""

    def __init__(self, lr=1e-2):
        super().__init__(lr)
        self.automatic_optimization = False

    def configure_optimizers(self):
        body, head = self.net[:2].parameters(), self.net[2].parameters()
        return torch.optim.AdamW(body, lr=0.01), torch.optim.SGD(head, lr=0.01)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize(
    ("kind", "settings", "steps", "batches"),
    [
        (InInit, {}, 12, 12),
        (InInit, {"accumulate_grad_batches": 3}, 4, 12),
        (InInit, {"accumulate_grad_batches": 4}, 4, 12),
        (InInit, {"max_steps": 5, "max_epochs": -1}, 5, 5),
        (TwoOptimizers, {}, 12, 12),
        (TwoOptimizers, {"max_steps": 10}, 5, 5),
        (InInit, {"overfit_batches": 2, "max_epochs": 1}, 2, 2),
        (InInit, {"fast_dev_run": True}, 1, 1),
        (InInit, {"gradient_clip_val": 0.1, "deterministic": True}, 12, 12),
    ],
)
def test_one_step_is_one_batch_that_stepped(kind, settings, steps, batches, tmp_path):
    blends, ours = Blends(), callback(plan=Plan(start=0.0, end=1.0, shape="linear"))
    trainer = make_trainer(tmp_path, ours, blends, **settings)
    trainer.fit(kind(), Loader())
    assert (ours.clock.step, ours.clock.total) == (steps, steps)
    assert len(blends.training) == batches
    per_step, epoch = trainer.accumulate_grad_batches, min(batches, 6)
    finished = [i // epoch * -(-epoch // per_step) + i % epoch // per_step for i in range(batches)]
    wanted = [plan_at(step, steps, ours.plan).blend for step in finished]
    assert blends.training == pytest.approx(wanted)
    assert next(moe_layers(trainer.lightning_module))[1].blend == 1.0


def test_validation_sees_the_lambda_of_the_plan(tmp_path):
    blends, ours = Blends(), callback(plan=Plan(start=0.0, end=1.0, shape="linear"))
    trainer = make_trainer(tmp_path, ours, blends, val_check_interval=3, num_sanity_val_steps=1)
    trainer.fit(InInit(), Loader(), Loader(batches=1))
    assert blends.validation == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_evaluation_can_be_ternary_while_training_is_not_yet(tmp_path):
    blends = Blends()
    ours = callback(plan=Plan(start=0.0, end=1.0, shape="linear"), evaluate_ternary=True)
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    trainer = make_trainer(tmp_path, ours, blends, best, enable_checkpointing=True)
    module = InInit()
    trainer.fit(module, Loader(), Loader(batches=1))
    assert blends.validation == [1.0, 1.0] and blends.training[6] == 0.5
    saved = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.ckpt"))]
    assert [blend_in(checkpoint["state_dict"]) for checkpoint in saved] == [0.5, 1.0]
    half, last = sorted(tmp_path.glob("*.ckpt"))
    first = trainer.test(InInit(), Loader(), ckpt_path=half, verbose=False)
    loaded = make_trainer(tmp_path, callback(plan=ours.plan))
    assert loaded.test(InInit(), Loader(), ckpt_path=half, verbose=False) != first
    assert loaded.test(InInit(), Loader(), ckpt_path=last, verbose=False) == trainer.test(
        InInit(), Loader(), ckpt_path=last, verbose=False
    )


def test_a_resume_without_our_state_says_so(tmp_path):
    make_trainer(tmp_path, callback(), StopAt(6, tmp_path / "six.ckpt")).fit(InInit(), Loader())
    renamed = callback(name="other")
    trainer = make_trainer(tmp_path, renamed)
    with pytest.warns(UserWarning, match="no state of .*'name': 'other'.* goes on from step 6"):
        trainer.fit(InInit(), Loader(), ckpt_path=tmp_path / "six.ckpt")
    assert renamed.clock.state_dict() == {"step": 12, "total": 12}


def test_a_weight_average_is_saved_with_the_lambda_of_the_plan(tmp_path):
    ours = callback(plan=Plan(start=0.0, end=1.0, shape="linear"))
    stop = StopAt(6, tmp_path / "half.ckpt")
    make_trainer(tmp_path, ours, EMAWeightAveraging(decay=0.5), stop).fit(InInit(), Loader())
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert decode_extra_state(state["net.0.mlp._extra_state"])["blend"] == 0.5


def test_a_second_training_plans_anew(tmp_path):
    ours, module = callback(), InInit()
    make_trainer(tmp_path, ours).fit(module, Loader())
    assert ours.clock.state_dict() == {"step": 12, "total": 12}
    blends = Blends()
    make_trainer(tmp_path, ours, blends, max_epochs=1).fit(module, Loader())
    assert ours.clock.state_dict() == {"step": 6, "total": 6}
    assert blends.training[0] == 0.0


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from Loader(batches=2).data


@pytest.mark.parametrize("epochs", [1, -1])
def test_an_unknown_length_is_refused_with_a_way_out(epochs, tmp_path):
    data = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ConfigError, match=r"number of training steps.*Set Trainer\(max_steps"):
        make_trainer(tmp_path, callback(), max_epochs=epochs).fit(InInit(), data)


@pytest.mark.parametrize(
    "settings", [{"total_steps": 4}, {"plan": Plan(start=1, end=3)}, {"plan": Plan(start=0, end=0)}]
)
def test_absolute_steps_need_no_length(settings, tmp_path):
    ours, stop = callback(**settings), StopAt(4, tmp_path / "stop.ckpt")
    data = DataLoader(Endless(), batch_size=None)
    module = InInit()
    make_trainer(tmp_path, ours, stop, max_epochs=-1).fit(module, data)
    assert ours.clock.step == 4 and next(moe_layers(module))[1].blend == 1.0


def test_a_longer_training_keeps_the_plan_unless_told(tmp_path):
    make_trainer(tmp_path, callback(), StopAt(6, tmp_path / "six.ckpt")).fit(InInit(), Loader())
    longer = callback()
    with pytest.warns(UserWarning, match="planned for 12 steps and would now take 24"):
        make_trainer(tmp_path, longer, max_epochs=4).fit(
            InInit(), Loader(), ckpt_path=tmp_path / "six.ckpt"
        )
    assert longer.clock.state_dict() == {"step": 24, "total": 12}
    again = callback(replan=True)
    make_trainer(tmp_path, again, max_epochs=4).fit(
        InInit(), Loader(), ckpt_path=tmp_path / "six.ckpt"
    )
    assert again.clock.state_dict() == {"step": 24, "total": 24}


def test_another_plan_on_resume_is_said(tmp_path):
    make_trainer(tmp_path, callback(), StopAt(6, tmp_path / "six.ckpt")).fit(InInit(), Loader())
    trainer = make_trainer(tmp_path, callback(plan=Plan(end=0.9)))
    with pytest.warns(UserWarning, match="'end': 0.6.*going on with Plan.*end=0.9"):
        trainer.fit(InInit(), Loader(), ckpt_path=tmp_path / "six.ckpt")


def test_manual_optimisation_with_two_optimizers_resumes_exactly(tmp_path):
    def run(*others, **fit):
        torch.manual_seed(1)
        module = TwoOptimizers()
        trainer = make_trainer(tmp_path, callback(switch_weight=0.1), *others)
        trainer.fit(module, Loader(), **fit)
        return module, trainer

    whole, trainer = run()
    assert trainer.global_step == 24 and trainer.callbacks[0].clock.step == 12
    run(StopAt(7, tmp_path / "stop.ckpt"))
    resumed, _ = run(ckpt_path=tmp_path / "stop.ckpt")
    assert_same_state(whole, resumed)


def test_values_reach_a_logger_and_a_monitor(tmp_path):
    logger = CSVLogger(tmp_path)
    best = ModelCheckpoint(tmp_path, monitor="bfmoe/load_max_over_mean", save_last=True)
    trainer = make_trainer(
        tmp_path, callback(), best, logger=logger, enable_checkpointing=True, log_every_n_steps=1
    )
    trainer.fit(InInit(), Loader(), Loader(seed=1))
    with Path(logger.experiment.metrics_file_path).open() as file:
        rows = [row["bfmoe/blend"] for row in csv.DictReader(file)]
    blends = [float(value) for value in rows if value]
    assert blends == pytest.approx([plan_at(step, 12).blend for step in range(12)])
    assert 1.0 <= best.best_model_score <= 4.0
    torch.load(tmp_path / "last.ckpt", weights_only=True)


def test_a_monitor_without_a_logger_is_served(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="bfmoe/blend", mode="max")
    trainer = make_trainer(tmp_path, callback(), best, enable_checkpointing=True)
    trainer.fit(InInit(), Loader())
    assert best.best_model_score == 1.0


def test_nothing_is_logged_where_nobody_reads(tmp_path):
    for settings in ({}, {"barebones": True}):
        trainer = make_trainer(tmp_path, callback(), **settings)
        trainer.fit(InInit(), Loader())
        assert not [name for name in trainer.callback_metrics if name.startswith("bfmoe")]
        assert trainer.callbacks[0].clock.step > 0


def test_a_named_callback_logs_under_its_name(tmp_path):
    trainer = make_trainer(tmp_path, callback(name="encoder"), logger=CSVLogger(tmp_path))
    trainer.fit(InInit(), Loader())
    names = {name for name in trainer.callback_metrics if name.startswith("bfmoe")}
    assert names == {"bfmoe/encoder/blend", "bfmoe/encoder/load_max_over_mean"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_our_parameters_stay_wide(place, precision, tmp_path):
    module = MODULES[place]()
    trainer = make_trainer(tmp_path, callback(gains=True), precision=precision, max_epochs=1)
    trainer.fit(module, Loader())
    wide = torch.float64 if precision == "64-true" else torch.float32
    for _, layer in moe_layers(module):
        kinds = {t.dtype for t in (*layer.parameters(), *layer.buffers())}
        assert kinds == {wide}
    rest = torch.bfloat16 if precision == "bf16-true" else wide
    assert module.net[2].weight.dtype == rest
    assert torch.get_default_dtype() == torch.float32


def test_the_angles_warm_up_without_the_scheduler_noticing(tmp_path):
    inside, outside = [], []

    class Rates(Callback):
        def on_train_start(self, trainer, module):
            (optimizer,) = trainer.optimizers
            spy_on_steps(optimizer, lambda group: inside.append(group["lr"]))

        def on_train_batch_end(self, trainer, *_):
            outside.append(trainer.optimizers[0].param_groups[-1]["lr"])

    ours = callback(plan=Plan(angle_warmup=3), angle_lr_factor=5.0)
    trainer = make_trainer(tmp_path, ours, Rates(), max_epochs=1)
    trainer.fit(InInit(), Loader())
    assert inside[::3] == [0.01] * 6
    assert inside[2::3] == pytest.approx([0.05 * f for f in (0.25, 0.5, 0.75, 1, 1, 1)])
    assert outside == [0.01] * 6
    assert not ours.angles._handles


def test_the_finders_leave_the_plan_alone(tmp_path):
    class Sized(InInit):
        def __init__(self, lr=1e-2, batch_size=4):
            super().__init__(lr)
            self.batch_size = batch_size

        def train_dataloader(self):
            x, y = (torch.cat(parts) for parts in zip(*Loader().data, strict=True))
            return DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=self.batch_size)

        def val_dataloader(self):
            return self.train_dataloader()

    finders = [
        LearningRateFinder(num_training_steps=20),
        BatchSizeFinder("power", steps_per_trial=1, max_trials=2),
    ]
    for finder, first in itertools.product(finders, (True, False)):
        blends, ours, rates = Blends(), callback(), []
        plugins = [finder, ours] if first else [ours, finder]

        class Rates(Callback):
            def on_train_start(self, trainer, module, rates=rates):
                (optimizer,) = trainer.optimizers
                spy_on_steps(optimizer, lambda group: rates.append(group["lr"]))

        trainer = make_trainer(tmp_path, *plugins, blends, Rates(), max_epochs=2)
        module = Sized()
        trainer.fit(module)
        total = trainer.global_step
        assert ours.clock.state_dict() == {"step": total, "total": total}
        assert blends.training[-total:] == pytest.approx(
            [plan_at(step, total).blend for step in range(total)]
        )
        assert len(rates) == 3 * total
        assert rates[2::3] == [5 * rate for rate in rates[::3]]
