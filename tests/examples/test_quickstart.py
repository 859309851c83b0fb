"""The main job, small: every file it promises, the second run in no time, and a clean Ctrl-C."""

import io
import json

import lightning as L
import pytest
from rich.console import Console

from examples import quickstart, stages
from examples.comparison import NAMES, Comparison
from examples.control_files import header_bytes
from examples.report import results_table, save_figure
from examples.settings import Settings
from lightning_bfmoe import inspect_packed

SMALL = {
    "num_experts": 3,
    "base_steps": 3,
    "steps": 4,
    "width": 32,
    "depth": 2,
    "context": 16,
    "batch_size": 4,
    "val_windows": 8,
}
SEVEN = ("dense", "ternary-dense", "standard-moe", "ternary-moe", "butterflymoe")


@pytest.fixture(scope="module", autouse=True)
def same_source():
    """Somebody may edit a file while the tests run; that is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "source_hash", lambda: "this source")
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Command line of a small run on a small corpus, without ``--out``."""
    corpus = tmp_path_factory.mktemp("corpus")
    for index in range(30):
        (corpus / f"{index:02}.txt").write_text(f"the {index} quick foxes jump over it\n" * 80)
    return ["--corpus", str(corpus)] + [
        f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()
    ]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """Folder of a finished run."""
    out = tmp_path_factory.mktemp("finished")
    assert quickstart.main([*arguments, f"--out={out}"]) == 0
    return out


def test_results_are_complete_and_bytes_are_real(finished):
    results = json.loads((finished / "results.json").read_text())
    rows = results["rows"]
    assert tuple(rows) == NAMES
    for name, folder in zip(NAMES, SEVEN, strict=True):
        stored = finished / "stages" / folder
        (file,) = (path for path in stored.iterdir() if path.name != "record.json")
        assert rows[name]["file_bytes"] == file.stat().st_size
        assert rows[name]["ffn_bytes"] < rows[name]["file_bytes"]
        assert 0 < rows[name]["val_final"] < 20
        # a swap that keeps the function: the controls exactly, ours but for its small angles
        assert rows[name]["val_after_swap"] == pytest.approx(rows[name]["val_before"], abs=0.02)
    packed = inspect_packed(finished / "stages" / "butterflymoe" / "model.bfmoe")
    assert packed.layer_bytes == rows["ButterflyMoE"]["ffn_bytes"]
    dense, ours = rows["dense"], rows["ButterflyMoE"]
    path = finished / "stages" / "dense" / "model.safetensors"
    others = dense["file_bytes"] - header_bytes(path) - dense["ffn_bytes"]
    assert packed.counted_bytes - ours["ffn_bytes"] == others
    assert results["logits"]["logits_relative_error"] < 0.01


def test_every_promised_file_is_there_and_no_other(finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "results.json",
        "sample.txt",
        "stages",
        "training.png",
    ]
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("*.partial"))


def test_the_second_run_reuses_everything(finished, arguments, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    before = (finished / "results.json").read_bytes()
    monkeypatch.setattr(L.Trainer, "fit", refuse)
    monkeypatch.setattr(L.Trainer, "validate", refuse)
    assert quickstart.main([*arguments, f"--out={finished}"]) == 0
    assert (finished / "results.json").read_bytes() == before
    said = capsys.readouterr().out
    assert said.count("reusing") == 6
    assert "ARGS=--fresh" in said


def test_another_number_of_experts_keeps_what_does_not_depend_on_it(finished, arguments):
    settings = Settings(**{**SMALL, "num_experts": 4, "corpus": arguments[1], "out": str(finished)})
    comparison = Comparison(settings, Console(quiet=True))
    done = {
        name: comparison.stages.finished(folder, comparison.depends(name)) is not None
        for name, folder in zip(("base", *NAMES), ("base", *SEVEN), strict=True)
    }
    assert [name for name, kept in done.items() if kept] == ["base", "dense", "ternary dense"]


def test_interrupt_leaves_finished_stages_and_no_result(arguments, tmp_path, monkeypatch, capsys):
    fits = []
    fit = L.Trainer.fit

    def interrupted(self, *args, **kwargs):
        fits.append(1)
        if len(fits) == 3:
            raise KeyboardInterrupt
        return fit(self, *args, **kwargs)

    (tmp_path / "results.json").write_text("of an older run")
    monkeypatch.setattr(L.Trainer, "fit", interrupted)
    assert quickstart.main([*arguments, f"--out={tmp_path}"]) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stages"]
    assert sorted(p.name for p in (tmp_path / "stages").iterdir()) == ["base", "dense"]
    assert "Interrupted" in capsys.readouterr().out


def test_impossible_settings_are_found_out_before_any_training(arguments, tmp_path, capsys):
    assert quickstart.main([*arguments, "--top-k", "5", f"--out={tmp_path / 'new'}"]) == 2
    assert "top_k must be at most num_experts" in capsys.readouterr().out
    assert quickstart.main([*arguments, "--width=100", f"--out={tmp_path / 'new'}"]) == 2
    assert "width a multiple of 32" in capsys.readouterr().out
    assert quickstart.main(["--corpus=no-such-text", f"--out={tmp_path / 'new'}"]) == 2
    assert "an existing path" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_table_fits_a_terminal_of_80_columns():
    columns = ("val_before", "val_after_swap", "val_final")
    rows = {
        name: {"ffn_bytes": 123_456_789, "file_bytes": 123_456_789, **dict.fromkeys(columns, 12.3)}
        for name in NAMES
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(rows))
    text = console.export_text()
    assert "…" not in text
    assert text.count("123.46 MB") == 10


@pytest.mark.parametrize("experts", [1, 8, 40])
def test_figure_is_drawn_for_any_number_of_experts(tmp_path, experts):
    row = {
        "train_loss": [3.0, 2.5, 2.4],
        "blend": [0.0, 0.5, 1.0],
        "load": [[1.0] * experts] * 3,
        "val_before": 3.0,
        "val_final": 2.3,
    }
    save_figure(tmp_path / "f.png", row, dict.fromkeys(NAMES, row), "title")
    assert (tmp_path / "f.png").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]
