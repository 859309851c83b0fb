"""A training that is killed, wherever it is, and goes on from its last file: nothing is lost."""

import secrets
import signal
import subprocess
import sys
from pathlib import Path

import torch

from lightning_bfmoe.layers import routers
from tests.lightning.modules import assert_same_state, blend_in
from tests.lightning.training_to_kill import BATCHES, EPOCHS, train

ROOT = Path(__file__).parents[2]
FIRST, LAST = 5, BATCHES * EPOCHS - 1  # the first file is there after four batches


def killed_in(folder: Path, batch: int) -> None:
    """Start the training as a process of its own and kill it as soon as it starts a batch."""
    command = [sys.executable, "-u", "-m", "tests.lightning.training_to_kill", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == f"batch {batch}":
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    whole, plugin, trainer = train(tmp_path)
    batch = FIRST + secrets.randbelow(LAST - FIRST)
    killed_in(tmp_path, batch)
    last = max(tmp_path.glob("*.ckpt"))
    checkpoint = torch.load(last, weights_only=True)
    steps = checkpoint["global_step"]
    where = f"killed in batch {batch}, went on from {last.name}"
    assert 2 <= steps < trainer.global_step, where

    again, resumed, after = train(tmp_path, ckpt_path=last)
    assert again.losses == whole.losses[2 * steps :], where
    assert_same_state(whole, again)
    pairs = zip(routers(whole), routers(again), strict=True)
    assert all(torch.equal(a.balance_bias, b.balance_bias) for (_, a), (_, b) in pairs), where
    assert any(router.balance_bias.any() for _, router in routers(whole))
    assert resumed.state_dict() == plugin.state_dict() and resumed.now == plugin.now
    assert blend_in(checkpoint["state_dict"]) == float(torch.tensor(min(steps / 18, 1.0)))
    first, second = (t.optimizers[0].state_dict() for t in (trainer, after))
    assert first["param_groups"] == second["param_groups"], where
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
