"""The main job: swap a trained model's feed-forward blocks, train, pack, load again, generate.

Run ``make quickstart``; options: ``make quickstart ARGS=--help``.

1. Real text is read offline, and a plain GPT (`examples.gpt`) is trained on it: "your model".
2. From its weights five models go on (`examples.comparison`): as it is, ternary, as a standard
   mixture of experts in fp32 and ternary, and as ButterflyMoE, which is the same LightningModule
   with one callback in the Trainer.
3. Each is written to a file; the final loss is that of the model read back from the file.
"""

import importlib.metadata
import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from examples.comparison import NAMES, Comparison
from examples.report import human_bytes, results_table, save_figure
from examples.settings import Settings
from lightning_bfmoe import BFMoEError

RESULTS = ("results.json", "training.png", "sample.txt")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = ArgumentParser(prog="quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="Train again, reuse nothing.")
    parser.add_class_arguments(Settings)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args([_underscored(argument) for argument in given]).as_dict()
    fresh = options.pop("fresh")
    _quiet()
    console = Console(highlight=False)
    try:
        run(Settings(**options), console, fresh=fresh)
    except BFMoEError as error:
        console.print(Panel(Text(str(error)), title=type(error).__name__, border_style="red"))
        return 2
    except (KeyboardInterrupt, SystemExit):
        # Lightning turns Ctrl-C into SystemExit; the unfinished stage has left nothing behind
        console.print("\nInterrupted. Finished stages are kept: the same command goes on there.")
        return 130
    return 0


def run(settings: Settings, console: Console, *, fresh: bool = False) -> dict[str, Any]:
    """Do the job and return what ``results.json`` holds."""
    out = Path(settings.out)
    comparison = Comparison(settings, console, fresh=fresh)
    console.print(Panel(comparison.data.text.describe(), title="Text", title_align="left"))
    for name in RESULTS:  # they belong to the stages below, which may be about to change
        (out / name).unlink(missing_ok=True)
    base = comparison.base()
    rows = {name: comparison.continued(name) for name in NAMES}
    for row in rows.values():
        row["val_before"] = base["val_loss"]
    results = _results(settings, comparison, rows)
    _write(out / "results.json", json.dumps(results, indent=1) + "\n")
    _write(out / "sample.txt", rows["ButterflyMoE"]["sample"] + "\n")
    title = f"{settings.num_experts} experts, top-{settings.top_k}, {comparison.data.text.name}"
    save_figure(out / "training.png", base, rows, title)
    _show(settings, console, rows, out)
    return results


def _results(
    settings: Settings, comparison: Comparison, rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Numbers of the table and what they were measured with."""
    text = comparison.data.text
    names = ("ffn_bytes", "file_bytes", "val_before", "val_after_swap", "val_final", "seconds")
    return {
        "settings": asdict(settings),
        "corpus": {"name": text.name, "origin": text.origin, "sha256": text.sha256},
        "torch": importlib.metadata.version("torch"),
        "unit": "bytes; nats per token on held-out documents; seconds of training",
        "rows": {label: {name: row[name] for name in names} for label, row in rows.items()},
        "logits": {name: v for name, v in rows["ButterflyMoE"].items() if "logits" in name},
    }


def _show(settings: Settings, console: Console, rows: dict[str, dict[str, Any]], out: Path) -> None:
    ours = rows["ButterflyMoE"]
    console.print(
        Panel(
            Text(ours["sample"]),
            title="Written by the model that was read back from its packed file",
            title_align="left",
        )
    )
    console.print(
        f"Packed file against memory: logits differ by {ours['logits_relative_error']:.1e} "
        f"(relative), same best token at {ours['logits_top1_agreement']:.1%} of the places."
    )
    console.print(results_table(rows))
    console.print(_caption(settings), style="dim")
    others = {name: row["ffn_bytes"] / ours["ffn_bytes"] for name, row in rows.items()}
    console.print(
        f"FFN bytes against ours ({human_bytes(ours['ffn_bytes'])}): "
        + ", ".join(f"{name} {value:.2f}x" for name, value in others.items() if value != 1)
    )
    console.print(f"Packed file {out}/stages/butterflymoe/model.bfmoe")
    console.print(f"Figure {out}/training.png, numbers {out}/results.json")
    console.print("Reused stages train again with: make quickstart ARGS=--fresh", style="dim")


def _caption(settings: Settings) -> str:
    tokens = settings.val_windows * settings.context
    return (
        f"Loss in nats per token on {tokens:,} tokens of documents that were held out whole; the "
        "last column is the model read back from its file. The file holds the whole model. One "
        f"seed, {settings.base_steps} + {settings.steps} steps: a demonstration, no benchmark."
    )


def _underscored(argument: str) -> str:
    """``--num-experts=8`` means ``--num_experts=8``."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace("-", "_")
    return name + equals + value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _quiet() -> None:
    """Silence hints of Lightning that do not concern a demonstration of this size."""
    for hint in ("does not have many workers", "isinstance\\(treespec", "Skipping val loop"):
        warnings.filterwarnings("ignore", f".*{hint}.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
