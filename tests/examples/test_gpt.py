"""The plain GPT: trains, is causal, generates under its own generator, knows nothing of us."""

import ast
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from examples import gpt as gpt_file
from examples.gpt import GPT
from examples.text_data import TextData
from lightning_bfmoe.data import RandomWindows

SMALL = {"vocab_size": 40, "context": 12, "width": 16, "depth": 2, "heads": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(**SMALL)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


def test_knows_nothing_of_the_package():
    tree = ast.parse(Path(gpt_file.__file__).read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert not [name for name in modules if name.startswith(("lightning_bfmoe", "examples"))]


def test_trains_three_steps(model):
    tokens = torch.randint(40, (500,), generator=torch.Generator().manual_seed(1))
    batches = DataLoader(RandomWindows(tokens, 12, 12), batch_size=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(max_steps=3)
    run.fit(model, batches, batches)
    assert run.global_step == 3
    assert torch.isfinite(run.callback_metrics["train_loss"])
    assert torch.isfinite(run.callback_metrics["val_loss"])
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert same == []


def test_a_future_token_does_not_change_past_logits(model):
    tokens = torch.randint(40, (1, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 40
    with torch.no_grad():
        first, second = model(tokens), model(changed)
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.allclose(first[:, 7:], second[:, 7:])


def test_head_is_tied_to_the_embedding(model):
    assert model.head.weight is model.embed.weight


def test_generate_repeats_under_its_seed_and_leaves_the_global_state_alone(model):
    prompt = torch.tensor([1, 2, 3])
    before = torch.get_rng_state()
    first = model.generate(prompt, 20, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, model.generate(prompt, 20, seed=5))
    assert not torch.equal(first, model.generate(prompt, 20, seed=6))
    assert torch.equal(first[:3], prompt)
    assert len(first) == 23
    assert model.training


def test_generate_takes_the_best_token_at_temperature_zero(model):
    greedy = model.generate(torch.tensor([1]), 5, temperature=0)
    assert torch.equal(greedy, model.generate(torch.tensor([1]), 5, top_k=1, seed=9))


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_text_data_cuts_windows_of_a_corpus(tmp_path, tokenizer):
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"chapter {index} of the book\n" * 60)
    data = TextData(
        str(tmp_path), tokenizer, vocab_size=300, context=16, batch_size=4, steps=5, val_windows=6
    )
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    inputs, targets = batches[0]
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    held_out = torch.cat([x for x, _ in data.val_dataloader()])
    assert held_out.shape == (6, 16)
    first = data.tokenizer.decode(held_out[0])
    assert data.text.validation.startswith(first)
    assert data.tokenizer.decode(data.train_tokens) == data.text.train
