"""Is a packed model the trained one, on this device, in each dtype, and with a cache?

    python benchmarks/parity.py --out benchmarks/results/parity_cpu.json
    python benchmarks/parity.py --device cuda --out benchmarks/results/parity_cuda.json

The model, its training and its 10,240 held-out tokens are those of `benchmarks/onnx_parity.py`,
which compares the ONNX export; the truth is the latent model in float32 on the CPU. Here each
packed file is loaded on a device and cast to a dtype, and asked for the same logits at once and
with a key-value cache in pieces of 32. On CUDA the greedy text of the captured graph is compared
with that of the plain steps, too. No time is measured, so other load does not matter.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.onnx_parity import EXPERTS, PACKINGS, SIZES, compare, train
from examples.gpt import GPT
from examples.text_data import TextData
from lightning_bfmoe import load_packed, pack
from lightning_bfmoe.deploy import KVCache, Sampling, TokenGenerator

ROOT = Path(__file__).resolve().parents[1]
CONTEXT, PIECE = SIZES["context"], 32
DTYPES = {
    "cpu": {"float32": torch.float32, "bfloat16": torch.bfloat16},
    "cuda": {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
}


def logits_of(model: nn.Module, inputs: Tensor, device: str, cached: bool) -> Tensor:
    """Logits of every place, float32 on the CPU."""
    found = []
    with torch.no_grad():
        for ids in inputs.to(device).split(8):
            cache, step = KVCache(len(ids), CONTEXT, device), PIECE if cached else CONTEXT
            for first in range(0, CONTEXT, step):
                piece = ids[:, first : first + step]
                if cached:
                    cache.begin(step, first + step)
                    found.append(model(piece, cache).float().cpu())
                    cache.lengths.add_(step)
                else:
                    found.append(model(piece).float().cpu())
    width = CONTEXT // PIECE if cached else 1
    rows = [torch.cat(found[i : i + width], dim=1) for i in range(0, len(found), width)]
    return torch.cat(rows)


def same_text(model: nn.Module, inputs: Tensor) -> float:
    """Share of 32 greedy tokens behind 16 prompts that the captured graph writes as plain steps."""
    prompts, greedy = list(inputs[:16, :64]), Sampling(32, temperature=0)
    plain, graph = (
        torch.tensor([row.tokens for row in generator.generate(prompts, greedy)])
        for generator in (TokenGenerator(model, cuda_graph=False), TokenGenerator(model))
    )
    return float((plain == graph).double().mean())


def measure(model: GPT, inputs: Tensor, targets: Tensor, device: str) -> list[dict[str, Any]]:
    """A record for each file, dtype and way."""
    records = []
    truth = logits_of(model, inputs, "cpu", cached=False)
    with tempfile.TemporaryDirectory(prefix="bfmoe-") as folder:
        for name, packing in PACKINGS.items():
            path = Path(folder) / "model.bfmoe"
            pack(model, path, overwrite=True, **packing)
            for word, dtype in DTYPES[device].items():
                if "rest" in packing and word == "float32":
                    continue  # such a file computes in 16 bit
                loaded = load_packed(path, GPT(**SIZES), device=device).to(dtype)
                for cached in (False, True) if word == "float32" else (False,):
                    found = logits_of(loaded, inputs, device, cached)
                    record = {"file": name, "bytes": path.stat().st_size, "dtype": word}
                    records.append(record | {"cached": cached} | compare(found, truth, targets))
                if device == "cuda":
                    records[-1]["graph_writes_the_same"] = same_text(loaded, inputs)
                print(json.dumps(records[-1]), flush=True)
    return records


def facts(device: str) -> dict[str, Any]:
    """The machine and the versions."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"device": device, "name": name, "torch": torch.__version__, "commit": commit}


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=10_240)
    parser.add_argument("--corpus", default="shakespeare")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "parity.json")
    options = parser.parse_args()
    data = TextData(corpus=options.corpus, batch_size=8, context=CONTEXT)
    model = train(data, options.steps)
    pairs = zip(*data.val_dataloader(), strict=True)
    inputs, targets = (torch.cat(part)[: options.tokens // CONTEXT] for part in pairs)
    records = measure(model, inputs, targets, options.device)
    setting = {"sizes": SIZES, "experts": EXPERTS, "steps": options.steps}
    setting |= {"corpus": data.text.name, "tokens": inputs.numel()}
    content = {"facts": facts(options.device), "setting": setting, "records": records}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
