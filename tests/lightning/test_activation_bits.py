"""int8 and int4 activations from the callback's keyword to the packed file, and back."""

import pytest
import torch

from lightning_bfmoe import ButterflyMoECallback, load_from_checkpoint
from lightning_bfmoe.deploy import load_packed, pack
from lightning_bfmoe.errors import CheckpointError
from tests.lightning.modules import D, InInit, Loader, make_trainer


@pytest.mark.parametrize("bits", [4, 8])
def test_the_width_reaches_every_form_of_the_model(tmp_path, bits):
    torch.manual_seed(0)
    module = InInit()
    ours = ButterflyMoECallback(num_experts=4, activation_bits=bits, verbose=False)
    trainer = make_trainer(tmp_path, ours, max_epochs=2)
    trainer.fit(module, Loader())
    x = torch.randn(20, D)
    expected = module.eval()(x)

    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    pack(module, tmp_path / "trained.bfmoe", angles="fp32")
    for other in (
        load_from_checkpoint(InInit, tmp_path / "trained.ckpt"),
        load_packed(tmp_path / "trained.bfmoe", InInit()),
    ):
        assert other.net[0].mlp.experts.down.activation_bits == bits
        assert other.eval()(x).equal(expected)
        for linear in other.net[0].mlp.experts.linears().values():
            linear.activation_bits = None
        assert not other(x).equal(expected)

    without = ButterflyMoECallback(num_experts=4, verbose=False)
    with pytest.raises(CheckpointError, match=f"activation_bits: layer None, checkpoint {bits}"):
        make_trainer(tmp_path, without, max_epochs=3).fit(
            InInit(), Loader(), ckpt_path=tmp_path / "trained.ckpt", weights_only=False
        )
