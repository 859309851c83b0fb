"""ExpertUsage: load of all micro-batches and ranks, warnings once, plain state, exact resume."""

import copy
import json
import pickle
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.checkpoint import checkpoint

from lightning_bfmoe import ButterflyMoECallback
from lightning_bfmoe.callbacks import ActivationOutliers
from lightning_bfmoe.callbacks.usage import ExpertUsage
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional import expert_load, load_entropy
from lightning_bfmoe.layers import ButterflyExperts
from lightning_bfmoe.swap import swap_feed_forward
from tests.lightning.modules import D, InInit, Loader, StopAt, make_trainer

PATHS = ("net.0.mlp", "net.1.mlp")


def swapped(kind=InInit, **settings):
    torch.manual_seed(0)
    module = kind()
    swap_feed_forward(module, **{"num_experts": 4, "top_k": 2, **settings})
    return module


class Spy(L.Callback):
    """Keeps the expert ids of every training step, and every logged value."""

    def __init__(self):
        self.steps, self.now, self.logged = [], [], {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.now.append(pl_module.net[0].mlp.last_routing.experts)
        if trainer.global_step > len(self.steps):
            self.steps.append(torch.cat(self.now))
            self.now = []
        if trainer.global_step not in self.logged:
            self.logged[trainer.global_step] = dict(trainer.callback_metrics)


def fit(tmp_path, callback, *others, module=None, loader=None, ckpt_path=None, **settings):
    trainer = make_trainer(tmp_path, callback, *others, **{"max_epochs": 1, **settings})
    trainer.fit(module or swapped(), loader or Loader(9), ckpt_path=ckpt_path)
    return trainer


def collapse(layer, expert=2):
    """Make the router choose one expert for every token."""
    with torch.no_grad():
        layer.router.balance_bias[expert] = 1e9
        layer.router.balance_rate = 0.0


def test_intervals_hold_the_load_of_every_micro_batch(tmp_path):
    spy, callback = Spy(), ExpertUsage(every_n_steps=2)
    fit(tmp_path, callback, spy, loader=Loader(14), accumulate_grad_batches=3)
    assert [record["step"] for record in callback.history] == [2, 4]
    for record in callback.history:
        ids = torch.cat(spy.steps[record["step"] - 2 : record["step"]])
        load = expert_load(ids, 4)
        layer = record["layers"][PATHS[0]]
        assert layer["load"] == load.tolist() and sum(layer["load"]) == 2 * 3 * 4 * 2
        assert layer["load_entropy"] == load_entropy(load).item()
        assert layer["max_violation"] == pytest.approx(load.max().item() / 12 - 1)
        assert layer["dead_experts"] == layer["load"].count(0)
        assert list(record["layers"]) == list(PATHS)
    assert json.loads(json.dumps(callback.history)) == callback.history


def test_validation_is_not_counted(tmp_path):
    callback, module = ExpertUsage(every_n_steps=3), swapped()
    trainer = make_trainer(tmp_path, callback, max_epochs=1, val_check_interval=1)
    trainer.fit(module, Loader(3), Loader(2))
    assert sum(callback.history[0]["layers"][PATHS[0]]["load"]) == 3 * 4 * 2


def test_names_and_what_they_mean_over_all_layers(tmp_path):
    spy, module = Spy(), swapped(top_k=1)
    collapse(module.net[0].mlp)
    fit(tmp_path, ExpertUsage(every_n_steps=4), spy, module=module)
    logged = spy.logged[4]
    measures = ("load_entropy", "max_violation", "dead_experts")
    names = {f"usage/{p}{m}" for m in measures for p in ("", *(f"{p}/" for p in PATHS))}
    names |= {f"usage/{p}/load/{i}" for p in PATHS for i in range(4)}
    assert {name for name in logged if name.startswith("usage")} == names
    assert logged["usage/net.0.mlp/load_entropy"] == 0
    assert logged["usage/net.0.mlp/max_violation"] == logged["usage/max_violation"] == 3
    assert [logged[f"usage/net.0.mlp/load/{i}"] for i in range(4)] == [0, 0, 4, 0]
    assert logged["usage/net.0.mlp/dead_experts"] == 3 <= logged["usage/dead_experts"]
    mean = (0 + logged["usage/net.1.mlp/load_entropy"]) / 2
    assert logged["usage/load_entropy"].item() == pytest.approx(mean.item())


@pytest.mark.parametrize(("log_load", "experts"), [(False, 4), (None, 17), (True, 17)])
def test_single_loads_are_logged_where_they_are_few_or_asked_for(tmp_path, log_load, experts):
    trainer = fit(
        tmp_path, ExpertUsage(every_n_steps=4, log_load=log_load),
        module=swapped(num_experts=experts),
    )  # fmt: skip
    found = [name for name in trainer.callback_metrics if "/load/" in name]
    assert len(found) == (2 * experts if log_load else 0)


class Board(Logger):
    """TensorBoard's logger, as far as it is used."""

    name, version = "board", 0

    def __init__(self):
        super().__init__()
        self.rows, self.histograms, self.experiment = [], [], self

    def log_hyperparams(self, *args, **kwargs):
        """Nothing."""

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def add_histogram_raw(self, tag, **histogram):
        self.histograms.append((tag, histogram))


def test_a_board_gets_the_load_as_a_histogram(tmp_path):
    board, callback = Board(), ExpertUsage(every_n_steps=2, name="a")
    fit(
        tmp_path, callback, logger=[board, CSVLogger(tmp_path)], loader=Loader(8),
        accumulate_grad_batches=2,
    )  # fmt: skip
    mine = [(tag, h) for tag, h in board.histograms if tag == "usage/a/net.0.mlp/load"]
    # Lightning's own axis: the first step is 0
    assert [h["global_step"] for _, h in mine] == [0, 1, 3]
    assert [step for step, row in board.rows if "usage/a/load_entropy" in row] == [0, 1, 3]
    for record, (_, histogram) in zip(callback.history, mine[1:], strict=True):
        load = record["layers"]["net.0.mlp"]["load"]
        assert histogram["bucket_counts"] == load and histogram["num"] == sum(load) == 2 * 2 * 8
        assert histogram["bucket_limits"] == [0.5, 1.5, 2.5, 3.5]
        ids = [i for i, n in enumerate(load) for _ in range(n)]
        assert histogram["sum"] == sum(ids)
        assert histogram["sum_squares"] == sum(i * i for i in ids)
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert "usage/a/net.0.mlp/load/3" in header.split(",")


class Checkpointed(InInit):
    reentrant = False

    def forward(self, x):
        for block in self.net[:2]:
            x = checkpoint(block, x.requires_grad_(), use_reentrant=self.reentrant)
        return self.net[2](x)


class Reentrant(Checkpointed):
    reentrant = True


class Looking(InInit):
    """Runs the model without training on it: a teacher, and a metric."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self(batch[0])
        self.eval()
        self(batch[0])
        self.train()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant, Looking])
def test_a_pass_counts_when_it_is_trained_on_and_once(tmp_path, kind):
    callback, plain = ExpertUsage(every_n_steps=2), ExpertUsage(every_n_steps=2)
    outliers, plain_outliers = ActivationOutliers(2), ActivationOutliers(2)
    biases = []
    for build, *callbacks in ((kind, callback, outliers), (InInit, plain, plain_outliers)):
        torch.manual_seed(0)
        module, ours = build(), ButterflyMoECallback(num_experts=4, verbose=False)
        make_trainer(tmp_path, ours, *callbacks, max_epochs=1).fit(module, Loader(6))
        biases.append(module.net[0].mlp.router.balance_bias)
    assert callback.history == plain.history and len(plain.history) == 3
    assert outliers.latest == plain_outliers.latest and plain_outliers.latest
    assert biases[0].equal(biases[1]) and biases[0].any()


def test_names_exist_from_the_first_step(tmp_path):
    spy, best = Spy(), ModelCheckpoint(tmp_path, monitor="usage/a/load_entropy")
    callback = ExpertUsage(name="a")
    fit(tmp_path, callback, spy, best, loader=Loader(2), enable_checkpointing=True)
    assert best.best_model_score is not None and callback.history == []
    assert "usage/a/net.1.mlp/max_violation" in spy.logged[1]
    assert callback._own_pending()[PATHS[0]] != [0] * 4, "the first interval goes on"


@pytest.mark.parametrize(
    "settings", [{"fast_dev_run": True}, {"precision": "bf16-true"}, {"barebones": True}]
)
def test_runs_everywhere_and_cleans_up(tmp_path, settings):
    module, callback = swapped(), ExpertUsage(every_n_steps=1)
    fit(tmp_path, callback, module=module, **settings)
    records = {"fast_dev_run": 1, "precision": 9, "barebones": 0}
    assert len(callback.history) == records[next(iter(settings))]
    assert not any(m._forward_hooks for m in module.modules())


def test_dead_experts_are_named_once_with_a_way_out(tmp_path):
    module, callback = swapped(top_k=1), ExpertUsage(every_n_steps=2, dead_after=2)
    collapse(module.net[0].mlp)
    module.net[1].mlp = torch.nn.Identity()
    message = (
        r"Layer 'net.0.mlp': experts 0, 1, 3 of 4 received no token during the last 4 optimizer "
        r"steps. Raise balance_rate \(now 0\), lower num_experts \(now 4\), or raise top_k \(now 1"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        fit(tmp_path, callback, module=module)
    assert sum("received no token" in str(w.message) for w in caught) == 1
    assert callback.state_dict()["warned"] == {"net.0.mlp": [0, 1, 3]}
    assert callback.dead == {"net.0.mlp": [0, 1, 3]}


def test_a_dead_expert_that_recovers_is_no_longer_dead_and_not_warned_of_again(tmp_path):
    class Kill(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            pl_module.net[0].mlp.router.balance_bias.zero_()
            collapse(pl_module.net[0].mlp, expert=[2, 2, 1, 2, 2, 2][trainer.global_step])
            self.dead.append(callback.dead.get("net.0.mlp", []))

        dead: list = []

    module, callback = swapped(top_k=1), ExpertUsage(every_n_steps=1, dead_after=2)
    module.net[1].mlp = torch.nn.Identity()
    with pytest.warns(UserWarning, match="experts 0, 1, 3 of 4") as caught:
        fit(tmp_path, callback, Kill(), module=module, loader=Loader(6))
    assert sum("received no token" in str(w.message) for w in caught) == 1
    assert Kill.dead == [[], [], [0, 1, 3], [0, 3], [0, 3], [0, 1, 3]]


def test_a_frozen_router_is_told_apart(tmp_path):
    module, callback = swapped(top_k=1), ExpertUsage(every_n_steps=2, dead_after=1)
    collapse(module.net[0].mlp)
    module.net[0].mlp.router.requires_grad_(False)
    with pytest.warns(UserWarning, match="'net.0.mlp'.* The router is frozen"):
        fit(tmp_path, callback, module=module)


def test_an_expert_that_comes_back_in_time_is_not_dead(tmp_path):
    class Alternate(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            for layer in (pl_module.net[0].mlp, pl_module.net[1].mlp):
                layer.router.balance_bias.zero_()
                collapse(layer, expert=trainer.global_step % 4)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = ExpertUsage(every_n_steps=1, dead_after=4)
        fit(tmp_path, callback, Alternate(), module=swapped(top_k=1))
    assert not any("received no token" in str(w.message) for w in caught)
    assert callback.history[-1]["layers"][PATHS[0]]["dead_experts"] == 3


def test_history_stays_short_and_keeps_its_span(tmp_path):
    callback = ExpertUsage(every_n_steps=1, max_history=4)
    fit(tmp_path, callback)
    steps = [record["step"] for record in callback.history]
    assert steps == sorted(steps) and steps[-1] == 9 and steps[0] <= 2 and 2 <= len(steps) <= 4


@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_a_resume_goes_on_exactly(tmp_path, stop):
    path, whole = tmp_path / "at.ckpt", ExpertUsage(every_n_steps=4, dead_after=1)
    fit(tmp_path, whole)
    fit(tmp_path, ExpertUsage(every_n_steps=4), StopAt(stop, path))
    state = torch.load(path, weights_only=True)["callbacks"][whole.state_key]
    assert state["step"] == stop
    resumed = ExpertUsage(every_n_steps=4, dead_after=1)
    fit(tmp_path, resumed, ckpt_path=path)
    assert len(whole.history) == 2 and resumed.state_dict() == whole.state_dict()


def test_a_new_training_starts_afresh(tmp_path):
    callback = ExpertUsage(every_n_steps=4)
    fit(tmp_path, callback)
    first = callback.state_dict()
    fit(tmp_path, callback)
    assert callback.state_dict() == first


def test_copies_leave_hooks_behind(tmp_path):
    callback = ExpertUsage(every_n_steps=4)

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
                assert twin._handles == twin._counters == []
                assert twin.state_dict() == callback.state_dict()

    fit(tmp_path, callback, Copy())


@pytest.mark.parametrize("by_keyword", [False, True])
def test_experts_behind_a_foreign_router(tmp_path, by_keyword):
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = ButterflyExperts(D, 16, num_experts=4)

        def forward(self, x):
            ids = torch.tensor([[0, 3]]).expand(len(x), 2)
            weights = torch.full((len(x), 2), 0.5)
            if by_keyword:
                return self.experts(x, experts=ids, weights=weights)
            return self.experts(x, ids, weights)

    module = InInit()
    module.net[0].mlp, module.net[1].mlp = Foreign(), torch.nn.Identity()
    callback = ExpertUsage(every_n_steps=2, dead_after=1, layers="net.0.*")
    with pytest.warns(UserWarning, match="experts 1, 2 of 4 .* own router decides"):
        fit(tmp_path, callback, module=module)
    assert callback.history[0]["layers"]["net.0.mlp.experts"]["load"] == [8, 0, 0, 8]


class OnRank(InInit):
    """Every rank has data of its own."""

    def train_dataloader(self):
        return Loader(5, seed=self.global_rank)


class Report(L.Callback):
    def __init__(self, callback, path):
        self.callback, self.path = callback, path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path / "two.ckpt")
        result = json.dumps(self.callback.history)
        (self.path / f"rank{trainer.global_rank}.json").write_text(result)


def test_two_processes_equal_one(tmp_path):
    callback, settings = ExpertUsage(every_n_steps=2), {"balance_rate": 0.0, "init": "preserve"}
    module = swapped(OnRank, **settings)
    module.hparams.lr = 0.0
    twin = copy.deepcopy(module)
    trainer = make_trainer(
        tmp_path, callback, Report(callback, tmp_path), strategy="ddp_fork", devices=2, max_epochs=1
    )
    trainer.fit(module)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first == second and len(first) == 2

    single, both = ExpertUsage(every_n_steps=2), Loader(10)
    both.data[::2], both.data[1::2] = Loader(5, seed=0).data, Loader(5, seed=1).data
    fit(tmp_path, single, module=twin, loader=both, accumulate_grad_batches=2)
    assert single.history == first
    # the unfinished interval in the checkpoint holds both ranks' load
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"][single.state_key]
    assert state["pending"] == single._own_pending()
    assert sum(state["pending"][PATHS[0]]) == 2 * 4 * 2


def test_only_one_rank_goes_on_from_the_load_of_all(tmp_path):
    callback = ExpertUsage(every_n_steps=4)
    callback.load_state_dict(
        {"step": 5, "history": [], "idle": {}, "warned": {}, "pending": {PATHS[0]: [7, 7, 7, 7]}}
    )

    class Trainer:
        barebones, global_step, is_global_zero = False, 5, False

    module = swapped()
    for rank_zero, expected in ((False, 0), (True, 28)):
        twin = copy.deepcopy(callback)
        trainer = Trainer()
        trainer.is_global_zero = rank_zero
        twin.on_fit_start(trainer, module)
        twin.on_train_start(trainer, module)
        assert sum(twin.state_dict()["pending"][PATHS[0]]) == expected
        twin.teardown(trainer, module, "fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer >= 1"),
        ({"dead_after": True}, "dead_after must be an integer >= 1"),
        ({"max_history": 1}, "max_history - 1 must be an integer >= 1"),
    ],
)
def test_bad_settings_are_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        ExpertUsage(**settings)


def test_no_layer_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="a ButterflyMoE layer to record: got 0 of them"):
        fit(tmp_path, ExpertUsage(), module=InInit())
    with pytest.raises(ConfigError, match=r"fits \['x'\]: got 2 of them: net.0.mlp, net.1.mlp"):
        fit(tmp_path, ExpertUsage(layers=["x"]))
