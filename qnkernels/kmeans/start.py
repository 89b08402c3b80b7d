"""Where k-means starts: centroids given, drawn among the points, or spread over them."""

import torch

from ..ops.checks import fail

INITS = ("random", "k-means++")


def starting_centroids(points, n_clusters, init, seed, weights, importance) -> torch.Tensor:
    if isinstance(init, torch.Tensor):
        expected = (n_clusters, points.shape[1])
        if tuple(init.shape) != expected:
            fail("init", f"shape {expected}", tuple(init.shape))
        centroids = init.detach().to(points.device, torch.float32)
        if not bool(centroids.isfinite().all()):
            fail("init", "finite centroids", "NaN or infinity")
        return centroids.clone() if importance is None else centroids * importance.sqrt()
    generator = torch.Generator().manual_seed(seed)
    if init == "random":
        return points[_draw_points(len(points), n_clusters, generator).to(points.device)]
    if init == "k-means++":
        return _plus_plus(points, n_clusters, weights, generator)
    fail("init", f"one of {INITS} or a tensor [K, d]", repr(init))


def _draw_points(n: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` different indices below n, in O(count) where that is less."""
    if n < 4 * count:
        return torch.randperm(n, generator=generator)[:count]
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        fresh = torch.randint(n, (2 * count,), generator=generator)
        together = torch.cat((drawn, fresh))
        values, inverse = torch.unique(together, return_inverse=True)
        first = torch.full((len(values),), len(together)).scatter_reduce_(
            0, inverse, torch.arange(len(together)), "amin"
        )
        drawn = together[first.sort().values]
    return drawn[:count]


def _plus_plus(points, n_clusters, weights, generator) -> torch.Tensor:
    """Each further centroid is a point drawn with the probability of its (weighted) squared distance to the
    nearest centroid so far (Arthur and Vassilvitskii, 2007).
    """
    draws = torch.rand(n_clusters, dtype=torch.float64, generator=generator).tolist()
    nearest = torch.ones(len(points), device=points.device)
    chosen = []
    for draw in draws:
        chance = (nearest if weights is None else nearest * weights).double().cumsum(0)
        if float(chance[-1]) == 0.0:  # every point is a centroid already
            chance = torch.arange(1, len(points) + 1, dtype=torch.float64, device=points.device)
        position = torch.searchsorted(chance, chance[-1:] * draw, right=True).clamp(max=len(points) - 1)
        centroid = points[position]
        _, distance = torch.ops.qnkernels.kmeans_assign(points, centroid)
        nearest = distance if not chosen else torch.minimum(nearest, distance)
        chosen.append(centroid)
    return torch.cat(chosen)
