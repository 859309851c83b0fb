"""The command `bfmoe`: demo, plan, inspect, pack, verify, run, export. Built on jsonargparse."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lightning_bfmoe import __version__
from lightning_bfmoe.cli_export import export
from lightning_bfmoe.cli_packed import import_name, pack, run, verify
from lightning_bfmoe.errors import BFMoEError, CheckpointError, ConfigError


def demo(steps: int = 60, num_experts: int = 16, top_k: int = 2, out: str = "bfmoe-demo") -> None:
    """Swap, train, pack, load and generate with a tiny model on this Python's own source text.

    Args:
        steps: Training steps of the dense model, and again of the swapped one.
        num_experts: Experts per layer.
        top_k: Experts that a token visits.
        out: Folder for the packed file.
    """
    from lightning_bfmoe.demo import run_demo

    run_demo(steps=steps, num_experts=num_experts, top_k=top_k, out=Path(out))


def plan(
    d_model: int,
    d_ff: int,
    num_experts: int,
    top_k: int = 2,
    gated: bool = False,
    layers: int = 1,
    angle_bits: int = 16,
    gain_bits: int | None = None,
    router_bits: int = 32,
    trit_bits: float = 1.6,
    gains: bool = False,
    correction_rank: int = 0,
    paper_convention: bool = False,
    device: str | None = None,
    ram: str | None = None,
    vocab_size: int = 0,
    context: int = 1024,
    batch: int = 1,
    kv_width: int | None = None,
    rest_bits: int = 32,
    runtime: str = "torch",
    share: float = 1.0,
) -> None:
    """Bytes of the feed-forward layers beside honest controls, and how many experts fit a device.

    Args:
        d_model: Width of the model.
        d_ff: Hidden width.
        num_experts: Experts per layer.
        top_k: Experts that a token visits (no byte depends on it).
        gated: Three matrices (SwiGLU) instead of two.
        layers: Equal layers to add up.
        angle_bits: Bits of a stored angle: 32, 16, 8 or 4.
        gain_bits: Bits of a stored gain: 32, 16 or 8; left out: 16, or 32 beside angles of 32.
        router_bits: 32, or 16 (`bfmoe pack --rest bf16`).
        trit_bits: 1.6 or 2.
        gains: Per-expert diagonal gains.
        correction_rank: Rank of a low-rank correction beside each layer, fp16.
        paper_convention: Count as the paper does (one matrix, 1.58 bit, no router, no scales).
        device: Also count a whole language model on these devices, comma-separated, e.g.
            rpi5,jetson-nano: the experts per layer that fit beside all else.
        ram: The same for so much memory, e.g. 512MB or 4GB (binary units).
        vocab_size: Tokens of the model's embedding, for device and ram, as all that follow.
        context: Tokens of the key-value cache, for each sequence.
        batch: Sequences at once.
        kv_width: Width of keys in a layer; left out: d_model.
        rest_bits: 32, or 16: of the rest of the model and of the cache.
        runtime: torch, onnxruntime, none, or bytes: what a process takes before any model.
        share: Part of the memory that may be used; the system takes the rest.
    """
    from lightning_bfmoe.deploy import plan_device, plan_memory

    settings: dict[str, Any] = {
        "gated": gated, "layers": layers, "angle_bits": angle_bits,
        "gain_bits": gain_bits, "router_bits": router_bits, "trit_bits": trit_bits, "gains": gains,
        "correction_rank": correction_rank, "paper_convention": paper_convention,
    }  # fmt: skip
    console = Console()
    top_k = min(top_k, num_experts)  # no byte depends on it
    console.print(plan_memory(d_model, d_ff, num_experts, top_k, **settings))
    if paper_convention and (device or ram):
        raise ConfigError(
            "a device holds real files", got="paper_convention", fix="Leave it out for a device."
        )
    del settings["paper_convention"]
    for place in [*(device.split(",") if device else ()), *([ram] if ram else ())]:
        console.print(
            plan_device(
                place, d_model, d_ff, num_experts, vocab_size=vocab_size, context=context,
                batch=batch, kv_width=kv_width, rest_bits=rest_bits, runtime=runtime, share=share,
                **settings,
            )
        )  # fmt: skip


def inspect(target: str, init: dict[str, Any] | None = None, num_experts: int = 8) -> None:
    """Look into a packed file, a training checkpoint, or a model that could be swapped.

    Args:
        target: Path of a packed file or a Lightning checkpoint, or `package.module:ClassName` of a
            module, which is built and searched for feed-forward blocks (nothing is changed).
        init: Arguments of that class, e.g. --init '{"vocab_size": 256}'.
        num_experts: Experts per layer, for the savings of a module.
    """
    console = Console()
    if Path(target).exists():
        _inspect_file(Path(target), console)
    elif ":" in target and not target.startswith((".", "/")):
        from lightning_bfmoe.swap import swap_feed_forward

        model = import_name(target)(**(init or {}))
        console.print(swap_feed_forward(model, dry_run=True, num_experts=num_experts))
    else:
        raise ConfigError(
            "inspect takes a file that exists or package.module:ClassName",
            got=repr(target),
            fix="Check the path; a class is named like examples.gpt:GPT.",
        )


def _inspect_file(path: Path, console: Console) -> None:
    from lightning_bfmoe.deploy import inspect_packed
    from lightning_bfmoe.layers.state import decode_extra_state

    if path.suffix != ".ckpt":
        console.print(inspect_packed(path))
        return
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except Exception as error:
        raise CheckpointError(
            "a .ckpt file is a Lightning checkpoint that loads without running code",
            got=f"{path.name}: {type(error).__name__}: {str(error).splitlines()[0]}",
            fix="Packed files need no .ckpt suffix.",
        ) from error
    found = {key.removesuffix("._extra_state"): decode_extra_state(v) for key, v in state.items()}
    layers = {n: v for n, v in found.items() if v and v.get("kind", "").startswith("Butterfly")}
    owned = {name for name in layers if any(name == f"{other}.experts" for other in layers)}
    console.print(f"{path.name}: {len(layers) - len(owned)} ButterflyMoE layers")
    for name, value in layers.items():
        if name not in owned:
            s = value["settings"]
            console.print(
                f"  {name}: {s['d_model']} -> {s['d_ff']} -> {s['d_out']}, {s['num_experts']} "
                f"experts, {s['activation']}{', gated' if s['gated'] else ''}, "
                f"lambda {value['blend']:.3f}",
                highlight=False,
            )


def _run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="bfmoe", description="ButterflyMoE for PyTorch Lightning.")
    commands: dict[str, Callable[..., None]] = {
        "demo": demo, "plan": plan, "inspect": inspect, "pack": pack, "verify": verify, "run": run,
        "export": export,
    }  # fmt: skip
    subcommands = parser.add_subcommands()
    for name, function in commands.items():
        own = ArgumentParser(description=(function.__doc__ or "").splitlines()[0])
        own.add_function_arguments(function, as_positional=name not in ("demo", "plan"))
        subcommands.add_subcommand(name, own, help=own.description)
    chosen = parser.parse_args([_flag(argument) for argument in arguments])
    settings = chosen[chosen.subcommand].as_dict()
    settings.pop("config", None)
    commands[chosen.subcommand](**settings)


def _flag(argument: str) -> str:
    """``--force`` means ``--force=true``; ``--num-experts`` means ``--num_experts``."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = "--" + name[2:].replace("-", "_")
    return (
        f"{name}=true"
        if name in ("--force", "--finalize", "--low_memory") and not equals
        else name + equals + value
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for an error that we explain)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"bfmoe {__version__}")  # noqa: T201
        return 0
    try:
        _run(arguments)
    except BFMoEError as error:
        title = type(error).__name__
        Console(stderr=True).print(Panel(Text(str(error)), title=title, border_style="red"))
        return 2
    return 0
