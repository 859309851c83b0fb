"""A training of compiled blocks that prints, after each batch, graphs so far and lambda.

Run as a process of its own: pytest's check of shape annotations would be compiled along.
`python -m tests.lightning.training_compiled FOLDER ACTIVATION_BITS`
"""

import json
import sys

from lightning.pytorch.callbacks import Callback
from torch._dynamo.utils import counters

from lightning_bfmoe import ButterflyMoECallback
from lightning_bfmoe.layers import moe_layers
from lightning_bfmoe.plan import Plan
from tests.lightning.modules import InInit, Loader, make_trainer


class Graphs(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        blends = [layer.blend for _, layer in moe_layers(module)]
        found = {"graphs": counters["stats"]["unique_graphs"], "blend": blends[0]}
        print(json.dumps({**found, "breaks": sum(counters["graph_break"].values())}), flush=True)


class Compiled(InInit):
    """aot_eager traces forward and backward as inductor does, and needs no C++ compiler."""

    def on_fit_start(self):
        for block in self.net[:2]:
            block.compile(backend="aot_eager", dynamic=False)


if __name__ == "__main__":
    folder, bits = sys.argv[1], int(sys.argv[2])
    ours = ButterflyMoECallback(
        config={"num_experts": 4, "activation_bits": bits or None},
        plan=Plan(start=0, end=30, shape="sigmoid", angle_warmup=20, freeze_latents=10),
        switch_weight=0.1,
        verbose=False,
    )
    make_trainer(folder, ours, Graphs(), max_epochs=5).fit(Compiled(), Loader())
