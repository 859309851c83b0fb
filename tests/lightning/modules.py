"""Tiny LightningModules and data for the callback's tests: "your model", which knows nothing."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bfmoe.layers.state import decode_extra_state

D, HIDDEN, CLASSES = 8, 16, 3
PLACES = ("init", "setup", "configure_model")


class Block(nn.Module):
    """A feed-forward block beside a skip."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def make_net() -> nn.Sequential:
    return nn.Sequential(Block(), Block(), nn.Linear(D, CLASSES))


class Base(L.LightningModule):
    """Training and evaluation; subclasses say where the layers are built."""

    def __init__(self, lr: float = 1e-2, **others):
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Module | None = None
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).float(), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class InInit(Base):
    def __init__(self, lr: float = 1e-2):
        super().__init__(lr)
        self.net = make_net()


class InSetup(Base):
    def setup(self, stage: str) -> None:
        if self.net is None:
            self.net = make_net()


class InConfigureModel(Base):
    def configure_model(self) -> None:
        if self.net is None:
            self.net = make_net()


MODULES = dict(zip(PLACES, (InInit, InSetup, InConfigureModel), strict=True))


class NoBlock(Base):
    """A module without any feed-forward block."""

    def __init__(self, lr: float = 1e-2):
        super().__init__(lr)
        self.net = nn.Linear(D, CLASSES)


class Loader:
    """Shuffled batches whose position goes into the checkpoint, so that a resume is exact."""

    def __init__(self, batches: int = 6, size: int = 4, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batches, size, D, generator=generator)
        y = torch.randint(CLASSES, (batches, size), generator=generator)
        self.data, self.at = list(zip(x, y, strict=True)), 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        start, self.at = self.at % len(self.data), self.at % len(self.data)
        for batch in self.data[start:]:
            self.at += 1
            yield batch

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class WithData(InInit):
    """A module for a command line, with its data."""

    def train_dataloader(self):
        return Loader()


class StopAt(L.Callback):
    """Saves and stops after a number of batches, wherever in an epoch that is."""

    def __init__(self, batches: int, path):
        self.batches, self.path, self.seen = batches, path, 0

    def on_train_batch_end(self, trainer, *_):
        self.seen += 1
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def make_trainer(tmp_path, *callbacks, **settings) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    if settings.get("barebones"):
        quiet = {"accelerator": "cpu", "devices": 1, "max_epochs": 1}
    return L.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**quiet, **settings})


def blend_in(state_dict, layer: str = "net.0.mlp") -> float:
    """Lambda as a checkpoint's state_dict holds it."""
    return decode_extra_state(state_dict[f"{layer}._extra_state"])["blend"]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """Bit-equal tensors, and equal extra states."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    different = [
        key
        for key in first
        if not (
            torch.equal(first[key], second[key])
            if isinstance(first[key], Tensor)
            else first[key] == second[key]
        )
    ]
    assert different == []
