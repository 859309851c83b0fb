"""`bfmoe demo`: the whole path on a tiny model built from torch's own Transformer layers."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_bfmoe.callbacks import ButterflyMoECallback
from lightning_bfmoe.data import ByteTokenizer, RandomWindows, SequentialWindows, load_corpus
from lightning_bfmoe.deploy import load_packed, pack


class ByteModel(pl.LightningModule):
    """A byte-level language model of stock parts; nothing in it knows of ButterflyMoE."""

    def __init__(self, width: int = 64, depth: int = 2, context: int = 64) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        """Bytes (batch, length) to logits (batch, length, 256)."""
        length = ids.shape[1]
        x = self.tokens(ids) + self.places.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=ids.device)
        return self.head(self.encoder(x, mask=mask, is_causal=True))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy, nats a byte."""
        inputs, targets = batch
        loss = F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Logs `val_loss`, nats a byte."""
        inputs, targets = batch
        self.log("val_loss", F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as in any project."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def run_demo(steps: int, num_experts: int, top_k: int, out: Path) -> dict[str, float]:
    """Train dense, swap and train on, pack, load into a fresh model, generate.

    Args:
        steps: Training steps before and after the swap.
        num_experts: Experts per layer.
        top_k: Experts a token.
        out: Folder of the packed file ``demo.bfmoe``, which is overwritten.

    Returns:
        Losses in nats a byte on held-out files, and the relative difference of the logits of the
        packed file.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec")
    console = Console(highlight=False)
    corpus = load_corpus("stdlib")
    console.print(corpus.describe())
    tokenizer = ByteTokenizer()
    train, held_out = tokenizer.encode(corpus.train), tokenizer.encode(corpus.validation[:40_000])

    torch.manual_seed(0)
    model = ByteModel()
    loader = DataLoader(RandomWindows(train, model.context, 16 * steps), batch_size=16)
    judge = DataLoader(SequentialWindows(held_out, model.context), batch_size=64)

    def trainer(*callbacks: pl.Callback) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_model_summary=False, callbacks=list(callbacks),
        )  # fmt: skip

    def loss_of(candidate: nn.Module) -> float:
        quiet = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        return quiet.validate(candidate, judge, verbose=False)[0]["val_loss"]  # type: ignore[arg-type]

    results: dict[str, float] = {}
    console.rule("1  a dense model")
    trainer().fit(model, loader)
    results["dense"] = loss_of(model)

    console.rule("2  the same model and Trainer, one callback more")
    trainer(ButterflyMoECallback(num_experts=num_experts, top_k=top_k)).fit(model, loader)
    results["butterfly"] = loss_of(model)

    console.rule("3  one packed file")
    out.mkdir(parents=True, exist_ok=True)
    console.print(pack(model, out / "demo.bfmoe", overwrite=True))
    fresh = load_packed(out / "demo.bfmoe", ByteModel()).eval()
    ids = held_out[: model.context].unsqueeze(0)
    with torch.no_grad():
        ours, theirs = fresh(ids), model.eval()(ids)
    results["packed"] = loss_of(fresh)
    results["logits"] = float((ours - theirs).norm() / theirs.norm())

    console.rule("4  text from the packed file")
    console.print(tokenizer.decode(_generate(fresh, tokenizer.encode("def "), 200)), markup=False)
    console.print(
        f"held-out loss, nats a byte: dense after {steps} steps {results['dense']:.3f}, swapped "
        f"after {steps} more {results['butterfly']:.3f}, packed file {results['packed']:.3f} "
        f"(logits differ by {results['logits']:.1e}: angles are stored as float16)"
    )
    return results


def _generate(model: nn.Module, prompt: Tensor, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = prompt.unsqueeze(0)
    with torch.no_grad():
        for _ in range(length):
            logits = model(ids[:, -model.context :])[:, -1] / 0.8  # type: ignore[index, operator]
            choice = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, choice], dim=1)
    return ids[0]
