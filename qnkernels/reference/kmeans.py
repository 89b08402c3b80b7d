"""The two halves of a step of Lloyd's k-means, and both at once.

Sums are taken in fixed point, so that they do not depend on the order of the points, on the number of
threads, or on how the points are spread over processes: a term t is added as round(t * 2^exponent), an int64.
"""

from collections.abc import Callable

import torch

CHUNK = 1 << 22  # distances held at once


def kmeans_assign(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the nearest centroid (int32 [n], the lowest among equals) and the squared distance to it
    (fp32 [n]) of points fp32 [n, d] and centroids fp32 [K, d].
    """
    codes, distances = [], []
    table = centroids.double()
    for rows in points.split(max(CHUNK // len(centroids), 1)):
        squared = sum((rows[:, i, None].double() - table[:, i]) ** 2 for i in range(points.shape[1]))
        nearest = squared.argmin(dim=1)
        codes.append(nearest.int())
        distances.append(squared.gather(1, nearest[:, None])[:, 0].float())
    if not codes:
        return points.new_empty(0, dtype=torch.int32), points.new_empty(0)
    return torch.cat(codes), torch.cat(distances)


def kmeans_update(
    points: torch.Tensor,
    codes: torch.Tensor,
    n_clusters: int,
    exponent: int,
    weight_exponent: int,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed-point sums of the points (int64 [K, d], unit 2^-exponent) and masses (int64 [K]) by cluster.

    weights fp32 [n]: the sum is of fp32 products weight * point, the mass of weights in the unit
    2^-weight_exponent. Without weights the mass is the number of points.
    """
    index = codes.long()
    sums = torch.zeros(n_clusters, points.shape[1], dtype=torch.int64, device=points.device)
    mass = torch.zeros(n_clusters, dtype=torch.int64, device=points.device)
    terms = points if weights is None else points * weights[:, None]
    sums.index_add_(0, index, fixed_point(terms, exponent))
    mass.index_add_(
        0, index, torch.ones_like(index) if weights is None else fixed_point(weights, weight_exponent)
    )
    return sums, mass


def kmeans_step(
    points: torch.Tensor,
    centroids: torch.Tensor,
    exponent: int,
    weight_exponent: int,
    objective_exponent: int,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes, sums and masses as above, and the sum of (weight *) squared distances, int64 0-d in the unit
    2^-objective_exponent.
    """
    codes, distances = kmeans_assign(points, centroids)
    sums, mass = kmeans_update(points, codes, len(centroids), exponent, weight_exponent, weights)
    terms = distances if weights is None else distances * weights
    return codes, sums, mass, fixed_point(terms, objective_exponent).sum()


def kmeans_bounded_step_(
    points: torch.Tensor,
    centroids: torch.Tensor,
    group_of: torch.Tensor,
    travelled: torch.Tensor,
    unit: float,
    exponent: int,
    weight_exponent: int,
    objective_exponent: int,
    codes: torch.Tensor,
    bounds: torch.Tensor,
    sums: torch.Tensor,
    mass: torch.Tensor,
    weights: torch.Tensor | None,
    step: Callable = kmeans_step,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step whose codes, sums and masses take the place of those of the step before. Returns the objective
    and how many pairs of a point and a group were looked at: here all, and no bounds are kept.
    """
    *found, objective = step(points, centroids, exponent, weight_exponent, objective_exponent, weights)
    for kept, new in zip((codes, sums, mass), found, strict=True):
        kept.copy_(new)
    bounds.zero_()
    return objective, torch.tensor(bounds.numel(), device=points.device)


def fixed_point(terms: torch.Tensor, exponent: int) -> torch.Tensor:
    """round(terms * 2^exponent), int64; half to even."""
    return torch.round(terms.double() * 2.0**exponent).long()
