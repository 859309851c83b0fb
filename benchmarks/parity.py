"""Is a packed model the trained one, on this device, in each dtype, and with a cache?

    python benchmarks/parity.py --save outputs/parity.pt --out benchmarks/results/parity_cpu.json
    python benchmarks/parity.py --load outputs/parity.pt --device cuda --out parity_cuda.json

The model, its training and its 10,240 held-out tokens are those of `benchmarks/onnx_parity.py`,
which compares the ONNX export; the truth is the latent model in float32 on the CPU. Here each
packed file is loaded on a device and cast to a dtype, and asked for the same logits at once and
with a key-value cache in pieces of 32. On CUDA the greedy text of the captured graph is compared
with that of the plain steps, too. No time is measured, so other load does not matter.

`--save` keeps the trained model with its tokens, so that another machine compares the very same
numbers and needs neither the text nor its tokenizer. Records that --out holds are kept.
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

import benchmarks.bare  # noqa: F401  before examples
from benchmarks.onnx_parity import EXPERTS, PACKINGS, SIZES, compare, train
from examples.gpt import GPT
from lightning_bfmoe import load_packed, pack, swap_feed_forward
from lightning_bfmoe.deploy import KVCache, Sampling, TokenGenerator
from lightning_bfmoe.layers import set_blend

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


def measure(model: GPT, inputs: Tensor, targets: Tensor, device: str, store: "Store") -> None:
    """A record for each file, dtype and way."""
    truth = logits_of(model, inputs, "cpu", cached=False)
    with tempfile.TemporaryDirectory(prefix="bfmoe-") as folder:
        for name, packing in PACKINGS.items():
            path = Path(folder) / "model.bfmoe"
            pack(model, path, overwrite=True, **packing)
            for word, dtype in DTYPES[device].items():
                if "rest" in packing and word == "float32":
                    continue  # such a file computes in 16 bit
                for cached in (False, True) if word == "float32" else (False,):
                    key = {"file": name, "dtype": word, "cached": cached}
                    if store.has(key):
                        continue
                    loaded = load_packed(path, GPT(**SIZES), device=device).to(dtype)
                    found = logits_of(loaded, inputs, device, cached)
                    record = key | {"bytes": path.stat().st_size}
                    record |= compare(found, truth, targets)
                    if device == "cuda" and not cached:
                        record["graph_writes_the_same"] = same_text(loaded, inputs)
                    store.add(record)


class Store:
    """The records of a file, written after each."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        same = known.get("setting") == json.loads(json.dumps(head["setting"]))
        self.content = {**head, "records": known["records"] if same else []}

    def has(self, key: dict[str, Any]) -> bool:
        """Whether a record with these values is there."""
        return any(key.items() <= record.items() for record in self.content["records"])

    def add(self, record: dict[str, Any]) -> None:
        """Keep it, on disk too."""
        self.content["records"].append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        print(json.dumps(record), flush=True)


def trained(options: argparse.Namespace) -> dict[str, Any]:
    """The model's numbers, the held-out tokens and the setting: read, or made."""
    if options.load is not None:
        return torch.load(options.load, weights_only=True)
    from examples.text_data import TextData  # a LightningDataModule

    data = TextData(corpus=options.corpus, batch_size=8, context=CONTEXT)
    model = train(data, options.steps)
    pairs = zip(*data.val_dataloader(), strict=True)
    inputs, targets = (torch.cat(part)[: options.tokens // CONTEXT] for part in pairs)
    setting = {"sizes": SIZES, "experts": EXPERTS, "steps": options.steps}
    setting |= {"corpus": data.text.name, "tokens": inputs.numel()}
    found = {"state": model.state_dict(), "inputs": inputs, "targets": targets}
    found["setting"] = setting
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, options.save)
    return found


def rebuilt(state: dict[str, Any]) -> GPT:
    """The latent model with these numbers."""
    model = GPT(**SIZES)
    swap_feed_forward(model, **EXPERTS)
    model.load_state_dict(state)
    set_blend(model, 1.0)
    return model.eval()


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
    parser.add_argument("--save", type=Path, help="keep the trained model and its tokens")
    parser.add_argument("--load", type=Path, help="what --save wrote, in place of training")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "parity.json")
    options = parser.parse_args()
    found = trained(options)
    model = rebuilt(found["state"])
    head = {"facts": facts(options.device), "setting": found["setting"]}
    store = Store(options.out, head)
    measure(model, found["inputs"], found["targets"], options.device, store)


if __name__ == "__main__":
    main()
