"""Live charts: what they draw, how seldom, where, and that nothing else changes."""

import copy
import pickle
import sys
from types import SimpleNamespace

import IPython
import IPython.display
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_bfmoe import ActivationOutliers, NotebookMonitor, OutlierDashboard
from lightning_bfmoe.callbacks import live_chart
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.swap import swap_feed_forward
from lightning_bfmoe.viz import live
from lightning_bfmoe.viz.curves import Curves, curves_figure, panels_of
from tests.lightning.modules import Base, InInit, Loader, StopAt, assert_same_state, make_trainer


def fit(tmp_path, *callbacks, module=None, batches=6, val=None, ckpt_path=None, **settings):
    trainer = make_trainer(tmp_path, *callbacks, **{"max_epochs": 2, **settings})
    trainer.fit(module or InInit(), Loader(batches), val, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def notebook(monkeypatch):
    """A kernel that notes what is displayed and updated."""
    shown = []

    class Handle:
        def update(self, bundle, raw):
            assert raw
            shown.append(("update", bundle))

    def display(bundle, raw, display_id):
        assert raw and display_id
        shown.append(("display", bundle))
        return Handle()

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def test_the_loss_is_that_of_training_step_whatever_is_logged(tmp_path):
    monitor, module = NotebookMonitor(), InInit()
    trainer = fit(
        tmp_path, monitor, module=module, batches=8, accumulate_grad_batches=2, val=Loader(2)
    )
    steps, values = monitor.curves.points("train_loss")
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    expected = np.reshape(module.losses, (8, 2)).mean(axis=1)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    steps, values = monitor.curves.points("val_loss")
    assert steps == [4, 8] and values[-1] == trainer.callback_metrics["val_loss"]


class Logs(InInit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        self.log("train_acc", 0.5)
        self.log("other", 1.0)
        return loss


def test_logged_values_are_chosen_by_pattern_and_come_once(tmp_path):
    monitor = NotebookMonitor()
    fit(tmp_path, monitor, module=Logs(), val=Loader(2))
    assert sorted(monitor.curves.names) == ["train_acc", "train_loss", "val_loss"]
    assert len(monitor.curves.points("train_loss")[0]) == 12
    assert monitor.curves.points("val_loss")[0] == [6, 12]
    chosen = NotebookMonitor("other")
    fit(tmp_path, chosen, module=Logs())
    assert chosen.curves.names == ["train_loss", "other"]


class Manual(Base):
    """Manual optimisation, which hands callbacks no loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = InInit().net

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss)


def test_a_loss_that_is_only_logged_is_drawn(tmp_path):
    monitor = NotebookMonitor()
    fit(tmp_path, monitor, module=Manual())
    assert monitor.curves.names == ["train_loss"]


def test_one_output_is_updated_and_stays(tmp_path, notebook, monkeypatch):
    monkeypatch.setattr(live.Throttle, "is_due", lambda self: True)
    fit(tmp_path, NotebookMonitor())
    assert [kind for kind, _ in notebook[:2]] == ["display", "update"] and len(notebook) == 14
    assert {kind for kind, _ in notebook[1:]} == {"update"}
    assert notebook[-1][1]["text/plain"].startswith("step 12  train_loss ")
    assert notebook[-1][1]["image/png"].startswith("iVBOR")  # base64 of a PNG
    assert len(notebook[-1][1]["image/png"]) < 60_000


def test_drawing_keeps_to_its_budget(tmp_path, notebook, monkeypatch):
    clock = [0.0]

    def tick(seconds):
        clock[0] += seconds

    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live_chart, "png", lambda figure: tick(0.2) or b"")

    class Slow(L.Callback):
        def on_train_batch_end(self, *_):
            tick(0.5)

    fit(tmp_path, Slow(), NotebookMonitor(budget=0.01), batches=100, max_epochs=1)
    # 50 seconds of training: the first chart, two more each 20 seconds later, and the last one
    assert len(notebook) == 4


def test_a_terminal_gets_lines_of_text(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    monkeypatch.setattr(live_chart, "png", None)  # nothing is drawn
    fit(tmp_path, NotebookMonitor())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[-1].startswith("step 12  train_loss ") and len(lines) < 6
    assert not live.in_notebook()


def test_an_interrupted_training_leaves_its_chart(tmp_path, notebook):
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, NotebookMonitor(), Fails())
    assert notebook[-1][1]["text/plain"].startswith("step 5  train_loss")


def test_charts_go_on_after_a_resume(tmp_path):
    whole, module = NotebookMonitor(), InInit()
    start = copy.deepcopy(module)
    fit(tmp_path, whole, module=module, val=Loader(2))
    checkpoint = tmp_path / "stopped.ckpt"
    fit(tmp_path, NotebookMonitor(), StopAt(8, checkpoint), module=start, val=Loader(2))
    torch.load(checkpoint, weights_only=True)
    again = NotebookMonitor()
    fit(tmp_path, again, val=Loader(2), ckpt_path=checkpoint)
    for name in ("train_loss", "val_loss"):
        steps, values = again.curves.points(name)
        assert steps == whole.curves.points(name)[0]
        np.testing.assert_allclose(values, whole.curves.points(name)[1], rtol=1e-6)
    fit(tmp_path, again)  # a new training begins a new chart
    assert again.curves.points("train_loss")[0] == list(range(1, 13))


def test_nothing_that_is_trained_changes(tmp_path):
    torch.manual_seed(0)
    plain = InInit()
    watched = copy.deepcopy(plain)
    fit(tmp_path, module=plain)
    fit(tmp_path, NotebookMonitor(budget=1.0, every_n_seconds=0), module=watched)
    assert_same_state(plain, watched)


def test_no_loss_waits_on_its_device_for_ever(tmp_path):
    monitor = NotebookMonitor()
    fit(tmp_path, monitor, batches=300, max_epochs=1)
    assert len(monitor.curves.points("train_loss")[0]) == 300 and monitor._losses == []


@pytest.mark.parametrize("settings", [{"barebones": True}, {"fast_dev_run": True}])
def test_special_runs(tmp_path, settings, capsys):
    fit(tmp_path, NotebookMonitor(), **settings)
    assert ("step 1 " in capsys.readouterr().out) != settings.get("barebones", False)


def test_a_monitor_can_be_copied(tmp_path, notebook):
    monitor = NotebookMonitor()
    fit(tmp_path, monitor)
    twin = pickle.loads(pickle.dumps(monitor))
    assert twin.curves.state_dict() == monitor.curves.state_dict()
    fit(tmp_path, copy.deepcopy(monitor))
    assert [kind for kind, _ in notebook].count("display") == 2


def test_curves_stay_bounded_and_are_smooth_in_the_middle():
    curves = Curves(max_points=100)
    for step in range(10_000):
        curves.add("loss", step, 1.0)
    steps, values = curves.points("loss")
    assert len(steps) <= 100 and steps[-1] == 9999 and set(values) == {1.0}
    panels = panels_of(
        ["train_loss", "val/loss", "loss_epoch", "acc", *(f"m{i}" for i in range(9))]
    )
    assert panels["loss"] == ["train_loss", "val/loss", "loss_epoch"] and len(panels) == 11
    for name in panels:
        curves.add(name, 1, 1.0)
    assert "(not shown: " in curves_figure(curves)._suptitle.get_text()


def swapped():
    module = InInit()
    swap_feed_forward(module, num_experts=4, top_k=2, init="scratch")
    return module


def test_the_dashboard_draws_what_activation_outliers_logs(tmp_path):
    outliers, dashboard = ActivationOutliers(3, hadamard=True), OutlierDashboard()
    logger = CSVLogger(tmp_path)
    fit(tmp_path, dashboard, outliers, module=swapped(), logger=logger, log_every_n_steps=3)
    steps, values = dashboard.history.means.points("kurtosis_after")
    assert steps == [1, 3, 6, 9, 12]
    assert values[-1] == outliers.latest["outliers/kurtosis_after"]
    site = "net.1.mlp/down/incoherence_before"
    assert dashboard.history.sites[site] == outliers.latest[f"outliers/{site}"]
    top, below = dashboard.figure().axes[0], dashboard.figure().axes[2]
    assert [line.get_label() for line in top.lines] == [
        "before the rotation",
        "after the learned rotation",
        "after a fixed Hadamard",
    ]
    assert [t.get_text() for t in below.get_yticklabels()] == [
        f"net.{i}.mlp/{m}" for i in (0, 1) for m in ("up", "down")
    ]


def test_the_dashboard_is_live_and_resumes(tmp_path, notebook):
    checkpoint = tmp_path / "stopped.ckpt"
    fit(
        tmp_path, ActivationOutliers(2, name="a"), OutlierDashboard("crest", source="a"),
        StopAt(8, checkpoint), module=swapped(),
    )  # fmt: skip
    assert notebook[0][0] == "display" and notebook[-1][1]["text/plain"].startswith("step 8  crest")
    again = OutlierDashboard("crest", source="a")
    fit(
        tmp_path, again, ActivationOutliers(2, name="a"), module=swapped(), ckpt_path=checkpoint,
    )  # fmt: skip
    assert again.history.means.points("crest_before")[0][:4] == [1, 2, 4, 6]
    assert again.history.step == 12


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "none among the Trainer's callbacks"),
        (
            [ActivationOutliers(), ActivationOutliers(name="b")],
            "ActivationOutliers.name=None.*name=.b.",
        ),
        ([ActivationOutliers(measures=["crest"])], r"measures=\['crest'\]"),
    ],
)
def test_the_dashboard_needs_one_source(tmp_path, callbacks, message):
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, OutlierDashboard(), *callbacks, module=swapped())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NotebookMonitor(budget=0), "budget is a share of the time"),
        (lambda: NotebookMonitor(every_n_seconds=-1), "every_n_seconds must be >= 0"),
        (lambda: OutlierDashboard("mean"), r"measures are some of \['kurtosis'"),
    ],
)
def test_bad_settings_are_an_error(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
