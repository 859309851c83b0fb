r"""A layer's experts as points in the plane, with what each of them takes from a text.

The distance of two experts is the root mean square of their distances at all rotations of the layer
(`viz.orbits`). Classical multidimensional scaling lays them out: with J the centring matrix, the
eigenvectors of :math:`-\frac{1}{2} J D^2 J` with the two largest eigenvalues, so that distances in
the plane are as near to D as a projection can be; ``explained`` is the share of the sum of positive
eigenvalues that these two hold. Experts as unrelated as random rotations have no good plane, and
the share says so.

The top tokens of expert e are those with the largest
:math:`n(e, t)\,\log\frac{P(e \mid t)}{P(e)}`, where n counts slots: tokens that it takes often, and
more often than its load alone would explain.
"""

from dataclasses import dataclass

import numpy as np
from torch import nn

from lightning_bfmoe.viz.orbits import distances
from lightning_bfmoe.viz.routes import Routes
from lightning_bfmoe.viz.snapshot import find_rotations, read_angles


@dataclass(frozen=True)
class Embedding:
    """Experts of one layer in the plane."""

    points: np.ndarray
    """(experts, 2) float64, in units of the distance."""
    explained: float
    """Share of the scatter that the plane holds, in [0, 1]."""
    load: np.ndarray
    """(experts,) slots of the text."""
    top: list[list[tuple[str, int]]]
    """Per expert: pieces of text and how often it took them."""

    @property
    def relative_load(self) -> np.ndarray:
        """Load over the mean: 1 is even use."""
        return self.load / max(1e-12, self.load.mean())


def layer_distances(model: nn.Module, layer: str) -> np.ndarray:
    """Root mean square over a layer's rotations of the distance of its experts, (experts, experts).

    Args:
        model: Any module with the layer in it.
        layer: Its path.
    """
    found = [item for (name, _), item in find_rotations(model).items() if name == layer]
    squared = [distances(read_angles(m).float().numpy(), d).values ** 2 for m, d in found]
    return np.sqrt(np.mean(squared, axis=0))


def scale_down(distance: np.ndarray) -> tuple[np.ndarray, float]:
    """Classical multidimensional scaling to two axes, and the share that they explain.

    Example:
        >>> points, explained = scale_down(np.array([[0.0, 3.0, 4.0], [3, 0, 5], [4, 5, 0]]))
        >>> np.linalg.norm(points[1] - points[2]).round(6), round(explained, 6)
        (np.float64(5.0), 1.0)
    """
    count = len(distance)
    center = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-0.5 * center @ distance**2 @ center)
    order = np.argsort(values)[::-1][:2]
    kept = np.maximum(values[order], 0)
    points = vectors[:, order] * np.sqrt(kept)
    points *= np.where(points[np.abs(points).argmax(axis=0), range(points.shape[1])] < 0, -1, 1)
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    total = np.maximum(values, 0).sum()
    return points, float(kept.sum() / total) if total > 1e-12 else 1.0


def top_tokens(routes: Routes, layer: str, count: int) -> list[list[tuple[str, int]]]:
    """The tokens of each expert, by the score of this module's docstring; positive scores only."""
    pieces = sorted(set(routes.pieces))
    index = {piece: i for i, piece in enumerate(pieces)}
    token = np.asarray([index[piece] for piece in routes.pieces])
    experts = routes.experts[layer]
    table = np.zeros((routes.num_experts[layer], len(pieces)))
    np.add.at(table, (experts.ravel(), np.repeat(token, experts.shape[1])), 1)
    share = table.sum(axis=1, keepdims=True) / table.sum()
    lift = table / table.sum(axis=0) / np.maximum(share, 1e-12)
    score = table * np.log(np.maximum(lift, 1e-12))
    best = np.argsort(-score, axis=1, kind="stable")[:, :count]
    return [
        [(pieces[i], int(table[e, i])) for i in row if table[e, i] and lift[e, i] > 1]
        for e, row in enumerate(best)
    ]


def embed_experts(model: nn.Module, routes: Routes, layer: str, top: int = 8) -> Embedding:
    """Where the experts of a layer lie, and what they took.

    Args:
        model: The model that was traced.
        routes: Its routes through a text.
        layer: Path of the layer.
        top: Tokens listed for each expert (count).
    """
    points, explained = scale_down(layer_distances(model, layer))
    return Embedding(points, explained, routes.load(layer), top_tokens(routes, layer, top))
