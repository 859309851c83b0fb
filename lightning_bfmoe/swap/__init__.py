"""Floor 3: exchanging a model's feed-forward blocks for ButterflyMoE layers, and back.

`find` recognises blocks by what they compute (`probe`), `adapters` describe families without a
module of their own, `swap` exchanges, `restore` undoes, `replay` repeats it for a checkpoint.
"""

from lightning_bfmoe.swap.adapters import Adapter, register_adapter, remove_adapter
from lightning_bfmoe.swap.blocks import FeedForward
from lightning_bfmoe.swap.candidate import Candidate
from lightning_bfmoe.swap.find import find_feed_forward
from lightning_bfmoe.swap.replay import apply_swap_plan, plan_from_state_dict
from lightning_bfmoe.swap.report import SwappedBlock, SwapReport
from lightning_bfmoe.swap.restore import restore
from lightning_bfmoe.swap.swap import swap_feed_forward

__all__ = [
    "Adapter",
    "Candidate",
    "FeedForward",
    "SwapReport",
    "SwappedBlock",
    "apply_swap_plan",
    "find_feed_forward",
    "plan_from_state_dict",
    "register_adapter",
    "remove_adapter",
    "restore",
    "swap_feed_forward",
]
