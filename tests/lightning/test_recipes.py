"""Every recipe of the top-level folder: parsed, printed and run for a step by LightningCLI."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.cli import LightningCLI

from lightning_bfmoe import (
    AngleWarmup,
    ButterflyMoECallback,
    TernarySchedule,
    load_from_checkpoint,
    swap_feed_forward,
)
from lightning_bfmoe.callbacks import RouterBalance
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.plan import Plan
from tests.lightning.modules import Base, WithData, assert_same_state

FOLDER = Path(__file__).parents[2] / "callbacks"
THEIRS = "lightning.pytorch.callbacks.ModelSummary"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PARTS = {"by_hand": (TernarySchedule, AngleWarmup, RouterBalance)}


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A user's own config, with a callback in it."""
    monkeypatch.setattr("sys.argv", ["main.py"])
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "default_root_dir": str(tmp_path),
        "callbacks": [{"class_path": THEIRS, "init_args": {"max_depth": 2}}],
    }
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump({"model": {"lr": 0.02}, "trainer": settings}))
    return path


class ByHand(WithData):
    """A module that swaps by itself."""

    def __init__(self, lr: float = 1e-2):
        super().__init__(lr)
        swap_feed_forward(self, num_experts=4)


def model_for(recipe):
    return {"model_class": ByHand if recipe.stem in PARTS else WithData}


def command(*arguments, run=True, **settings):
    """What `python main.py fit ...` does; without `run` it stops before the training."""
    return LightningCLI(
        **{"model_class": WithData, **settings},
        args=[*(["fit"] if run else []), *map(str, arguments)],
        run=run,
        save_config_callback=None,
        seed_everything_default=False,
    )


def ours(cli):
    (found,) = (c for c in cli.trainer.callbacks if isinstance(c, ButterflyMoECallback))
    return found


def settings_of(cli):
    """Config and plan of each callback of ours."""
    kinds = (ButterflyMoECallback, TernarySchedule, AngleWarmup)
    found = [c for c in cli.trainer.callbacks if isinstance(c, kinds)]
    assert found
    return [(type(c), getattr(c, "config", None), c.plan) for c in found]


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"butterfly_moe", "from_scratch", "paper"}
    assert {path.suffix for path in FOLDER.iterdir()} == {".yaml", ".md"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_and_keeps_the_users_callbacks(recipe, base):
    one_step = "--trainer.fast_dev_run=true"
    cli = command("--config", base, "--config", recipe, one_step, **model_for(recipe))
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert {ModelSummary, *PARTS.get(recipe.stem, [ButterflyMoECallback])} <= set(kinds)
    assert len(list(moe_layers(cli.model))) == 2
    assert cli.trainer.global_step == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_printed_and_read_again(recipe, base, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        command("--config", base, "--config", recipe, "--print_config", **model_for(recipe))
    printed = capsys.readouterr().out
    assert "Unable to serialize" not in printed
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    cli = command("--config", again, "--trainer.fast_dev_run=true", **model_for(recipe))
    plain = command("--config", base, "--config", recipe, run=False, **model_for(recipe))
    assert settings_of(cli) == settings_of(plain)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_explains_each_of_its_keys(recipe):
    assert recipe.name in (FOLDER / "README.md").read_text()
    lines = recipe.read_text().splitlines()
    assert lines[0].startswith("# ")
    (first, *_) = yaml.safe_load(recipe.read_text())["trainer"]["callbacks+"]
    assert set(first) == {"class_path", "init_args"}


def test_the_main_recipe_holds_the_defaults(base):
    found = ours(command("--config", base, "--config", FOLDER / "butterfly_moe.yaml", run=False))
    plain = ButterflyMoECallback()
    assert found.plan == Plan()
    written = {"angle_std": 0.02, "balance_rate": 0.001}
    assert found.config.to_dict() == {**plain.config.to_dict(), **written}
    assert found.config.angle_std_or_default == plain.config.angle_std_or_default
    assert found.config.balance_rate_or_default == plain.config.balance_rate_or_default
    assert found.angle_lr_factor == plain.angle_lr_factor


def test_numbers_keep_their_kind_through_yaml(base):
    """An int is a number of steps and a float a fraction, also after the command line."""
    recipe = FOLDER / "butterfly_moe.yaml"
    more = ["--trainer.callbacks.plan.start=0", "--trainer.callbacks.plan.end=1.0"]
    found = ours(command("--config", base, "--config", recipe, *more, run=False))
    assert found.plan == Plan(start=0, end=1.0)
    assert type(found.plan.start) is int and type(found.plan.end) is float


def test_a_callback_is_added_on_the_command_line_alone(base):
    more = ["--trainer.callbacks+=lightning_bfmoe.ButterflyMoECallback"]
    more += ["--trainer.callbacks.num_experts=16", "--trainer.callbacks.plan.shape=sigmoid"]
    found = ours(command("--config", base, *more, run=False))
    assert found.config.num_experts == 16 and found.plan == Plan(shape="sigmoid")


@pytest.mark.parametrize("subclass", [False, True])
def test_a_checkpoint_of_the_command_line_is_loaded(subclass, base, tmp_path):
    """In subclass mode the checkpoint names the class, and the base class can load it."""
    settings = {"model_class": Base, "subclass_mode_model": True} if subclass else {}
    if subclass:
        config = yaml.safe_load(base.read_text())
        place = f"{WithData.__module__}.{WithData.__name__}"
        config["model"] = {"class_path": place, "init_args": {"lr": 0.02}}
        base.write_text(yaml.safe_dump(config))
    more = ["--config", FOLDER / "butterfly_moe.yaml", "--trainer.max_epochs=1"]
    cli = command("--config", base, *more, **settings)
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    loaded = load_from_checkpoint(Base if subclass else WithData, tmp_path / "cli.ckpt")
    assert type(loaded) is WithData and loaded.hparams.lr == 0.02
    assert_same_state(loaded, cli.model)
    assert "on_load_checkpoint" not in {*vars(WithData), *vars(Base)}
