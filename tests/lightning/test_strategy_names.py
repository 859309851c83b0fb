"""The strategy's names: found in either order of imports, once, and from a command line."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

import lightning_bfmoe
from lightning_bfmoe import ButterflyMoECallback, ButterflyMoEStrategy
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.strategy import registry
from lightning_bfmoe.strategy.launchers import SwappingLauncher
from tests.lightning.modules import WithData

ROOT = Path(__file__).parents[2]

OURS_FIRST = """
import sys
import lightning_bfmoe
assert not {"lightning", "torch"} & set(sys.modules), "the door is heavy"
assert sum(type(f).__name__ == "_Waiting" for f in sys.meta_path) == 1
import importlib
importlib.reload(lightning_bfmoe)
assert sum(type(f).__name__ == "_Waiting" for f in sys.meta_path) == 1
import inspect
import lightning as L
import lightning.pytorch.strategies as strategies
assert strategies.__loader__ is strategies.__spec__.loader
assert type(strategies.__loader__).__name__ == "SourceFileLoader"
assert "StrategyRegistry" in inspect.getsource(strategies)
assert "lightning_bfmoe.callbacks" not in sys.modules, "registering imports our callbacks"
trainer = L.Trainer(strategy="bfmoe", accelerator="cpu", devices=1, logger=False)
assert isinstance(trainer.strategy, lightning_bfmoe.ButterflyMoEStrategy)
import pytorch_lightning
try:
    pytorch_lightning.Trainer(strategy="bfmoe", accelerator="cpu", devices=1, logger=False)
except lightning_bfmoe.BFMoEError as error:
    assert "import lightning.pytorch as pl" in str(error)
else:
    raise AssertionError("pytorch_lightning took the name in silence")
"""
THEIRS_FIRST = """
import lightning as L
import lightning_bfmoe
trainer = L.Trainer(strategy="bfmoe_ddp", accelerator="cpu", devices=1, logger=False)
assert isinstance(trainer.strategy, lightning_bfmoe.ButterflyMoEStrategy)
"""


@pytest.mark.parametrize("code", [OURS_FIRST, THEIRS_FIRST], ids=["ours first", "theirs first"])
def test_the_names_are_found_in_either_order_of_imports(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", registry.NAMES)
def test_each_name_starts_its_kind_of_process(name):
    trainer = L.Trainer(strategy=name, accelerator="cpu", devices=2, logger=False)
    assert type(trainer.strategy) is ButterflyMoEStrategy
    start_method = registry.NAMES[name]
    assert trainer.strategy._start_method == start_method
    assert isinstance(trainer.strategy.launcher, SwappingLauncher) == (start_method != "popen")


def test_registering_again_changes_nothing():
    before = dict(StrategyRegistry)
    lightning_bfmoe._register_strategies()
    ButterflyMoEStrategy.register_strategies(StrategyRegistry)
    assert dict(StrategyRegistry) == before
    taken = _StrategyRegistry()
    taken.register("bfmoe", dict)
    registry.register(taken)
    assert taken["bfmoe"]["strategy"] is dict and len(taken) == len(registry.NAMES)


def test_the_other_namespace_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="pytorch_lightning.Trainer.*import lightning.py"):
        registry.refuse(start_method="popen")


def test_modules_of_other_names_are_found_as_always():
    assert registry._Waiting().find_spec("json", None) is None
    assert registry._Waiting().find_spec("lightning.pytorch.strategies", []) is None


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "default_root_dir": str(tmp_path),
        "fast_dev_run": True,
    }
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump({"trainer": settings}))
    return path


def command(*arguments):
    return LightningCLI(
        WithData,
        args=["fit", *map(str, arguments)],
        save_config_callback=None,
        seed_everything_default=False,
    )


def test_a_command_line_takes_the_name(base):
    cli = command("--config", base, "--trainer.strategy=bfmoe")
    assert type(cli.trainer.strategy) is ButterflyMoEStrategy
    assert len(list(moe_layers(cli.model))) == 2


def test_a_config_takes_the_class_with_the_settings_of_the_callback(base, tmp_path):
    settings = {
        "num_experts": 3,
        "plan": {"end": 0.8},
        "compress": "bf16",
        "find_unused_parameters": True,
        "process_group_backend": "gloo",
    }
    strategy = {"class_path": "lightning_bfmoe.ButterflyMoEStrategy", "init_args": settings}
    mine = tmp_path / "strategy.yaml"
    mine.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    cli = command("--config", base, "--config", mine)
    own = cli.trainer.strategy
    assert {layer.settings["num_experts"] for _, layer in moe_layers(cli.model)} == {3}
    assert own.callback.plan.end == 0.8 and own.compress == "bf16"
    assert own._ddp_kwargs["find_unused_parameters"] and own.process_group_backend == "gloo"


def test_a_printed_config_is_read_again_beside_a_callback(base, tmp_path, capsys):
    """Printing writes all settings out; those at their default are not settings."""
    mine = tmp_path / "strategy.yaml"
    strategy = {"class_path": "lightning_bfmoe.ButterflyMoEStrategy"}
    mine.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    more = ["--config", mine, "--trainer.callbacks+=lightning_bfmoe.ButterflyMoECallback"]
    with pytest.raises(SystemExit, match="0"):
        command("--config", base, *more, "--print_config")
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert "Unable to serialize" not in printed.read_text()
    cli = command("--config", printed)
    assert cli.trainer.strategy.callback is None
    assert sum(isinstance(c, ButterflyMoECallback) for c in cli.trainer.callbacks) == 1
