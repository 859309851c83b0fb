"""Five models that go on from one trained GPT, each measured, trained, written and read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from torch import nn

from examples.control_files import feed_forward_bytes, read_model, write_model
from examples.controls import GPTWithBalanceLoss, StandardMoE, TernaryFeedForward
from examples.gpt import GPT, FeedForward
from examples.settings import Settings
from examples.stages import Stages
from examples.text_data import TextData
from examples.threads import choose_threads
from examples.watch import BlendRamp, History
from lightning_bfmoe import ButterflyMoECallback, ButterflyMoEConfig, load_packed, pack
from lightning_bfmoe.plan import Plan

PLAN = Plan()  # one for all: when the ternary weights are blended in
PROMPTS = {"shakespeare": "KING:\n", "stdlib": "def "}
Record = dict[str, Any]


class Comparison:
    """The stages; each runs once and is then reused.

    All five models start from the same weights and see the same tokens in the same order, with the
    same optimiser and schedule. Losses are in nats per token on held-out documents. Learning rate,
    batch size, and for ButterflyMoE the balance rate, were chosen on a tuning
    text that is neither trained on nor reported (``judge_on="tuning"``).

    Args:
        settings: What was chosen.
        console: Where stages are announced.
        fresh: Train again although finished stages are there.

    Raises:
        BFMoEError: The corpus cannot be read, or ``top_k`` exceeds ``num_experts``.
    """

    def __init__(self, settings: Settings, console: Console, *, fresh: bool = False) -> None:
        self.settings, self.console = settings, console
        self.measured = 0  # threads, once they are chosen
        # a wrong number of experts is found out before anything is trained
        self.config = ButterflyMoEConfig(
            num_experts=settings.num_experts, top_k=settings.top_k, balance_rate=0.01
        )
        self.stages = Stages(Path(settings.out) / "stages", fresh=fresh)
        self.data = TextData(
            corpus=settings.corpus_name,
            context=settings.context,
            batch_size=settings.batch_size,
            val_windows=settings.val_windows,
            judge_on=settings.judge_on,
        )

    def base(self) -> Record:
        """The dense model: "your existing model"."""
        return self._stage("base", "Train a plain GPT: your existing model", self._train_base)

    def continued(self, name: str) -> Record:
        """One of the five, by its name in `NAMES`."""
        return self._stage(name, *self._kinds()[name])

    def depends(self, name: str) -> dict[str, Any]:
        """What the result of a stage depends on, beside the source code."""
        depends = {"corpus": self.data.text.sha256, **self.settings.of_base()}
        if name != "base":
            depends["steps"] = self.settings.steps
        if "MoE" in name:
            depends["experts"] = self.config.to_dict()
        return depends

    def _kinds(self) -> dict[str, tuple[str, Callable[[Path], Record]]]:
        experts, top_k = self.settings.num_experts, self.settings.top_k
        moe = f"{experts} independent experts, top-{top_k}"

        def control(make: Callable[[FeedForward], nn.Module], kind: type[GPT] = GPT) -> Any:
            return lambda folder: self._train_control(folder, make, kind)

        def upcycle(ternary: bool) -> Any:
            return control(
                lambda dense: StandardMoE(dense, experts, top_k, ternary=ternary),
                GPTWithBalanceLoss,
            )

        return {
            "dense": ("Go on as it is: dense", control(lambda dense: dense)),
            "ternary dense": ("Control: dense, ternary", control(TernaryFeedForward)),
            "standard MoE": (f"Control: {moe}, fp32", upcycle(ternary=False)),
            "ternary MoE": (f"Control: {moe}, ternary", upcycle(ternary=True)),
            "ButterflyMoE": (
                f"ButterflyMoE: {experts} rotations of one ternary matrix, top-{top_k}",
                self._train_butterfly,
            ),
        }

    def _stage(self, name: str, title: str, work: Callable[[Path], Record]) -> Record:
        folder, depends = name.replace(" ", "-").lower(), self.depends(name)
        if self.stages.finished(folder, depends) is None:
            self._choose_threads()
            self.console.rule(title, align="left", characters="─")
        else:
            self.console.print(f"[dim]reusing  {title}[/dim]", highlight=False)
        return self.stages.run(folder, depends, work)

    def _choose_threads(self) -> None:
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        elif not self.measured:
            self.measured = choose_threads()

    def _train_base(self, folder: Path) -> Record:
        L.seed_everything(self.settings.seed, verbose=False)
        model, history = GPT(**self._shape()), History()
        self._fit(model, self.settings.base_steps, self.settings.seed, history)
        write_model(model, folder / "model.safetensors")
        return {**history.record(), "val_loss": self._validate(model)}

    def _train_control(
        self, folder: Path, make: Callable[[FeedForward], nn.Module], kind: type[GPT]
    ) -> Record:
        model, empty = self._from_base(kind), kind(**self._shape())
        for each in (model, empty):
            for block in each.blocks:
                block.mlp = make(block.mlp)
        after_swap, history = self._validate(model), History()
        self._fit(model, self.settings.steps, self.settings.seed + 1, BlendRamp(PLAN), history)
        path = folder / "model.safetensors"
        return {
            **history.record(),
            "val_after_swap": after_swap,
            "ffn_bytes": feed_forward_bytes(model),
            "file_bytes": write_model(model, path),
            "val_final": self._validate(read_model(empty, path)),
        }

    def _train_butterfly(self, folder: Path) -> Record:
        model = self._from_base()
        # The balance rate was chosen on the tuning text: in so short a training it has to be
        # found faster than by default.
        swap = ButterflyMoECallback(config=self.config, plan=PLAN)
        after_swap, history = self._validate(model, swap), History()
        self._fit(model, self.settings.steps, self.settings.seed + 1, swap, history)
        path = folder / "model.bfmoe"
        report = pack(model, path)
        loaded = load_packed(path, GPT(**self._shape()))
        return {
            **history.record(),
            "val_after_swap": after_swap,
            "ffn_bytes": report.layer_bytes,
            "file_bytes": path.stat().st_size,
            "val_final": self._validate(loaded),
            **self._same_logits(model, loaded),
            "sample": self._sample(loaded),
        }

    @torch.no_grad()
    def _same_logits(self, trained: GPT, loaded: GPT) -> Record:
        """How far the model from the file is from the one in memory (it holds angles in fp16)."""
        tokens = self.data.held_out_tokens[: self.settings.context][None]
        ours, theirs = trained.eval()(tokens), loaded.eval()(tokens)
        same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
        error = (ours - theirs).norm() / ours.norm()
        if not error < 0.01:
            raise RuntimeError(f"the packed file computes something else: {float(error):.1%} off")
        return {"logits_relative_error": float(error), "logits_top1_agreement": float(same)}

    def _sample(self, model: GPT) -> str:
        tokenizer, text = self.data.tokenizer, self.data.text
        prompt = PROMPTS.get(text.name, text.validation.split("\n")[0][:40] + "\n")
        return tokenizer.decode(model.generate(tokenizer.encode(prompt), 120, seed=1))

    def _shape(self) -> dict[str, Any]:
        return {"vocab_size": self.data.tokenizer.vocab_size, **self.settings.of_model()}

    def _from_base(self, kind: type[GPT] = GPT) -> GPT:
        path = self.stages.folder / "base" / "model.safetensors"
        model = read_model(kind(**self._shape()), path)
        model.learning_rate = self.settings.learning_rate / 2  # trained weights, smaller steps
        return model

    def _fit(self, model: GPT, steps: int, seed: int, *callbacks: L.Callback) -> None:
        self._trainer(*callbacks).fit(model, self.data.train_batches(steps, seed))

    def _validate(self, model: GPT, *callbacks: L.Callback) -> float:
        trainer = self._trainer(*callbacks)
        return trainer.validate(model, self.data.val_dataloader(), verbose=False)[0]["val_loss"]

    def _trainer(self, *callbacks: L.Callback) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            max_epochs=1,  # the loader holds exactly the steps that were asked for
            callbacks=[RichProgressBar(leave=True), *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )


NAMES = ("dense", "ternary dense", "standard MoE", "ternary MoE", "ButterflyMoE")
