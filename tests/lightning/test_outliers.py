"""ActivationOutliers: the right numbers, at the interval only, over micro-batches and ranks."""

import copy
import json
import math
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
import scipy.stats
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_bfmoe.callbacks import outliers
from lightning_bfmoe.callbacks.outliers import ActivationOutliers
from lightning_bfmoe.deploy import load_packed, pack
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional import apply_butterfly, hadamard_angles, incoherence
from lightning_bfmoe.functional.outliers import MEASURES
from lightning_bfmoe.layers import ButterflyMoE, Rotation
from lightning_bfmoe.swap import swap_feed_forward
from tests.lightning.modules import D, InInit, Loader, StopAt, make_trainer

PATHS = ("net.0.mlp", "net.1.mlp")


def swapped(**settings):
    torch.manual_seed(0)
    module = InInit()
    swap_feed_forward(module, num_experts=4, top_k=2, init="scratch", **settings)
    return module


class Spy(L.Callback):
    """Keeps what enters and leaves one rotation, step by step, and how many hooks there were."""

    def __init__(self, path="net.0.mlp.experts.up.rotate_in"):
        self.path, self.steps, self.now, self.hooks = path, [], [], []

    def on_fit_start(self, trainer, pl_module):
        self.module = pl_module.get_submodule(self.path)
        self.module.register_forward_hook(
            lambda module, args, output: self.now.append((args[0].detach(), output.detach()))
        )

    def on_train_batch_start(self, *_):
        self.hooks.append(len(self.module._forward_hooks) - 1)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.steps):
            self.steps.append([torch.cat(side) for side in zip(*self.now, strict=True)])
            self.now = []


class Latest(L.Callback):
    """Keeps the record of every step that has one."""

    def __init__(self, callback):
        self.callback, self.records = callback, {}

    def on_train_batch_end(self, trainer, *_):
        if self.callback.latest:
            self.records[trainer.global_step] = self.callback.latest
            self.callback.latest = {}


def fit(tmp_path, callback, *others, module=None, batches=6, val=None, **settings):
    latest = Latest(callback)
    trainer = make_trainer(tmp_path, callback, latest, *others, **{"max_epochs": 1, **settings})
    trainer.fit(module or swapped(), Loader(batches), val)
    return trainer, latest.records


def test_values_are_those_of_the_rows_of_all_micro_batches(tmp_path):
    spy, callback = Spy(), ActivationOutliers(every_n_steps=2, hadamard=True)
    _, records = fit(tmp_path, callback, spy, batches=8, accumulate_grad_batches=2)
    assert sorted(records) == [1, 2, 4]
    for step, record in records.items():
        before, after = spy.steps[step - 1]
        assert len(before) == 2 * 4 * 2  # micro-batches, tokens, k
        expected = {
            "before": before,
            "after": after,
            "hadamard": apply_butterfly(before, hadamard_angles(D), inverse=True),
        }
        for view, rows in expected.items():
            key = "outliers/net.0.mlp/up/{}_" + view
            kurtosis = scipy.stats.kurtosis(rows.double().numpy(), axis=None)
            assert record[key.format("kurtosis")] == pytest.approx(kurtosis, rel=1e-5)
            value = incoherence(rows).item()
            assert record[key.format("incoherence")] == pytest.approx(value, rel=1e-5)
        each = [record[f"outliers/{p}/{m}/crest_after"] for p in PATHS for m in ("up", "down")]
        assert record["outliers/crest_after"] == pytest.approx(sum(each) / 4, rel=1e-5)


def test_nothing_is_measured_off_the_interval_or_in_validation(tmp_path, monkeypatch):
    module, calls = swapped(), []
    measure = outliers.outlier_moments

    def counted(rows):
        calls.append((module.trainer.global_step, module.trainer.validating))
        return measure(rows)

    monkeypatch.setattr(outliers, "outlier_moments", counted)
    trainer = make_trainer(
        tmp_path, ActivationOutliers(3), max_epochs=2, val_check_interval=1, limit_val_batches=1
    )
    trainer.fit(module, Loader(5), Loader(2))
    assert sorted({step for step, _ in calls}) == [0, 2, 5, 8]  # first, and each third
    assert len(calls) == 4 * 2 * 2 * 2 and not any(validating for _, validating in calls)


def test_names_are_complete_and_can_be_chosen(tmp_path):
    _, records = fit(tmp_path, ActivationOutliers(50))
    views = ("before", "after")
    sites = {f"{path}/{matrix}/" for path in PATHS for matrix in ("up", "down")} | {""}
    assert set(records[1]) == {
        f"outliers/{s}{m}_{v}" for s in sites for m in MEASURES for v in views
    }
    callback = ActivationOutliers(
        50, layers="net.1.*", dense=["net.2"], measures=["crest"], name="b"
    )
    _, records = fit(tmp_path, callback)
    names = {"crest_before", "crest_after", "net/2/crest_before"}
    names |= {f"net.1.mlp/{matrix}/crest_{v}" for matrix in ("up", "down") for v in views}
    assert set(records[1]) == {f"outliers/b/{name}" for name in names}


def test_a_dense_model_is_a_control(tmp_path):
    callback = ActivationOutliers(50, dense="*.mlp.*", hadamard=True)
    _, records = fit(tmp_path, callback, module=InInit())
    assert records[1]["outliers/net.0.mlp/2/snr_int4_before"] > 5
    assert records[1]["outliers/net.1.mlp/0/snr_int4_hadamard"] > 5
    assert not any(name.endswith("after") for name in records[1])


def test_rows_are_sampled_evenly_over_the_experts():
    rotation = Rotation(4, 1)
    site = outliers._Site("up", rotation, max_rows=10, hadamard=False)
    x = torch.arange(95.0).unsqueeze(1).expand(95, 4)
    assert site._sample(x)[:, 0].tolist() == [*range(0, 95, 10)]
    assert len(site._sample(x[:10])) == 10 and len(site._sample(x[:11])) == 6
    assert site._sample(torch.zeros(2, 3, 4)).shape == (6, 4)
    site.active = True
    nothing = torch.zeros(0, 4)  # an expert layer without a token
    site.record(rotation, (nothing,), nothing)
    assert site.moments.eq(0).all()


def test_not_a_number_is_shown_and_stops_nothing(tmp_path):
    module = swapped()
    with torch.no_grad():
        module.net[0].mlp.experts.up.rotate_in.angles.fill_(math.nan)
    _, records = fit(tmp_path, ActivationOutliers(50), module=module)
    assert math.isnan(records[1]["outliers/net.0.mlp/up/crest_after"])
    assert records[1]["outliers/net.0.mlp/up/crest_before"] > 1


KEY = "outliers/net.0.mlp/down/kurtosis_after"


class Fake(Logger):
    """Logs like TensorBoard or W&B, into a list."""

    name, version = "fake", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        """Nothing."""

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def test_loggers_and_checkpoints_read_it(tmp_path):
    fake, csv = Fake(), CSVLogger(tmp_path)
    best = ModelCheckpoint(tmp_path, monitor=KEY, save_top_k=2, filename="{step}")
    trainer, records = fit(
        tmp_path, ActivationOutliers(4), best, logger=[fake, csv], log_every_n_steps=2,
        enable_checkpointing=True, max_epochs=3, batches=2, val=Loader(1),
    )  # fmt: skip
    logged = {step: row[KEY] for step, row in fake.rows if KEY in row}
    assert records.keys() == {1, 4}
    assert logged == {step - 1: record[KEY] for step, record in records.items()}
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert KEY in header.split(",")
    assert best.best_model_score is not None and len(best.best_k_models) == 2
    assert trainer.callback_metrics[KEY] == pytest.approx(records[4][KEY])


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"precision": "bf16-true"}, {}])
def test_runs_everywhere_and_cleans_up(tmp_path, settings):
    module, spy, callback = swapped(), Spy(), ActivationOutliers()
    _, records = fit(tmp_path, callback, spy, module=module, **settings)
    assert list(records) == [1] and all(map(math.isfinite, records[1].values()))
    assert set(spy.hooks) == {1} and len(spy.module._forward_hooks) == 1  # its own


def test_barebones_records_nothing(tmp_path):
    spy, callback = Spy(), ActivationOutliers(1)
    _, records = fit(tmp_path, callback, spy, barebones=True)
    assert records == {} and set(spy.hooks) == {0}


def test_hooks_go_when_training_fails(tmp_path):
    module = swapped()
    module.training_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError, match="division"):
        fit(tmp_path, ActivationOutliers(1), module=module)
    assert not any(m._forward_hooks for m in module.modules())


def test_copies_leave_hooks_behind(tmp_path):
    callback = ActivationOutliers(3, name="a", layers=["net.*"])

    class Copy(L.Callback):
        def on_train_batch_end(self, *_):
            assert callback._handles
            for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
                assert twin._handles == twin._sites == [] and twin.layers == ["net.*"]

    fit(tmp_path, callback, Copy())


def test_the_interval_survives_a_resume(tmp_path):
    path = tmp_path / "at.ckpt"
    _, whole = fit(tmp_path, ActivationOutliers(4), batches=10)
    fit(tmp_path, ActivationOutliers(4), StopAt(5, path), batches=10)
    state = torch.load(path, weights_only=True)["callbacks"][ActivationOutliers().state_key]
    assert state == {"step": 5}
    callback = ActivationOutliers(4)
    latest = Latest(callback)
    trainer = make_trainer(tmp_path, callback, latest, max_epochs=1)
    trainer.fit(swapped(), Loader(10), ckpt_path=path, weights_only=False)
    assert sorted(latest.records) == [6, 8] and latest.records[8] == whole[8]


@pytest.mark.slow
def test_a_compiled_model_is_measured_with_one_recompilation(tmp_path):
    # in a process of its own: dynamo does not trace through the shape checker of the tests
    code = f"""
        import torch
        from lightning_bfmoe.callbacks import ActivationOutliers, ExpertUsage
        from tests.lightning.test_outliers import Loader, make_trainer, swapped
        results, graphs = [], []
        def backend(graph, _):
            graphs.append(graph)
            return graph.forward
        for compiled in (False, True):
            module, callbacks = swapped(), [ActivationOutliers(4), ExpertUsage(4)]
            if compiled:
                module.net[0].mlp.compile(backend=backend, fullgraph=True)
            make_trainer({str(tmp_path)!r}, *callbacks, max_epochs=1).fit(module, Loader(8))
            results.append((callbacks[0].latest, callbacks[1].history))
        assert results[0] == results[1]
        print("graphs", len(graphs))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # the layer, the layer while it records, the hook that counts the load
    assert "graphs 3" in done.stdout


class OnRank(InInit):
    """Every rank has data of its own."""

    def train_dataloader(self):
        return Loader(4, seed=self.global_rank)


class Report(L.Callback):
    def __init__(self, callback, path):
        self.callback, self.path, self.calls = callback, path, 0

    def on_train_start(self, trainer, pl_module):
        gather = trainer.strategy.all_gather
        trainer.strategy.all_gather = lambda x: (setattr(self, "calls", self.calls + 1), gather(x))[
            1
        ]

    def on_train_end(self, trainer, pl_module):
        result = json.dumps([self.calls, self.callback.latest])
        (self.path / f"rank{trainer.global_rank}.json").write_text(result)


def test_two_processes_equal_one(tmp_path):
    callback, module = ActivationOutliers(4), OnRank(lr=0.0)
    swap_feed_forward(module, num_experts=4, top_k=2, balance_rate=0.0)
    twin = copy.deepcopy(module)
    trainer = make_trainer(
        tmp_path, callback, Report(callback, tmp_path), strategy="ddp_fork", devices=2, max_epochs=1
    )
    trainer.fit(module)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1] and results[0][0] == 2  # records, each one collective

    single = ActivationOutliers(4)
    trainer = make_trainer(tmp_path, single, accumulate_grad_batches=2, max_epochs=1)
    both = Loader(8)
    both.data[::2], both.data[1::2] = Loader(4, seed=0).data, Loader(4, seed=1).data
    trainer.fit(twin, both)
    assert single.latest.keys() == results[0][1].keys()
    for name, value in single.latest.items():
        assert results[0][1][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer >= 1"),
        ({"max_rows": 1.5}, "max_rows must be an integer >= 1"),
        ({"measures": ["mean"]}, "measures are some of .*kurtosis"),
        ({"measures": []}, "measures are some of"),
    ],
)
def test_bad_settings_are_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        ActivationOutliers(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a ButterflyMoE layer to record: got 0 of them"),
        ({"dense": "gate"}, r"an nn.Linear to record that fits \['gate'\]: got 5 of them: net.0"),
    ],
)
def test_no_module_is_an_error(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, ActivationOutliers(**settings), module=InInit())


def test_a_layer_that_stands_alone(tmp_path):
    module = InInit()
    module.net = torch.nn.Sequential(ButterflyMoE(D, 16, gated=True, down="dense"), module.net[2])
    _, records = fit(tmp_path, ActivationOutliers(50), module=module)
    sites = {name.split("/")[-2] for name in records[1]}
    assert sites == {"outliers", "up", "gate"}


@pytest.mark.parametrize("angles", ["fp16", "int8", "int4"])
def test_packed_layers_are_measured_whatever_their_angles(tmp_path, angles):
    module, file = swapped(), tmp_path / "model.bfmoe"
    pack(module, file, angles=angles, finalize=True)
    loaded = load_packed(file, InInit()).train()
    callback, spy = ActivationOutliers(1), Spy()
    _, records = fit(tmp_path, callback, spy, module=loaded, batches=2)
    before, after = spy.steps[0]
    for name, rows in (("before", before), ("after", after)):
        found = records[1][f"outliers/net.0.mlp/up/incoherence_{name}"]
        assert found == pytest.approx(incoherence(rows).item(), rel=1e-5)
