"""What the explorer sends to the browser: sizes as JSON, angles as float16 bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.viz.orbits import MEASURES, signs
from lightning_bfmoe.viz.recording import Key, Recording, read_recording
from lightning_bfmoe.viz.snapshot import Patterns, _fits, record_model

SHOWN = ("a", "b", "gap")
Source = Recording | str | Path | nn.Module


@dataclass(frozen=True)
class ExplorerData:
    """A recording and the vectors to rotate."""

    recording: Recording
    probes: np.ndarray | None
    """(K, d) float32; None: vectors of random signs, for every width."""

    @classmethod
    def of(
        cls,
        source: Source,
        layers: Patterns = None,
        probes: Tensor | np.ndarray | Sequence[Sequence[float]] | None = None,
    ) -> "ExplorerData":
        """From whatever a user has.

        Raises:
            ConfigError: Nothing to show, or probes that are no (K, d) finite, non-zero vectors.
        """
        if isinstance(source, nn.Module):
            recording = record_model(source, layers)
        else:
            whole = source if isinstance(source, Recording) else read_recording(source)
            recording = choose_layers(whole, layers)
        if not recording.snapshots:
            raise ConfigError("a recording to explore has records", got="none of them")
        return cls(recording, None if probes is None else _check_probes(probes, recording))

    @property
    def keys(self) -> list[Key]:
        """Every (layer, rotation)."""
        return list(self.recording.widths)

    def block(self, index: int) -> bytes:
        """Angles of one rotation, little-endian float16 (records, experts, stages, pairs)."""
        parts = [snapshot.angles[self.keys[index]] for snapshot in self.recording.snapshots]
        return np.stack(parts).astype("<f2").tobytes()

    def sizes(self) -> list[int]:
        """Bytes of each block."""
        snapshots = self.recording.snapshots
        return [len(snapshots) * 2 * snapshots[0].angles[key].size for key in self.keys]

    def meta(self, inline: Sequence[int]) -> dict[str, Any]:
        """What the JavaScript has to know; `inline` are the blocks that travel at once."""
        blocks, sizes = [], self.sizes()
        for layer, rotation in self.keys:
            shape = self.recording.snapshots[0].angles[layer, rotation].shape
            loads = self.recording.loads(layer)
            blocks.append({
                "layer": layer, "rotation": rotation, "d": self.recording.widths[layer, rotation],
                "E": shape[0], "S": shape[1], "loads": None if loads is None else loads.tolist(),
            })  # fmt: skip
        starts = np.cumsum([0, *(sizes[i] for i in inline)]).tolist()
        return {
            "steps": self.recording.steps,
            "losses": [x if math.isfinite(x) else None for x in self.recording.losses],
            "blocks": blocks,
            "inline": [
                {"block": i, "offset": starts[n], "bytes": sizes[i]} for n, i in enumerate(inline)
            ],
            "probes": None
            if self.probes is None
            else {"rows": len(self.probes), "d": self.probes.shape[1]},
        }

    def probe_bytes(self) -> bytes:
        """The user's probes, float32."""
        return b"" if self.probes is None else self.probes.astype("<f4").tobytes()

    def probe(self, d: int, row: int) -> np.ndarray:
        """The vector that probe `row` is at width d."""
        if self.probes is not None and self.probes.shape[1] == d:
            return self.probes[row]
        return signs(range(row, row + 1), d)[0]

    def num_probes(self, d: int) -> int:
        """How many vectors there are at width d."""
        own = self.probes is not None and self.probes.shape[1] == d
        return len(self.probes) if own and self.probes is not None else 8


def choose_layers(recording: Recording, layers: Patterns) -> Recording:
    """The part of a recording that fits patterns of layer paths.

    Raises:
        ConfigError: None fits.
    """
    if layers is None:
        return recording
    keys = [key for key in recording.widths if _fits(key[0], layers)]
    if not keys:
        raise ConfigError(
            "layers= fits a layer of the recording", got=layers, fix=f"It has {recording.layers}."
        )
    snapshots = [
        type(s)(s.step, {key: s.angles[key] for key in keys}, s.loads, s.loss, s.metrics)
        for s in recording.snapshots
    ]
    return Recording({key: recording.widths[key] for key in keys}, snapshots)


def _check_probes(
    probes: Tensor | np.ndarray | Sequence[Sequence[float]], recording: Recording
) -> np.ndarray:
    if isinstance(probes, Tensor):
        probes = probes.detach().float().cpu().numpy()
    array = np.atleast_2d(np.asarray(probes, dtype=np.float32))
    widths = sorted(set(recording.widths.values()))
    good = array.ndim == 2 and array.shape[1] in widths and len(array) > 0
    if not (good and np.isfinite(array).all() and (np.abs(array).sum(axis=1) > 0).all()):
        raise ConfigError(
            "probes are finite, non-zero vectors, (K, d), with the width d of a rotation",
            got=f"shape {array.shape}",
            fix=f"Widths here: {widths}. For example hidden states, hidden[:8].",
        )
    return array


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless a selection is one of those possible."""
    if value not in allowed:
        raise ConfigError(f"{name} is one of {list(allowed)}", got=repr(value))


CHOICES = {"measure": tuple(MEASURES), "show": SHOWN}
