"""`verify_packed`: is a file whole, are its rotations rotations, does it compute what was recorded?

Without the model's code it checks the checksums and builds every layer; with a model it repeats the
recorded forward pass, too.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.checks import refuse
from lightning_bfmoe.deploy.example import run_example
from lightning_bfmoe.deploy.format import Example, LayerRecord, read_packed
from lightning_bfmoe.deploy.freeze import build_packed, stored_tensors
from lightning_bfmoe.deploy.load import load_packed
from lightning_bfmoe.functional.butterfly import apply_butterfly
from lightning_bfmoe.layers import CUSTOM, ButterflyLinear, CodedRotation, Rotation

ORTHOGONAL = 1e-10
"""Largest |B^T B x - x| and | |B x| / |x| - 1 | of a stored rotation, in double."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative RMS difference to a recorded output: other machines round otherwise."""


@dataclass(frozen=True)
class Verified:
    """What was found good; anything else is an error."""

    path: Path
    tensors: int
    """Tensors whose checksums were compared."""
    layers: int
    rotations: int
    """Stored rotations (experts x sides x matrices) that were found orthogonal."""
    orthogonality: float
    """The largest error among them."""
    recorded: bool
    """Whether the file records a forward pass."""
    example_error: float | None = None
    """Relative RMS difference to the recorded output; None when it was not repeated."""


@torch.no_grad()
def verify_packed(path: str | Path, model: nn.Module | None = None) -> Verified:
    """Checks all that can be checked of a packed file.

    Example:
        >>> import tempfile
        >>> from lightning_bfmoe import ButterflyMoE, pack
        >>> file = Path(tempfile.mkdtemp()) / "model.bfmoe"
        >>> _ = pack(nn.Sequential(ButterflyMoE(8, 16, 4)), file)
        >>> verify_packed(file).rotations
        16

    Args:
        path: A file written by `pack`.
        model: Fresh model, as for `load_packed`; it is filled.

    Raises:
        PackedFileError: Something is wrong; the message says what.
    """
    file = read_packed(path)
    tensors = file.read()
    errors = [error for layer in file.header.layers for error in _rotations(layer, tensors)]
    return Verified(
        Path(path),
        tensors=len(file.specs),
        layers=len(file.header.layers),
        rotations=len(errors),
        orthogonality=max(errors, default=0.0),
        recorded=file.header.example is not None,
        example_error=None if model is None else _repeat(file.header.example, tensors, path, model),
    )


def _rotations(record: LayerRecord, tensors: dict[str, Tensor]) -> list[float]:
    """Builds a layer as `load_packed` does; the error of each of its rotations."""
    prefix = f"{record.path}." if record.path else ""
    own = {}
    for name, stored in stored_tensors(record).items():
        tensor = tensors.get(prefix + name)
        if tensor is None or tuple(tensor.shape) != stored.shape:
            refuse("a packed layer's tensors follow from its settings", prefix + name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            refuse("every number of a packed layer is finite", prefix + name)
        own[name] = tensor
    function = (lambda x: x) if record.config["activation"] == CUSTOM else None
    layer = build_packed(record, own, function)
    found = []
    for name, module in layer.named_modules():
        if isinstance(module, ButterflyLinear):
            found += _errors(f"{prefix}{name}.rotate_in", module.rotate_in, module.d_in)
            found += _errors(f"{prefix}{name}.rotate_out", module.rotate_out, module.d_out)
    return found


def _errors(name: str, rotation: Rotation | CodedRotation, d: int) -> list[float]:
    """For each expert the error of length and of the inverse on one random row, in double."""
    angles = rotation.angles.double()  # (experts, stages, pairs)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(angles.shape[0], d, dtype=torch.float64, generator=generator)
    y = apply_butterfly(x, angles)
    undone = (apply_butterfly(y, angles, inverse=True) - x).abs().amax(dim=1)  # (experts,)
    length = (y.norm(dim=1) / x.norm(dim=1) - 1).abs()
    found = torch.maximum(undone, length).tolist()
    if not max(found) <= ORTHOGONAL:
        refuse("a stored rotation keeps lengths and can be undone", f"{name}: {max(found)} off")
    return found


def _repeat(
    example: Example | None, tensors: dict[str, Tensor], path: str | Path, model: nn.Module
) -> float | None:
    loaded = load_packed(path, model)
    if example is None:
        return None
    output = run_example(loaded, [tensors[name] for name in example.inputs])
    wanted = tensors[example.output]
    if output.shape != wanted.shape:
        got = f"{tuple(output.shape)}, not {tuple(wanted.shape)}"
        refuse("the model computes what was recorded", got, _OTHER)
    size = wanted.double().norm().clamp(min=1e-30)
    error = float((output.double() - wanted.double()).norm() / size)
    limit = TOLERANCES.get(wanted.dtype, 1e-4)
    if not error <= limit:
        rule = f"the model computes what was recorded, to {limit:g} relative RMS"
        refuse(rule, f"{error:.3g}", _OTHER)
    return error


_OTHER = "The model's code or settings differ from those that were packed."
