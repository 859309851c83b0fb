"""Does every form of one model compute the same? Latent PyTorch, packed PyTorch, ONNX.

    python benchmarks/onnx_parity.py [--steps 300] [--tokens 10240] [--out FILE]

A small GPT with ButterflyMoE layers is trained on real text (lambda 1 from the start), then each
form of it reads the same held-out tokens in windows of its context. The reference is the model as
it was trained, float32, on the CPU. Written for each form: the relative RMS difference of its
logits, how often its most likely token is the reference's, and its loss. Where two tokens are
nearly as likely, the first of them is a matter of rounding: agreement is also given for places
where the reference's best token leads by 0.1 nats.
"""

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.gpt import GPT  # noqa: E402
from lightning_bfmoe import export_onnx, load_packed, pack, swap_feed_forward  # noqa: E402
from lightning_bfmoe.deploy.onnx_export.runner import OnnxModel  # noqa: E402
from lightning_bfmoe.layers import set_blend, update_balance  # noqa: E402

SIZES = {"vocab_size": 1024, "context": 128, "width": 128, "depth": 3, "heads": 4}
EXPERTS = {"num_experts": 16, "top_k": 2, "init": "scratch", "gains": True}
LEAD = 0.1  # nats
PACKINGS = {
    "fp16": {"angles": "fp16"},
    "int8": {"angles": "int8", "gains": "int8"},
    "int4": {"angles": "int4", "gains": "int8"},
    "int8, rest bf16": {"angles": "int8", "gains": "int8", "rest": "bf16"},
}


def train(data, steps):
    """The model, with the angles' learning rate 20 times that of the rest."""
    torch.manual_seed(0)
    model = GPT(**SIZES)
    swap_feed_forward(model, **EXPERTS)
    set_blend(model, 1.0)
    angles = [p for name, p in model.named_parameters() if name.endswith("angles")]
    others = [p for name, p in model.named_parameters() if not name.endswith("angles")]
    groups = [{"params": angles, "lr": 2e-2, "weight_decay": 0.0}, {"params": others, "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [2e-2, 2e-3], steps)
    for step, batch in enumerate(data.train_batches(steps, seed=0)):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        update_balance(model)
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} nats", flush=True)
    return model.eval()


def torch_logits(model, windows):
    with torch.no_grad():
        return torch.cat([model(batch).float() for batch in windows.split(8)])


def onnx_logits(folder, windows):
    runner = OnnxModel(folder, threads=1, library="")
    return torch.cat([torch.from_numpy(runner(b.numpy())[0]) for b in windows.split(8)])


def compare(logits, reference, targets):
    best = reference.argmax(-1)
    same = (logits.argmax(-1) == best).float()
    top = reference.topk(2, dim=-1).values
    clear = (top[..., 0] - top[..., 1]) > LEAD
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return {
        "logit_error": float((logits - reference).norm() / reference.norm()),
        "top1_agreement": float(same.mean()),
        "top1_agreement_clear": float(same[clear].mean()),
        "loss": float(loss),
    }


def measure(model, inputs, targets, reference):
    rows = {"PyTorch latent, fp32": compare(reference, reference, targets)}
    with tempfile.TemporaryDirectory() as folder:
        file, edge = Path(folder) / "model.bfmoe", Path(folder) / "edge"
        for name, packing in PACKINGS.items():
            pack(model, file, overwrite=True, **packing)
            packed = torch_logits(load_packed(file, GPT(**SIZES)), inputs)
            rows[f"PyTorch packed, {name}"] = compare(packed, reference, targets)
            for products in ("2bit", "int8") if name in ("fp16", "int8") else ("2bit",):
                export_onnx(file, edge, model=GPT(**SIZES), products=products, overwrite=True)
                found = compare(onnx_logits(edge, inputs), reference, targets)
                rows[f"ONNX, {name}, products {products}"] = found
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--corpus", default="shakespeare")
    results = ROOT / "benchmarks" / "results" / "onnx_parity.json"
    parser.add_argument("--out", type=Path, default=results)
    options = parser.parse_args()
    from examples.text_data import TextData  # a LightningDataModule: parity.py does without

    data = TextData(corpus=options.corpus, batch_size=8, context=SIZES["context"])
    model = train(data, options.steps)
    count = options.tokens // SIZES["context"]
    pairs = zip(*data.val_dataloader(), strict=True)
    inputs, targets = (torch.cat(part)[:count] for part in pairs)
    reference = torch_logits(model, inputs)
    top = reference.topk(2, dim=-1).values
    rows = measure(model, inputs, targets, reference)
    setting = {
        "sizes": SIZES, "experts": EXPERTS, "steps": options.steps, "corpus": data.text.name,
        "tokens": inputs.numel(), "lead_nats": LEAD,
        "clear_share": float(((top[..., 0] - top[..., 1]) > LEAD).float().mean()),
        "device": "CPU", "machine": platform.machine(), "torch": version("torch"),
        "onnxruntime": version("onnxruntime"),
    }  # fmt: skip
    whole = json.dumps({"setting": setting, "rows": rows}, indent=1)
    options.out.write_text(whole + "\n", encoding="utf-8")
    print(f"| form | logit error | top-1, all | top-1, lead > {LEAD} nats | loss |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['logit_error']:.1e} | {row['top1_agreement']:.2%} "
            f"| {row['top1_agreement_clear']:.2%} | {row['loss']:.4f} |"
        )


if __name__ == "__main__":
    main()
