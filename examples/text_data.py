"""A LightningDataModule over the offline corpora of `lightning_bfmoe.data`."""

from functools import cached_property
from typing import Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_bfmoe.data import (
    ByteTokenizer,
    Corpus,
    RandomWindows,
    SequentialWindows,
    TextTokenizer,
    load_corpus,
    train_bpe,
)


class TextData(L.LightningDataModule):
    """Random training windows and evenly spaced validation windows of one corpus.

    Args:
        corpus: See `lightning_bfmoe.data.load_corpus`: a name or a path.
        tokenizer: ``"bpe"`` (trained here, on training text) or ``"bytes"``.
        vocab_size: Entries of the BPE tokeniser.
        context: Tokens in a window.
        batch_size: Windows in a step.
        steps: Steps in an epoch.
        val_windows: Windows of the held-out documents to judge on, evenly spaced; None for all.
        seed: Seed of the places of the training windows.
        judge_on: Which held-out part validation reads; ``"tuning"`` is for choosing settings.
    """

    def __init__(
        self,
        corpus: str = "shakespeare",
        tokenizer: Literal["bpe", "bytes"] = "bpe",
        vocab_size: int = 1024,
        context: int = 128,
        batch_size: int = 16,
        steps: int = 300,
        val_windows: int | None = 256,
        seed: int = 0,
        judge_on: Literal["validation", "tuning"] = "validation",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the corpus; what is not asked for is never computed."""
        _ = self.train_tokens, self.held_out_tokens

    @cached_property
    def text(self) -> Corpus:
        """The corpus. Its tuning part is always held out: both judgements train on one text."""
        return load_corpus(self.hparams.corpus, tuning_fraction=0.05)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Made from training text alone."""
        if self.hparams.tokenizer == "bytes":
            return ByteTokenizer()
        return train_bpe(self.text.train, self.hparams.vocab_size, max_characters=2_000_000)

    @cached_property
    def train_tokens(self) -> Tensor:
        """int64, 1-D."""
        return self.tokenizer.encode(self.text.train)

    @cached_property
    def held_out_tokens(self) -> Tensor:
        """int64, 1-D: the part that ``judge_on`` names."""
        return self.tokenizer.encode(getattr(self.text, self.hparams.judge_on))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """``steps`` batches of ``(inputs, targets)``, each int64 ``[batch_size, context]``."""
        return self.train_batches(self.hparams.steps, self.hparams.seed)

    def train_batches(self, steps: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """Like `train_dataloader`, for another length and seed."""
        windows = RandomWindows(
            self.train_tokens, self.hparams.context, steps * self.hparams.batch_size, seed
        )
        return DataLoader(windows, batch_size=self.hparams.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The held-out windows, always the same ones in the same order."""
        windows = SequentialWindows(self.held_out_tokens, self.hparams.context)
        count = min(self.hparams.val_windows or len(windows), len(windows))
        chosen = torch.linspace(0, len(windows) - 1, count).long().tolist()
        return DataLoader(Subset(windows, chosen), batch_size=32)
