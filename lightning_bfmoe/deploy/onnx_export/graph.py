"""From a torch module to an ONNX model with opaque nodes, and from there to files."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from lightning_bfmoe.deploy.onnx_export.cache import CachedModel, Logits
from lightning_bfmoe.deploy.onnx_export.folder import MODEL, MODEL_OPS, WEIGHTS
from lightning_bfmoe.deploy.onnx_export.lower import lower
from lightning_bfmoe.deploy.onnx_export.ops import DOMAIN
from lightning_bfmoe.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

OPSETS = (21, 22, 23)
"""Opsets that we write and test."""
INLINE, ALIGNMENT = 1024, 64
"""Constants of fewer bytes stay in the graph; where larger ones may start in the weights' file."""
IR_VERSION = 10
"""Of the file; the highest that onnxruntime 1.28 reads is newer."""


def to_onnx(module: CachedModel | Logits, ids: Tensor, opset: int) -> ir.Model:
    """Exports with opaque nodes for rotations and products.

    Raises:
        ExportError: The packages are missing, or an operation has no ONNX form.
    """
    values = require("onnxscript").values
    register_schemas()
    batch, time, length = (torch.export.Dim(name) for name in ("batch", "time", "past"))
    past: list[Tensor] = module.empty_past(len(ids), 3) if isinstance(module, CachedModel) else []
    names = [f"past_{what}.{i}" for i in range(len(past) // 2) for what in ("key", "value")]
    shapes: tuple[Any, ...] = ({0: batch, 1: time},)
    if past:
        shapes += (tuple({0: batch, 2: length} for _ in past),)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (ids, *past),
                dynamo=True,
                opset_version=opset,
                input_names=["input_ids", *names],
                output_names=["logits", *(name.replace("past", "present") for name in names)],
                dynamic_shapes=shapes,
                custom_translation_table=translations(values.Opset(DOMAIN, 1)),
                verbose=False,
                optimize=True,
            )
    except Exception as error:  # the exporter raises what it likes
        raise ExportError(
            "every operation of the model has an ONNX form",
            got=f"{type(error).__name__}: {_last_line(error)}",
            fix="Replace the operation, or give torch.onnx a translation for it.",
        ) from error
    assert program is not None
    return program.model


def write_graph(model: ir.Model, folder: Path, products: str) -> None:
    """Lowers the opaque nodes and writes two graphs over one file of weights.

    `model.onnx` has standard and `com.microsoft` nodes only; in `model_ops.onnx` the rotations are
    nodes of our custom op (`csrc/ort_ops.cpp`).
    """
    import onnx_ir

    model.ir_version = IR_VERSION
    model.producer_name = "lightning-bfmoe"
    for node in model.graph.all_nodes():  # paths and stack traces of the machine that exported
        node.metadata_props.clear()
        node.doc_string = None
    places: dict[str, int] = {}
    with open(folder / WEIGHTS, "wb") as file:
        for name, rotations in ((MODEL, True), (MODEL_OPS, False)):
            lowered = model.clone()
            lower(lowered, products, rotations)
            _move_weights(lowered, file, places, folder)
            onnx_ir.save(lowered, folder / name)


def _move_weights(model: ir.Model, file: BinaryIO, places: dict[str, int], folder: Path) -> None:
    """Large constants go to the file, each once; `places` says where those of earlier calls are."""
    import onnx_ir

    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < INLINE:
            continue
        data = tensor.tobytes()
        key = f"{tensor.dtype}{tensor.shape}{hashlib.sha256(data).hexdigest()}"
        if key not in places:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            places[key] = file.tell()
            file.write(data)
        value.const_value = onnx_ir.ExternalTensor(
            WEIGHTS, places[key], len(data), tensor.dtype, base_dir=folder,
            shape=onnx_ir.Shape(tensor.numpy().shape), name=tensor.name or value.name or "",
        )  # fmt: skip


def translations(opset: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our torch ops as opaque nodes."""

    def rotate(x: Any, ids: Any, angles: Any, scales: Any, d: int, inverse: bool) -> Any:
        return opset.RotateRows(x, ids, angles, scales, d=d, inverse=int(inverse))

    def product(x: Any, codes: Any, alpha: Any, d_in: int) -> Any:
        return opset.TernaryProduct(x, codes, alpha, d_in=d_in)

    ops = torch.ops.lightning_bfmoe
    return {ops.onnx_rotate.default: rotate, ops.onnx_product.default: product}


def register_schemas() -> None:
    """Tells the package onnx what the opaque nodes look like, once a process."""
    defs = require("onnx").defs
    schema, kind = defs.OpSchema, defs.OpSchema.AttrType.INT
    wanted = {
        "RotateRows": (
            {
                "x": "float",
                "ids": "int64",
                "angles": "float16 float int8 uint8",
                "scales": "float16",
            },
            ["d", "inverse"],
        ),
        "TernaryProduct": ({"x": "float", "codes": "uint8", "alpha": "float"}, ["d_in"]),
    }
    for name, (inputs, attributes) in wanted.items():
        if defs.has(name, DOMAIN):
            continue
        types = {"T": "float", **{f"T_{key}": value for key, value in inputs.items()}}
        defs.register_schema(
            schema(
                name,
                DOMAIN,
                1,
                inputs=[schema.FormalParameter(key, f"T_{key}") for key in inputs],
                outputs=[schema.FormalParameter("y", "T")],
                type_constraints=[
                    (key, [f"tensor({t})" for t in value.split()], "")
                    for key, value in types.items()
                ],
                attributes=[schema.Attribute(key, kind, "") for key in attributes],
            )
        )


def require(name: str) -> Any:
    """The package, or a clear error."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"the export needs the package {name}",
            got=error,
            fix="Run: pip install 'lightning-bfmoe[deploy]'.",
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporter's progress and its advice, which concern its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _last_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [""])[0][:300]
