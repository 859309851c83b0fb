"""The commands on packed files: `bfmoe pack`, `bfmoe verify`, `bfmoe run`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from lightning_bfmoe.errors import BFMoEError, CheckpointError, ConfigError, PackedFileError


def pack(
    ckpt: str,
    module: str | None = None,
    out: str | None = None,
    init: dict[str, Any] | None = None,
    angles: Literal["fp16", "int8", "int4", "fp32"] = "fp16",
    gains: Literal["fp16", "int8", "fp32"] | None = None,
    rest: Literal["keep", "bf16"] = "keep",
    bits: Literal["1.6", "2"] = "1.6",
    finalize: bool = False,
    tokens: list[int] | None = None,
    force: bool = False,
) -> None:
    """Pack the model of a Lightning checkpoint into one small file.

    Args:
        ckpt: A checkpoint of a training with ButterflyMoE layers.
        module: Its class, as `my_package.models:MyModule`.
        out: The packed file; left out: beside the checkpoint, with the suffix .bfmoe.
        init: Arguments of the class that the checkpoint does not hold, e.g. '{"width": 64}'.
        angles: Encoding of the angles.
        gains: Encoding of the gains; left out: fp16.
        rest: Numbers outside the layers: as they are, or in bfloat16.
        bits: Bits of a trit: 1.6, or 2, which unpacks faster.
        finalize: Pack layers whose lambda is below 1 as if it were 1.
        tokens: Token ids, e.g. '[1, 2, 3]': the packed model's output for this batch of one is
            recorded in the file, for `bfmoe verify`.
        force: Replace an existing file.
    """
    from lightning_bfmoe.deploy import pack as write

    target = Path(out) if out is not None else Path(ckpt).with_suffix(".bfmoe")
    _check_free(target, force)
    example = None if tokens is None else torch.tensor([tokens], dtype=torch.int64)
    report = write(
        _from_checkpoint(module, ckpt, init or {}), target, angles=angles, gains=gains, rest=rest,
        bits=bits, finalize=finalize, example=example, overwrite=force,
    )  # fmt: skip
    Console().print(report)


def verify(file: str, module: str | None = None, init: dict[str, Any] | None = None) -> None:
    """Check a packed file: checksums, rotations, and a forward pass if the file records one.

    Args:
        file: A packed file.
        module: Class of the model, as `my_package.models:MyModule`, to repeat the forward pass.
        init: Its arguments; those that the file holds can be left out.
    """
    from lightning_bfmoe.deploy import verify_packed

    model = None if module is None else build_module(module, file, init)
    found = verify_packed(file, model)
    out = Console(highlight=False)
    out.print(f"{found.path.name}: {found.tensors} checksums match")
    out.print(
        f"{found.rotations} rotations in {found.layers} layers are orthogonal, "
        f"to {found.orthogonality:.1e}"
    )
    if found.example_error is not None:
        out.print(f"the recorded forward pass repeats, to {found.example_error:.1e} relative RMS")
    elif found.recorded:
        out.print("a forward pass is recorded; name the model's class with --module to repeat it")
    else:
        out.print("no forward pass is recorded (bfmoe pack --tokens records one)")


def run(
    file: str,
    module: str | None = None,
    prompt: str | None = None,
    init: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    num_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    context: int | None = None,
    cache: bool = True,
    low_memory: bool = False,
) -> None:
    """Continue a prompt with a packed language model; the text appears as it is written.

    The class maps ids (rows, time) to logits (rows, time, vocabulary). With a `cache=None` in its
    forward (examples/gpt.py, docs/deploy.md) each token costs one position's work.

    Args:
        file: A packed file.
        module: Class of the model, as `my_package.models:MyModule`.
        prompt: Text to continue.
        init: Arguments of the class; those that the file holds can be left out.
        tokenizer: A tokenizer's JSON file (package `tokenizers`); left out: UTF-8 bytes.
        num_tokens: Tokens to add (count); left out: what fits the context, at most 100.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Choose among so many of the likeliest tokens; null: all.
        top_p: Choose among the likeliest that together have this probability.
        seed: Seed of the sampling.
        device: Where to compute: cpu, cuda, cuda:1, ...
        context: Most tokens the model can look at; left out: its attribute `context`.
        cache: false computes the whole prefix anew for every token, for a class without a cache.
        low_memory: Keep the packed form alone in memory; slower.
    """
    from lightning_bfmoe.deploy import Sampling, TextStream, TokenGenerator, load_packed

    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    Sampling(num_tokens, **settings)  # type: ignore[arg-type]  # checks them before anything loads
    model = build_module(module, file, init)
    words = _tokenizer(tokenizer)
    ids = _encode(words, prompt or "")
    load_packed(file, model, device=_device(device), low_memory=low_memory)
    generator = TokenGenerator(model, context=context, cache=cache)
    generator.check(ids)
    room = generator.room(len(ids), num_tokens)
    count = min(room, 100) if num_tokens is None else num_tokens
    text = TextStream(lambda some: words.decode(torch.tensor(some, dtype=torch.int64)), ids)
    console = Console(highlight=False, markup=False, soft_wrap=True)

    def tell(piece: str) -> None:
        console.print(piece, end="")
        console.file.flush()

    steps = generator.stream([ids], Sampling(count, **settings))  # type: ignore[arg-type]
    for number, step in enumerate(steps):
        if number == 0:  # the model has run, so what comes now is no error
            tell(prompt or "")
        if step.tokens[0] is not None:
            tell(text.add(step.tokens[0]))
    tell(text.end() + "\n")


def import_name(path: str) -> Callable[..., Any]:
    """What `package.module:Name` names; the working folder is searched first.

    Raises:
        ConfigError: There is no such thing.
    """
    module, _, name = path.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "package.module:ClassName must be importable", got=path, fix=f"{error}."
        ) from error
    finally:
        sys.path.pop(0)
    return found


def _check_free(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise PackedFileError(
            "a file is never overwritten unasked", got=target, fix="Add --force, or another --out."
        )


def _class(path: str | None) -> type[nn.Module]:
    if path is None:
        raise ConfigError("--module must name the model's class", fix=_NAME_IT)
    found = import_name(path)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ConfigError("--module names a class of modules", got=path, fix=_NAME_IT)
    return found


def _from_checkpoint(module: str | None, ckpt: str, init: dict[str, Any]) -> nn.Module:
    """The module with its weights; swapped by a callback, or built with our layers by itself."""
    import lightning.pytorch as pl

    from lightning_bfmoe.checkpoint import load_from_checkpoint

    kind = _class(module)
    if not issubclass(kind, pl.LightningModule):
        raise ConfigError(
            "a checkpoint is loaded into a LightningModule",
            got=f"{kind.__name__}",
            fix="Load it in Python, and call lightning_bfmoe.pack(model, path).",
        )
    try:
        try:
            return load_from_checkpoint(kind, ckpt, map_location="cpu", **init)
        except CheckpointError as error:
            if "holds swapped" not in error.rule:
                raise
            return kind.load_from_checkpoint(ckpt, map_location="cpu", weights_only=True, **init)
    except BFMoEError:
        raise
    except Exception as error:  # whatever a file or a constructor does
        raise CheckpointError(
            "a checkpoint is there and fits its class",
            got=f"{type(error).__name__}: {str(error).strip()[:300]}",
            fix="Check the path and --module; arguments of the class go into --init.",
        ) from error


def build_module(module: str | None, file: str, init: dict[str, Any] | None) -> nn.Module:
    """A fresh model; what `init` leaves out comes from the file."""
    from lightning_bfmoe.deploy import read_packed

    kind, stored = _class(module), read_packed(file).header.init
    try:
        return kind(**{**stored, **(init or {})})
    except Exception as error:  # whatever a constructor does
        raise ConfigError(
            f"{kind.__name__} must be buildable",
            got=f"{type(error).__name__}: {error}",
            fix="Give the arguments that it had in training: --init '{\"width\": 64}'.",
        ) from error


def _tokenizer(path: str | None) -> Any:
    from lightning_bfmoe.data import BPETokenizer, ByteTokenizer

    if path is None:
        return ByteTokenizer()
    try:
        return BPETokenizer.load(path)
    except Exception as error:  # the package `tokenizers` raises bare Exceptions
        raise ConfigError(
            "a tokenizer is a JSON file of the package `tokenizers`",
            got=f"{path}: {type(error).__name__}: {error}",
            fix="Save it with tokenizer.save(path); leave it out for a model of bytes.",
        ) from error


def _encode(words: Any, prompt: str) -> list[int]:
    try:
        ids: list[int] = words.encode(prompt).tolist()
    except UnicodeEncodeError as error:
        raise ConfigError(
            "a prompt is text", got="bytes that are not UTF-8", fix="Set the terminal to UTF-8."
        ) from error
    if not ids:
        raise ConfigError("a prompt has at least one token", got=repr(prompt), fix="Add --prompt.")
    return ids


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either without CUDA
        raise ConfigError(
            "device names one that this torch and this machine have",
            got=f"{name!r}: {str(error).splitlines()[0]}",
            fix="Leave --device out for the CPU.",
        ) from error
    return device


_NAME_IT = "Add --module my_package.models:MyModule."
