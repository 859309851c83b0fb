"""docs/deploy.md: every command and every Python block of its pages on GPU and serving runs."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from examples.gpt import GPT
from lightning_bfmoe import pack, swap_feed_forward
from lightning_bfmoe.cli import main
from lightning_bfmoe.layers import set_blend

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
HEAD, GPU = (
    DOC.partition("## GPU server")[0],
    re.search(r"## GPU server\n.*?(?=\n## |\Z)", DOC, re.S),
)
OURS = HEAD + GPU[0]
INIT = {"vocab_size": 256, "context": 64, "width": 16, "depth": 1, "heads": 2}


def blocks(language):
    found = re.findall(rf"([^\n]*)\n```{language}\n(.*?)```", OURS, re.DOTALL)
    return [code for before, code in found if "no-run" not in before]


def commands():
    inline = re.findall(r"`((?:python|bfmoe|pytest) [^`.][^`]*)`", OURS)
    return [line for code in blocks("bash") for line in code.splitlines()] + inline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of the page would stand: `last.ckpt` and `model.bfmoe` are there."""
    torch.manual_seed(0)
    model = GPT(**INIT)
    swap_feed_forward(model, num_experts=3)
    set_blend(model, 1.0)
    folder = tmp_path_factory.mktemp("reader")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
    pack(model, folder / "model.bfmoe", angles="int8", example=torch.tensor([[1, 2, 3]]))
    return folder


def test_the_page_has_what_the_tests_run():
    assert len(commands()) >= 12
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("bfmoe")])
def test_commands_of_ours(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = shlex.split(command)[1:]
    if words[0] == "pack":
        words.append("--force")  # the fixture has written the file that the reader has not
    assert main(words) == 0
    assert capsys.readouterr().out.strip()


def test_the_server_is_started_as_the_page_says(folder, monkeypatch):
    pytest.importorskip("litserve", reason="examples/serve.py needs litserve")
    import litserve

    from examples import serve

    (command,) = [c for c in commands() if "examples.serve" in c]
    (request,) = [c for c in commands() if "/generate" in c]
    started = {}
    monkeypatch.chdir(folder)
    monkeypatch.setattr(litserve.LitServer, "run", lambda self, **options: started.update(options))
    assert serve.main(shlex.split(command)[3:]) == 0
    assert started["port"] == 8000
    assert f"localhost:{started['port']}/generate" in request
    body = json.loads(shlex.split(request)[-1])
    assert serve.Completion(**body).sampling().seed == 1
    assert "curl localhost:8000/health" in commands()


def test_python_blocks_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for code in blocks("python"):
        exec(compile(code, "docs/deploy.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert lines[-1].endswith("['length', 'length']")


def test_scripts_take_the_options_that_the_page_gives(monkeypatch, capsys):
    scripts = [c for c in commands() if c.startswith("python") and "examples.serve" not in c]
    assert len(scripts) == 3
    for command in scripts:
        words = shlex.split(command)[1:]
        if words[0] == "-m":
            less = ["--mutations", "5", "--memory", "0"]  # and no limit for the tests' own process
            monkeypatch.setattr(sys, "argv", [*words[1:], *less])
            runpy.run_module(words[1], run_name="__main__")
            assert "5 mutations, no crash" in capsys.readouterr().out
        else:
            monkeypatch.setattr(sys, "argv", [*words, "--help"])
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            given = {word for word in words[1:] if word.startswith("--")}
            assert given <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_links_and_names_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", OURS):
        assert (ROOT / "docs" / target).exists(), target
