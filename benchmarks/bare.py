"""The benchmarks' models on a machine without Lightning.

`examples.gpt.GPT` is a LightningModule, as a user's model is; a benchmark that only calls its
forward needs nothing of Lightning. Import this module before `examples`: where the package is
missing, a stand-in takes its name in this process, so that a bare GPU machine runs the same class.
"""

import importlib.util
import sys
from types import ModuleType

from torch import nn


class PlainModule(nn.Module):
    """What remains of a LightningModule: its hyperparameters are not kept, nothing is logged."""

    def save_hyperparameters(self) -> None:
        """Nothing: the benchmark knows its sizes."""


def stand_in() -> bool:
    """Whether Lightning is missing, and the stand-in took its name."""
    if importlib.util.find_spec("lightning") is not None:
        return False
    module = ModuleType("lightning")
    module.LightningModule = PlainModule  # type: ignore[attr-defined]
    sys.modules["lightning"] = module
    return True


MISSING = stand_in()
