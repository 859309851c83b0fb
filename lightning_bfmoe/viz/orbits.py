r"""What the explorer shows, in numpy: distances of experts, and the orbit of a probe vector.

The distance of two experts at one rotation is

.. math:: D(A, B) = \frac{\lVert B_A - B_B \rVert_F}{\sqrt{2 d}}
   = \sqrt{1 - \mathrm{tr}(B_A^T B_B) / d}

It has no unit: 0 for equal rotations, 1 for rotations as unrelated as two random ones, sqrt(2) for
opposite ones. Images of all d basis vectors give it exactly; where that is too much work, images of
K vectors of random signs z give an unbiased estimate of :math:`D^2`, the mean of
:math:`\lVert (B_A - B_B) z \rVert^2 / 2d`, with a standard error of at most
:math:`\sqrt{2 / (K d)}` (Hutchinson's estimator of a trace).

``static/orbit_math.js`` computes the same numbers in the browser, signs included; the tests compare
the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_bfmoe.functional.butterfly import stage_pairs

MEASURES = {"rotation": "distance of the rotations", "angle": "rms difference of the angles (rad)"}
TRAIL = 24
"""Points of an orbit's trail."""


@dataclass(frozen=True)
class Distances:
    """Distances of all pairs of experts."""

    values: np.ndarray
    """(experts, experts) float64."""
    probes: int
    """Vectors whose images were compared; 0 for a measure that needs none."""
    standard_error: float
    """Bound of the standard error of the squared distance; 0 when exact."""

    @property
    def mean(self) -> float:
        """Mean over different experts; 0 for a single one."""
        count = len(self.values)
        return float(self.values.sum() / max(1, count * (count - 1)))


def signs(rows: range, d: int) -> np.ndarray:
    """Rows of +1 and -1, (rows, d) float64, the same in every browser and on every machine.

    Example:
        >>> signs(range(2), 4).tolist()
        [[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    """
    row = np.asarray(rows, dtype=np.uint32)[:, None]
    h: np.ndarray = row * np.uint32(0x9E3779B1) + np.arange(1, d + 1, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    h = h ^ (h >> np.uint32(16))
    return np.where(h & np.uint32(1), 1.0, -1.0)


def num_probes(experts: int, d: int) -> int:
    """Vectors to compare images of: all d basis vectors where that is cheap, else 8 to 64."""
    if is_exact(experts, d):
        return d
    return min(64, max(8, 2**28 // (experts * experts * d)))


def is_exact(experts: int, d: int) -> bool:
    """Whether the distances are computed from all basis vectors."""
    return d <= 1024 and experts * d <= 16384


def rotate(
    x: np.ndarray, angles: np.ndarray, stages: int | None = None, scale: float = 1.0
) -> np.ndarray:
    """Rotate the last axis by the first `stages` stages with angles times `scale`, in float64.

    Args:
        x: (..., d).
        angles: (..., stages, pairs), radians; leading axes broadcast against those of `x`.
        stages: Stages used; all when None.
        scale: Factor of every angle.

    Returns:
        The images, (..., d).
    """
    d, count = x.shape[-1], angles.shape[-2] if stages is None else stages
    first, second = (pairs.numpy() for pairs in stage_pairs(d, count))
    turned = scale * angles[..., :count, :].astype(np.float64)
    cos, sin = np.cos(turned), np.sin(turned)
    lead = np.broadcast_shapes(x.shape[:-1], angles.shape[:-2])
    y = np.broadcast_to(x.astype(np.float64), (*lead, d)).copy()
    for s in range(count):
        left, right = y[..., first[s]], y[..., second[s]]
        y[..., first[s]] = cos[..., s, :] * left - sin[..., s, :] * right
        y[..., second[s]] = sin[..., s, :] * left + cos[..., s, :] * right
    return y


def distances(
    angles: np.ndarray,
    d: int,
    measure: str = "rotation",
    *,
    stages: int | None = None,
    scale: float = 1.0,
) -> Distances:
    """Distances of all pairs of experts at one rotation.

    Example:
        >>> angles = np.zeros((2, 3, 4)); angles[1] = np.pi / 2
        >>> distances(angles, 8).values.round(3).tolist()
        [[0.0, 1.0], [1.0, 0.0]]

    Args:
        angles: (experts, stages, pairs), radians.
        d: Width.
        measure: A name in `MEASURES`.
        stages: Stages used; all when None.
        scale: Factor of every angle.
    """
    experts = len(angles)
    if measure == "angle":
        used = scale * angles[:, :stages].reshape(experts, -1).astype(np.float64)
        values = np.empty((experts, experts))
        for i in range(experts):  # one row at a time: all pairs at once would be too large
            wrapped = used - used[i]
            wrapped = wrapped - 2 * np.pi * np.round(wrapped / (2 * np.pi))
            values[i] = np.sqrt((wrapped**2).mean(axis=1))
        return Distances(values, 0, 0.0)
    count = num_probes(experts, d)
    exact = is_exact(experts, d)
    probes = np.eye(d) if exact else signs(range(count), d)
    images = rotate(probes, angles[:, None], stages, scale).reshape(experts, -1)
    norms = (images**2).sum(axis=1)
    squared = norms[:, None] + norms - 2 * images @ images.T
    squared = np.maximum(squared, 0) / (2 * d if exact else 2 * d * count)
    np.fill_diagonal(squared, 0)
    return Distances(np.sqrt(squared), count, 0.0 if exact else float(np.sqrt(2 / (count * d))))


def orbit(
    angles: np.ndarray,
    last: np.ndarray,
    probe: np.ndarray,
    a: int,
    b: int,
    *,
    stages: int | None = None,
    scale: float = 1.0,
    experts: Sequence[int] | None = None,
    trail: bool = True,
) -> np.ndarray:
    """Where each expert sends a probe vector, on its way from angle 0, in a fixed plane.

    The plane goes through the probe and its images under experts A and B at the last record, so
    the distances between these three are true; the others are seen from above. The probe is the
    origin, and the unit is the probe's length.

    Args:
        angles: (experts, stages, pairs), radians.
        last: The same at the last record.
        probe: (d,); only its direction counts.
        a: Expert A.
        b: Expert B.
        stages: Stages used; all when None.
        scale: Factor of every angle, at the end of the trail.
        experts: Only these; all when None.
        trail: False: only where the trail ends.

    Returns:
        Coordinates, (experts, TRAIL + 1 or 1, 2) float64.
    """
    x = probe.astype(np.float64) / np.linalg.norm(probe)
    axes = plane(x, rotate(x, last[[a, b]]))
    chosen = angles if experts is None else angles[list(experts)]
    turns = np.linspace(0, scale, TRAIL + 1) if trail else [scale]
    points = [(rotate(x, chosen, stages, float(t)) - x) @ axes.T for t in turns]
    return np.stack(points, axis=1)


def plane(x: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Two orthonormal axes, (2, d), from x to A's image and, beside it, towards B's."""
    axes: list[np.ndarray] = []
    for row, image in enumerate(images):
        axis = image - x
        for other in axes:
            axis = axis - (axis @ other) * other
        if np.linalg.norm(axis) < 1e-6:  # the image does not span a plane: any direction will do
            axis = signs(range(1000 + row, 1001 + row), len(x))[0]
            for other in axes:
                axis = axis - (axis @ other) * other
        axes.append(axis / np.linalg.norm(axis))
    return np.stack(axes)
