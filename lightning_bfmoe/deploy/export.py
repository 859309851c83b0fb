"""`export_onnx`: a packed model becomes a folder that runs on onnxruntime without torch."""

import copy
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe import __version__
from lightning_bfmoe.deploy.load import load_packed
from lightning_bfmoe.deploy.onnx_export.cache import CachedModel, Logits, check_cache, trace
from lightning_bfmoe.deploy.onnx_export.folder import (
    SETTINGS,
    TOKENIZER,
    check_target,
    new_folder,
    write_settings,
)
from lightning_bfmoe.deploy.onnx_export.graph import OPSETS, require, to_onnx, write_graph
from lightning_bfmoe.deploy.onnx_export.layer import replace_layers
from lightning_bfmoe.deploy.onnx_export.lower import PRODUCTS
from lightning_bfmoe.deploy.onnx_export.runner import OnnxModel
from lightning_bfmoe.deploy.pack import pack
from lightning_bfmoe.deploy.slots import unwrap
from lightning_bfmoe.errors import ConfigError, ExportError
from lightning_bfmoe.layers import Substrate, moe_layers

SAMPLING = {"num_tokens": 200, "temperature": 0.8, "top_k": 40}
"""What `examples/edge_app.py` does unless told otherwise."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how near it is to the PyTorch model."""

    path: Path
    files: dict[str, int]
    """Name -> bytes."""
    layers: int
    context: int | None
    logit_error: float
    """Relative RMS difference of the logits to the packed PyTorch model's, on random tokens."""
    top1_agreement: float
    """Share of these places where both find the same token most likely."""

    def __str__(self) -> str:
        total = sum(self.files.values())
        parts = ", ".join(f"{name} {size:,}" for name, size in self.files.items())
        return (
            f"{self.path}: {total:,} bytes ({parts}), {self.layers} ButterflyMoE layers\n"
            f"against the packed PyTorch model, on random tokens: logits differ by "
            f"{self.logit_error:.1e} (relative), same best token at {self.top1_agreement:.1%}"
        )


def export_onnx(
    source: str | Path | nn.Module,
    path: str | Path,
    *,
    model: nn.Module | None = None,
    angles: str | None = None,
    products: str = "2bit",
    cache: bool = True,
    context: int | None = None,
    tokenizer: str | Path | None = None,
    generation: Mapping[str, Any] | None = None,
    opset: int = OPSETS[0],
    overwrite: bool = False,
    finalize: bool = False,
) -> ExportReport:
    """Writes a language model with ButterflyMoE layers as a folder for the stock onnxruntime wheel.

    The graph takes ids and a key-value cache, with batch, length and past free, and holds routing,
    rotations and ternary products; the shared matrix of all experts is stored once, at 2 bit. No
    torch is needed to run it (`examples/edge_app.py`). The cache is worked into the model's own
    traced graph, then proved: the model must answer alike whole and in pieces.

    Args:
        source: A file written by `pack`, or a model, which is then packed on the way. Its forward
            takes ids (batch, time) and returns logits, or an output that has them.
        path: The new folder.
        model: For a file: a fresh instance of the model, see `load_packed`. It is filled.
        angles: Encoding of the angles of a model that is packed on the way, see `pack`.
        products: How the ternary products are computed: `2bit` (least memory, fastest for one
            sequence), `int8` (trits unpacked to bytes when the session starts: faster for prompts
            and batches, 4 times the memory of the shared matrices), `both` (chosen by the number
            of rows; 5 times). The file is the same size.
        cache: False: export any model that takes ids, without a key-value cache.
        context: Most tokens the model can look at; None: found in the model where it says so.
        tokenizer: JSON file of the package `tokenizers`, copied along; None: a model of bytes.
        generation: Sampling settings for the app: num_tokens, temperature, top_k, eos (token ids).
        opset: ONNX opset, one of `OPSETS`.
        overwrite: Replace an exported folder.
        finalize: Export layers whose lambda is below 1 as if it were 1.

    Returns:
        Sizes, and the difference to the PyTorch model.

    Raises:
        ExportError: The folder exists; the model cannot be exported (the message says what is
            supported); a package is missing or too old. Nothing is left behind.
        PackedFileError: The file or model cannot be packed or loaded.
        ConfigError: `products`, `opset` or `context` is none of the above.
    """
    target = Path(path)
    _check_choices(products, opset, context)
    check_target(target, overwrite)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    packed = _packed(source, model, angles, finalize)
    vocabulary, found = _sizes(packed)
    if tokenizer is not None:
        _check_tokenizer(Path(tokenizer), vocabulary)
    context = found if context is None else context
    exported = copy.deepcopy(packed)
    layers = replace_layers(exported)
    ids = _example(vocabulary, context)
    graph: nn.Module = trace(exported, ids)
    if cache:
        graph = CachedModel(graph, ids)  # type: ignore[arg-type]
        check_cache(graph, packed, ids)
        context = min((*graph.limits, *([] if context is None else [context])), default=None)
    sites = graph.shapes if isinstance(graph, CachedModel) else []
    with new_folder(target, overwrite) as folder:
        write_graph(to_onnx(graph, ids, opset), folder, products)  # type: ignore[arg-type]
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER)
        settings = write_settings(
            folder,
            {
                "library": f"lightning-bfmoe {__version__}",
                "onnxruntime": ">=1.28",
                "opset": opset,
                "products": products,
                "context": context,
                "vocab_size": vocabulary,
                "tokenizer": "bytes" if tokenizer is None else TOKENIZER,
                "cache": [
                    {"heads": heads, "key_width": key, "value_width": value}
                    for heads, key, value in sites
                ],
                "generation": {**SAMPLING, "eos": [], **(generation or {})},
            },
        )
        error, agreement = _compare(folder, packed, ids)
    files = {name: file["bytes"] for name, file in settings["files"].items()}
    files[SETTINGS] = (target / SETTINGS).stat().st_size
    return ExportReport(target, files, layers, context, error, agreement)


def _check_choices(products: str, opset: int, context: int | None) -> None:
    for name, value, known in (("products", products, PRODUCTS), ("opset", opset, OPSETS)):
        if value not in known:
            raise ConfigError(
                f"{name} must be one of {known}", got=repr(value), fix=f"Use {known[0]!r}."
            )
    if context is not None and (not isinstance(context, int) or context < 1):
        raise ConfigError("context is a number of tokens", got=repr(context), fix="Leave it out.")


def _packed(
    source: str | Path | nn.Module, model: nn.Module | None, angles: str | None, finalize: bool
) -> nn.Module:
    """A packed copy of the model, in float32 on the CPU, in eval mode."""
    if isinstance(source, nn.Module):
        if model is not None:
            raise ConfigError(
                "model= is the fresh instance for a packed file", got="two models", fix="Give one."
            )
        inner = copy.deepcopy(unwrap(source)).cpu()
        if angles is not None or any(isinstance(m, Substrate) for m in inner.modules()):
            with tempfile.TemporaryDirectory(prefix="bfmoe-") as folder:
                file = Path(folder) / "model.bfmoe"
                pack(inner, file, angles=angles, finalize=finalize)
                load_packed(file, inner)
    elif model is None:
        raise ConfigError(
            "a packed file needs a fresh instance of its model",
            got="model=None",
            fix="Pass model=MyModule(...), built as it was in training.",
        )
    elif angles is not None:
        raise ConfigError(
            "a packed file has its angles", got=f"angles={angles!r}", fix="Choose them in `pack`."
        )
    else:
        inner = load_packed(source, model, device="cpu")
    _widen(inner)
    return inner.eval()


def _widen(model: nn.Module) -> None:
    """Everything outside the packed layers in float32; their numbers stay as they are stored."""
    packed = {id(part) for _, layer in moe_layers(model) for part in layer.modules()}
    for module in model.modules():
        if id(module) not in packed:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    parameter.data = parameter.data.float()
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.float()


def _sizes(model: nn.Module) -> tuple[int, int | None]:
    """Vocabulary and context, as far as a model tells."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if not tables:
        raise ExportError(
            "an exported model takes token ids",
            got=f"{type(model).__name__} without an embedding",
            fix="Export the module that maps ids to logits.",
        )
    config = getattr(model, "config", None)
    names = ("max_position_embeddings", "n_positions")
    found = [getattr(config, name, None) for name in names] + [getattr(model, "context", None)]
    context = next((value for value in found if isinstance(value, int) and value > 0), None)
    vocabulary = getattr(config, "vocab_size", None) or max(t.num_embeddings for t in tables)
    return int(vocabulary), context


def _example(vocabulary: int, context: int | None) -> Tensor:
    """Two sequences; an odd length that no other size is likely to equal."""
    time = 13 if context is None else min(13, context)
    if time < 6:
        raise ExportError(
            "a context holds at least 6 tokens", got=context, fix="Train a longer one."
        )
    return torch.randint(vocabulary, (2, time), generator=torch.Generator().manual_seed(0))


def _check_tokenizer(source: Path, vocabulary: int) -> None:
    tokenizers = require("tokenizers")
    try:
        size = tokenizers.Tokenizer.from_file(str(source)).get_vocab_size()
    except Exception as error:  # the package raises bare Exceptions
        raise ExportError(
            "a tokenizer is a JSON file of the package `tokenizers`",
            got=f"{source}: {error}",
            fix="Save it with tokenizer.save(path).",
        ) from error
    if size > vocabulary:
        raise ExportError(
            f"the model knows the tokenizer's tokens, {vocabulary}",
            got=size,
            fix="Name the tokenizer of the training.",
        )


def _compare(folder: Path, packed: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Runs both models once; a graph that computes something else is not published."""
    logits, _ = OnnxModel(folder, threads=1, library="")(ids.numpy())
    with torch.no_grad():
        wanted = Logits(packed)(ids)
    ours = torch.from_numpy(logits)
    error = float((ours - wanted).norm() / wanted.norm().clamp(min=1e-30))
    # a token near the border between two experts may take the other one; most do not
    typical = float(((ours - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)).median())
    if not typical <= 0.5:
        raise ExportError(
            "the graph computes what the model computes",
            got=f"logits that differ by {typical:.2g} (relative) at the median place",
            fix="Please report it, with the model's code.",
        )
    return error, float((ours.argmax(-1) == wanted.argmax(-1)).float().mean())
