"""Lloyd's k-means with exact assignment, the same for a seed on any number of threads or processes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..ops.checks import check_float, fail
from ..ops.kmeans import MAX_CLUSTERS, MAX_DIMENSION
from .lloyd import Lloyd, largest_magnitude
from .start import starting_centroids

MAX_MAGNITUDE = 1e17

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class KMeansResult:
    """centroids fp32 [K, d]; codes int32 [n], the assignment that the centroids are the means of; objective:
    after each iteration, the root of the (weighted) sum of squared distances of points to their centroids.
    """

    centroids: torch.Tensor
    codes: torch.Tensor
    objective: list[float]


@torch.no_grad()
def kmeans(
    points: torch.Tensor,
    n_clusters: int,
    n_iter: int = 20,
    init: str | torch.Tensor = "random",
    seed: int = 0,
    weights: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    tolerance: float = 0.0,
    progress: Progress | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> KMeansResult:
    """Cluster points [n, d] (fp32, bf16 or fp16; 1 <= d <= 64) into n_clusters of 1 to 65,536.

    init: "random" (points drawn without replacement), "k-means++", or centroids [K, d]. Each iteration
    assigns every point to its nearest centroid and moves the centroids to the means; a cluster without
    points is refilled by splitting the most populated one. weights [n] >= 0: mass of each point.
    importance [d] >= 0: the distance is sum_j importance_j (x_j - c_j)^2. Stops early once the objective
    falls by less than `tolerance` of itself. progress(iteration, objective) is called after each one.
    group: processes that hold the same points and share the work; all get the same result, which is also
    that of one process. Memory: O(n + K d). Raises ValueError and TypeError naming the argument.
    """
    points = _checked_points(points, n_clusters, n_iter)
    weights = _checked_weights("weights", weights, len(points), points.device)
    importance = _checked_weights("importance", importance, points.shape[1], points.device)
    scaled = points if importance is None else points * importance.sqrt()
    centroids = starting_centroids(scaled, n_clusters, init, seed, weights, importance)
    lloyd = Lloyd(scaled, weights, centroids, n_iter, group)
    objective: list[float] = []
    for iteration in range(n_iter):
        # not after the last step, so that the result is the means
        centroids, value = lloyd.step(lloyd.refilled(centroids))
        previous = objective[-1] if objective else math.inf
        objective.append(value)
        if progress is not None:
            progress(iteration + 1, value)
        if value == 0.0 or (tolerance > 0.0 and previous - value <= tolerance * value):
            break
    codes = lloyd.all_codes()
    if importance is not None:
        centroids = _unscaled(points, codes, centroids, importance, weights)
    return KMeansResult(centroids, codes, objective)


def _checked_points(points: torch.Tensor, n_clusters: int, n_iter: int) -> torch.Tensor:
    check_float("points", points)
    if points.dim() != 2 or not 1 <= points.shape[1] <= MAX_DIMENSION:
        fail("points", f"shape [n, d] with d from 1 to {MAX_DIMENSION}", tuple(points.shape))
    for name, value in (("n_clusters", n_clusters), ("n_iter", n_iter)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fail(name, "an integer of at least 1", repr(value))
    if n_clusters > MAX_CLUSTERS:
        fail("n_clusters", f"at most {MAX_CLUSTERS}", n_clusters)
    if len(points) < n_clusters:
        fail("points", f"at least as many as the {n_clusters} clusters", len(points))
    points = points.detach().float().contiguous()
    largest = largest_magnitude(points)
    if not math.isfinite(largest):
        fail("points", "finite values", f"{int((~points.isfinite()).sum())} that are NaN or infinite")
    if largest > MAX_MAGNITUDE:
        fail("points", f"magnitudes up to {MAX_MAGNITUDE:g}, whose squares fp32 holds", f"{largest:g}")
    return points


def _checked_weights(
    name: str, value: torch.Tensor | None, count: int, device: torch.device
) -> torch.Tensor | None:
    if value is None:
        return None
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != (count,):
        received = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
        fail(name, f"a tensor of shape ({count},)", received)
    value = value.detach().to(device, torch.float32).contiguous()
    if not bool((value.isfinite() & (value >= 0)).all()) or not bool((value > 0).any()):
        fail(name, "finite values of at least 0, not all 0", f"values from {value.min()} to {value.max()}")
    return value


def _unscaled(points, codes, scaled, importance, weights) -> torch.Tensor:
    """Centroids among the points themselves: in a dimension without importance, the mean of its points."""
    root = importance.sqrt()
    terms = points.double() if weights is None else points.double() * weights.double()[:, None]
    ones = torch.ones(len(points), device=points.device) if weights is None else weights
    shape = (len(scaled), points.shape[1])
    sums = torch.zeros(shape, dtype=torch.float64, device=points.device).index_add_(0, codes.long(), terms)
    mass = torch.zeros(len(scaled), dtype=torch.float64, device=points.device)
    mass = mass.index_add_(0, codes.long(), ones.double()).clamp(min=1e-300)[:, None]
    return torch.where(root > 0, scaled / root.clamp(min=1e-30), (sums / mass).float())
