"""A training that says each batch it starts and saves every second step; run to be killed.

`python -m tests.lightning.training_to_kill FOLDER`
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_bfmoe import ButterflyMoECallback
from lightning_bfmoe.plan import Plan
from tests.lightning.modules import InInit, Loader, make_trainer

BATCHES, EPOCHS = 20, 2


class Module(InInit):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Says(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        print(f"batch {trainer.fit_loop.epoch_loop.total_batch_idx}", flush=True)


def train(folder, *callbacks, **fit):
    """The whole training, or with `ckpt_path=` the rest of one."""
    torch.manual_seed(1)
    module = Module()
    plan = Plan(
        start=0.0, end=0.9, freeze_latents=0.3, angle_warmup=0.5, second_stage=0.6, shape="linear"
    )
    ours = ButterflyMoECallback(
        num_experts=4, gains=True, switch_weight=0.1, plan=plan, verbose=False
    )
    trainer = make_trainer(
        folder, ours, *callbacks, max_epochs=EPOCHS, accumulate_grad_batches=2,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    trainer.fit(module, Loader(BATCHES), **fit)
    return module, ours, trainer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    save = ModelCheckpoint(folder, filename="{step:03d}", every_n_train_steps=2, save_top_k=-1)
    train(folder, Says(), save)
