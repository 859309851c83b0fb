"""`bfmoe pack`, `verify` and `run`: what they write, print and refuse."""

import lightning as L
import pytest
import torch
from torch import nn

from examples.gpt import GPT
from lightning_bfmoe import inspect_packed, load_packed, pack, plan_memory, swap_feed_forward
from lightning_bfmoe.cli import main
from lightning_bfmoe.layers import ButterflyMoE, set_blend

CLASS = "examples.gpt:GPT"
INIT = {"vocab_size": 256, "context": 8, "width": 16, "depth": 1, "heads": 2}


class ByHand(L.LightningModule):
    """Built with the layer itself; generates nothing."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.save_hyperparameters()
        self.layer = ButterflyMoE(width, 8, 2)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture(autouse=True)
def _wide_console(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def swapped_gpt():
    torch.manual_seed(0)
    model = GPT(**INIT)
    swap_feed_forward(model, num_experts=3)
    set_blend(model, 1.0)
    return model


def save(model, path):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=True)
    return path


@pytest.fixture
def ckpt(tmp_path):
    return save(swapped_gpt(), tmp_path / "trained.ckpt")


@pytest.fixture
def packed(tmp_path):
    """A file that records a forward pass and the class's arguments."""
    path = tmp_path / "model.bfmoe"
    pack(swapped_gpt(), path, angles="int8", example=torch.tensor([[1, 2, 3]]))
    return path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(capsys, *command):
    assert main([str(word) for word in command]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.replace("│", " ").split())


def test_pack_a_checkpoint_and_read_it_back(ckpt, capsys):
    command = ["pack", str(ckpt), "--module", CLASS, "--angles", "int8", "--tokens", "[1, 2, 3]"]
    assert main(command) == 0
    target = ckpt.with_suffix(".bfmoe")
    out = capsys.readouterr().out
    assert f"{target.stat().st_size:,} bytes" in out and "int8" in out
    assert files(ckpt.parent) == ["trained.bfmoe", "trained.ckpt"]
    expected = ckpt.parent / "expected.bfmoe"
    pack(swapped_gpt(), expected, angles="int8", example=torch.tensor([[1, 2, 3]]))
    assert target.read_bytes() == expected.read_bytes()
    load_packed(target, GPT(**INIT))


def test_pack_overwrites_only_with_force(ckpt, tmp_path, capsys):
    out = tmp_path / "small.bfmoe"
    out.write_text("precious")
    command = ["pack", ckpt, "--module", CLASS, "--out", out]
    assert "Add --force" in refused(capsys, *command)
    assert out.read_text() == "precious"
    options = ["--rest", "bf16", "--bits", "2", "--force"]
    assert main([str(word) for word in [*command, *options]]) == 0
    assert inspect_packed(out).layers[0].record.router == "bfloat16"


def test_pack_a_module_that_was_built_with_the_layer(tmp_path):
    path = save(ByHand(), tmp_path / "by_hand.ckpt")
    assert main(["pack", str(path), "--module", f"{__name__}:ByHand"]) == 0
    load_packed(tmp_path / "by_hand.bfmoe", ByHand())


def test_pack_refuses_a_lambda_below_one_unless_told_to_finalize(tmp_path, capsys):
    model = swapped_gpt()
    set_blend(model, 0.25)
    path = save(model, tmp_path / "half.ckpt")
    assert "finalize=True" in refused(capsys, "pack", path, "--module", CLASS)
    assert files(tmp_path) == ["half.ckpt"]
    assert main(["pack", str(path), "--module", CLASS, "--finalize"]) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (["--module", CLASS, "--init", '{"width": 20}'], "fits a module that is built like"),
        (["--module", CLASS, "--init", '{"heads": 3, "depth": "x"}'], "CheckpointError"),
        (["--module", "examples.gpt:nothing"], "must be importable"),
        (["--module", "examples.gpt:math"], "names a class of modules"),
        (["--module", "torch.nn:Linear"], "loaded into a LightningModule"),
        ([], "--module must name the model's class"),
        (["--module", CLASS, "--tokens", "[1, 999]"], "an example is an input of the model"),
        (["--module", CLASS, "--out", "no/such/folder/x.bfmoe"], "the folder must exist"),
    ],
)
def test_pack_refuses_and_leaves_nothing(change, match, ckpt, capsys):
    before = files(ckpt.parent)
    assert match in refused(capsys, "pack", ckpt, *change)
    assert files(ckpt.parent) == before


@pytest.mark.parametrize("content", [None, b"zip?", b""])
def test_pack_refuses_what_is_no_checkpoint(content, tmp_path, capsys):
    path = tmp_path / "x.ckpt"
    if content is not None:
        path.write_bytes(content)
    assert "CheckpointError" in refused(capsys, "pack", path, "--module", CLASS)
    assert not path.with_suffix(".bfmoe").exists()


def test_verify_with_and_without_the_model(packed, tmp_path, capsys):
    assert main(["verify", str(packed)]) == 0
    out = capsys.readouterr().out
    assert "checksums match" in out and "12 rotations in 1 layers are orthogonal" in out
    assert "name the model's class with --module" in out
    assert main(["verify", str(packed), "--module", CLASS]) == 0
    assert "the recorded forward pass repeats, to 0.0e+00" in capsys.readouterr().out
    plain = tmp_path / "plain.bfmoe"
    pack(swapped_gpt(), plain)
    assert main(["verify", str(plain), "--module", CLASS]) == 0
    assert "no forward pass is recorded" in capsys.readouterr().out


def test_verify_refuses_damage_and_another_function(packed, capsys):
    data = bytearray(packed.read_bytes())
    data[-5] ^= 1
    packed.with_name("bad.bfmoe").write_bytes(data)
    assert "match its checksum" in refused(capsys, "verify", packed.with_name("bad.bfmoe"))
    other = f"{__name__}:Doubled"
    assert "computes what was recorded" in refused(capsys, "verify", packed, "--module", other)
    wrong = ["--module", CLASS, "--init", '{"context": 9}']
    assert "same shape" in refused(capsys, "verify", packed, *wrong)


class Doubled(GPT):
    """The same tensors, another function."""

    def forward(self, tokens):
        return 2 * super().forward(tokens)


def test_run_continues_a_prompt(packed, capsys):
    command = ["run", str(packed), "--module", CLASS, "--prompt", "ab", "--num-tokens", "5"]
    assert main([*command, "--temperature", "0"]) == 0
    first = capsys.readouterr().out
    prompt = torch.tensor(list(b"ab"))
    ids = load_packed(packed, GPT(**INIT)).generate(prompt, 5, temperature=0)
    assert first == bytes(ids.tolist()).decode(errors="replace") + "\n"
    assert main([*command, "--temperature", "0", "--low-memory"]) == 0
    assert capsys.readouterr().out == first
    assert main([*command, "--temperature", "0", "--cache", "false"]) == 0
    assert capsys.readouterr().out == first
    assert main(["run", str(packed), "--module", CLASS, "--prompt", "nä", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("nä") and len(out.encode()) > 8  # the context is full


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--module", "lightning_bfmoe.demo:ByteModel", "--prompt", "a"], "must be buildable"),
        (["--module", f"{__name__}:Silent", "--prompt", "a"], "its place in the model"),
        (["--module", f"{__name__}:NoCache", "--prompt", "a"], "--cache false"),
        (["--module", CLASS], "at least one token"),
        (["--module", CLASS, "--prompt", "\udcff"], "not UTF-8"),
        (["--module", CLASS, "--prompt", "nine byte"], "fit the context of 8 tokens"),
        (["--module", CLASS, "--prompt", "a", "--num-tokens", "8"], "1 tokens and 8 new"),
        (["--module", CLASS, "--prompt", "a", "--num_tokens", "0"], "max_new_tokens is a count"),
        (["--module", CLASS, "--prompt", "a", "--temperature", "-1"], "temperature is a finite"),
        (["--module", CLASS, "--prompt", "a", "--tokenizer", "no.json"], "a tokenizer is a JSON"),
        (["--module", CLASS, "--prompt", "a", "--device", "abacus"], "device names one that"),
        (["--module", CLASS, "--prompt", "a", "--context", "9"], "the model says 8"),
    ],
)
def test_run_says_what_is_wrong(options, match, packed, capsys):
    assert match in refused(capsys, "run", packed, *options)


def test_run_refuses_tokens_that_the_model_does_not_know(tmp_path, capsys):
    model = GPT(**{**INIT, "vocab_size": 50})
    swap_feed_forward(model, num_experts=3)
    pack(model, tmp_path / "small.bfmoe")
    command = ["run", tmp_path / "small.bfmoe", "--module", CLASS, "--prompt", "z"]
    assert "knows the tokens 0 .. 49" in refused(capsys, *command)


def test_run_continues_with_a_class_that_has_no_cache(packed, capsys):
    command = ["run", str(packed), "--prompt", "ab", "--temperature", "0"]
    assert main([*command, "--module", CLASS]) == 0
    first = capsys.readouterr().out
    assert main([*command, "--module", f"{__name__}:NoCache", "--cache", "false"]) == 0
    assert capsys.readouterr().out == first


class NoCache(GPT):
    """Its forward takes ids alone."""

    def forward(self, tokens):
        return super().forward(tokens)


class Silent(nn.Module):
    """Takes any arguments, holds nothing."""

    def __init__(self, **settings):
        super().__init__()


def test_plan_counts_the_widths_of_a_file(capsys):
    sizes = "plan --d_model 512 --d_ff 2048 --num_experts 256"
    assert main([*sizes.split(), "--angle-bits", "8", "--router-bits", "16"]) == 0
    plan = plan_memory(512, 2048, 256, angle_bits=8, router_bits=16)
    assert f"{plan.ratio('moe_fp32'):.2f}x" in capsys.readouterr().out
    assert "angle_bits must be one of" in refused(capsys, *sizes.split(), "--angle_bits", "7")


def test_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("demo", "plan", "inspect", "pack", "verify", "run"))
