"""A recording: the experts' angles at several steps of a training, in one small file.

The file is safetensors: ``steps`` (C,) int64 and ``losses`` (C,) float32, where C counts the
records; ``angles/<layer>/<rotation>`` (C, experts, stages, pairs) float16, in radians within
[-pi, pi]; ``loads/<layer>`` (C, experts) int64, token slots since the record before. Its metadata
holds the format's version, each rotation's width, and logged values, as JSON.
"""

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lightning_bfmoe.errors import BFMoEError, CheckpointError, ConfigError

FORMAT = 1
Key = tuple[str, str]
"""Layer path and rotation, as ("blocks.0.mlp", "up/in")."""


@dataclass(frozen=True)
class Snapshot:
    """One record: what the experts were at one step."""

    step: int
    """Finished optimizer steps (count)."""
    angles: Mapping[Key, np.ndarray]
    """(experts, stages, pairs) float16, radians."""
    loads: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Layer -> (experts,) int64, token slots since the record before."""
    loss: float = math.nan
    """Mean training loss since the record before; NaN when there was none."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Logged values by name."""

    @property
    def nbytes(self) -> int:
        """Bytes of the angles and loads."""
        return sum(array.nbytes for array in (*self.angles.values(), *self.loads.values()))


@dataclass
class Recording:
    """The records of one training, oldest first, with the same rotations in each.

    Example:
        >>> angles = {("mlp", "up/in"): np.zeros((4, 3, 4), dtype=np.float16)}
        >>> recording = Recording({("mlp", "up/in"): 8}, [Snapshot(0, angles), Snapshot(9, angles)])
        >>> recording.layers, recording.rotations("mlp"), recording.steps
        (['mlp'], ['up/in'], [0, 9])
        >>> recording.angles("mlp", "up/in").shape
        (2, 4, 3, 4)

    Args:
        widths: Rotation -> its width d (count).
        snapshots: Records.

    Raises:
        CheckpointError: Records of different models.
    """

    widths: dict[Key, int]
    snapshots: list[Snapshot]

    def __post_init__(self) -> None:
        for snapshot in self.snapshots:
            self.check(snapshot)

    def __len__(self) -> int:
        return len(self.snapshots)

    def check(self, snapshot: Snapshot) -> None:
        """Raise unless a record fits the others."""
        shapes = {key: array.shape for key, array in snapshot.angles.items()}
        first = self.snapshots[0].angles if self.snapshots else snapshot.angles
        if set(shapes) != set(self.widths) or any(shapes[k] != first[k].shape for k in shapes):
            raise CheckpointError(
                "all records of a recording come from one model",
                got=f"step {snapshot.step} with other layers, experts or stages",
                fix="Give the recorder another filename or folder, or the model it began with.",
            )

    def append(self, snapshot: Snapshot) -> None:
        """Add the newest record."""
        self.check(snapshot)
        self.snapshots.append(snapshot)

    @property
    def steps(self) -> list[int]:
        """Finished optimizer steps of each record."""
        return [snapshot.step for snapshot in self.snapshots]

    @property
    def losses(self) -> list[float]:
        """Mean training loss up to each record; NaN where unknown."""
        return [snapshot.loss for snapshot in self.snapshots]

    @property
    def layers(self) -> list[str]:
        """Paths of the layers."""
        return list(dict.fromkeys(layer for layer, _ in self.widths))

    def rotations(self, layer: str) -> list[str]:
        """Rotations of a layer: ``up/in``, ``up/out``, and so for gate and down."""
        return [rotation for name, rotation in self.widths if name == layer]

    def angles(self, layer: str, rotation: str) -> np.ndarray:
        """(records, experts, stages, pairs) float32, radians within [-pi, pi].

        Raises:
            ConfigError: There is no such rotation.
        """
        if (layer, rotation) not in self.widths:
            raise ConfigError(
                "a recording is asked for a rotation that it holds",
                got=f"layer {layer!r}, rotation {rotation!r}",
                fix=f"Layers: {self.layers}; rotations: {sorted({r for _, r in self.widths})}.",
            )
        parts = [snapshot.angles[layer, rotation] for snapshot in self.snapshots]
        return np.stack(parts).astype(np.float32)

    def loads(self, layer: str) -> np.ndarray | None:
        """(records, experts) int64, token slots since the record before; None if not recorded."""
        parts = [snapshot.loads.get(layer) for snapshot in self.snapshots]
        found = [part for part in parts if part is not None]
        if not found:
            return None
        return np.stack([np.zeros_like(found[0]) if part is None else part for part in parts])

    def thin(self) -> None:
        """Drop every other record; the next one takes over its token slots and half its loss."""
        kept = self.snapshots[:1]
        for dropped, snapshot in zip(self.snapshots[1::2], self.snapshots[2::2], strict=False):
            loads = {k: v + dropped.loads.get(k, 0) for k, v in snapshot.loads.items()}
            known = [s.loss for s in (dropped, snapshot) if math.isfinite(s.loss)]
            loss = sum(known) / len(known) if known else math.nan
            kept.append(replace(snapshot, loads=loads, loss=loss))
        if len(self.snapshots) % 2 == 0:
            kept += self.snapshots[-1:]  # the newest stays
        self.snapshots = kept

    def write(self, path: str | Path) -> Path:
        """Write the file: it appears whole or not at all."""
        path = Path(path)
        tensors: dict[str, np.ndarray] = {
            "steps": np.asarray(self.steps, dtype=np.int64),
            "losses": np.asarray(self.losses, dtype=np.float32),
        }
        for layer, rotation in self.widths:
            parts = [snapshot.angles[layer, rotation] for snapshot in self.snapshots]
            tensors[f"angles/{layer}/{rotation}"] = np.stack(parts)
        for layer in self.layers:
            if (loads := self.loads(layer)) is not None:
                tensors[f"loads/{layer}"] = loads.astype(np.int64)
        metadata = {
            "format": f"bfmoe-orbits-{FORMAT}",
            "widths": json.dumps([[*key, d] for key, d in self.widths.items()]),
            "metrics": json.dumps([dict(snapshot.metrics) for snapshot in self.snapshots]),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        try:
            with partial.open("wb") as file:
                file.write(save(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path


def read_recording(path: str | Path) -> Recording:
    """Read a file of `OrbitRecorder`.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is damaged, or no recording of this version.
        FileNotFoundError: It is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recording at {path}; OrbitRecorder.path says where it writes")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"bfmoe-orbits-{FORMAT}":
                raise ValueError(f"format {metadata.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        widths = {(layer, r): int(d) for layer, r, d in json.loads(metadata["widths"])}
        metrics: Sequence[Mapping[str, Any]] = json.loads(metadata["metrics"])
        snapshots = [
            Snapshot(
                int(step),
                {(layer, r): tensors[f"angles/{layer}/{r}"][i] for layer, r in widths},
                {
                    layer: tensors[f"loads/{layer}"][i]
                    for layer in dict.fromkeys(name for name, _ in widths)
                    if f"loads/{layer}" in tensors
                },
                float(tensors["losses"][i]),
                metrics[i],
            )
            for i, step in enumerate(tensors["steps"])
        ]
        return Recording(widths, snapshots)
    except BFMoEError:
        raise
    except (SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path} is a recording of format {FORMAT}",
            got=f"{type(error).__name__}: {error}",
            fix="Give the path that OrbitRecorder.path names, written by this version.",
        ) from error
