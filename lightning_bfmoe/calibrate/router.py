"""A router's start from clusters of what it will route: one direction an expert."""

import torch
from torch import Tensor

from lightning_bfmoe.errors import CalibrationError


def spherical_centroids(
    rows: Tensor, clusters: int, *, steps: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Spherical k-means: unit centroids that each row's direction is nearest to.

    .. math:: a(x) = \arg\max_i \mu_i^T x / |x| ,\qquad
       \mu_i = \sum_{a(x) = i} x / |x| \ \text{normalised}

    The first centroids are drawn as in k-means++; an empty cluster takes the row that fits worst.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])
        >>> _, member = spherical_centroids(rows, 2)
        >>> bool(member[0] == member[1]) and bool(member[2] == member[3])
        True

    Args:
        rows: (rows, d).
        clusters: Count, at most the rows.
        steps: Lloyd steps (count).
        seed: Of the first centroids.

    Returns:
        Centroids (clusters, d) and the cluster of each row (rows,).

    Raises:
        CalibrationError: Fewer rows than clusters.

    Source: Dhillon and Modha 2001; k-means++ Arthur and Vassilvitskii 2007.
    """
    if len(rows) < clusters:
        raise CalibrationError(
            "clusters need at least one token each",
            got=f"{len(rows)} tokens for {clusters} clusters",
            fix="Give more calibration batches, or use router='random'.",
        )
    unit = torch.nn.functional.normalize(rows.detach().float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(unit), (1,), generator=generator))]
    for _ in range(clusters - 1):
        distance = 1 - (unit @ unit[chosen].T).amax(dim=1)  # (rows,)
        weights = distance.clamp(min=1e-12).cpu()
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    centroids = unit[chosen]
    for _ in range(steps):
        near, member = (unit @ centroids.T).max(dim=1)
        sums = torch.zeros_like(centroids).index_add_(0, member, unit)
        for empty in (torch.bincount(member, minlength=clusters) == 0).nonzero().flatten():
            worst = int(near.argmin())
            sums[empty], near[worst] = unit[worst], 2.0
        centroids = torch.nn.functional.normalize(sums, dim=1)
    return centroids, (unit @ centroids.T).argmax(dim=1)


def router_weight(rows: Tensor, clusters: int, *, spread: float = 1.0, seed: int = 0) -> Tensor:
    """Weights of a router whose logits follow the clusters of its inputs.

    The centroids' mean is taken out, which no softmax depends on, and the logits of `rows` get the
    standard deviation `spread` across experts.

    Args:
        rows: A sample of the router's inputs, (rows, d).
        clusters: Experts.
        spread: Of the logits (logit units).
        seed: Of the clusters.

    Returns:
        (clusters, d), float32.

    Source: centroids as router rows, Cluster-aware Upcycling (arXiv 2604.13508); the scale ours.
    """
    centroids, _ = spherical_centroids(rows, clusters, seed=seed)
    weight = centroids - centroids.mean(dim=0, keepdim=True)
    logits = rows.float() @ weight.T  # (rows, clusters)
    std = logits.std(dim=1).mean() if clusters > 1 else torch.zeros(())
    return weight * (spread / std) if std > 0 else weight
