"""Lloyd's k-means with exact assignment, the same for a seed on any number of threads or processes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .ops.checks import check_float, fail
from .ops.kmeans import MAX_CLUSTERS, MAX_DIMENSION
from .reference.kmeans import fixed_point

INITS = ("random", "k-means++")
BITS = 61  # of a fixed-point sum, without its sign
MAX_MAGNITUDE = 1e17
SPLIT = 1e-3  # distance that a split cluster's halves are moved, in units of the points' spread
CANCELLED = 16  # a difference this many times smaller than its parts is computed anew
CHUNK = 1 << 20  # points whose distances are computed anew at once

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
    centroids = _start(scaled, n_clusters, init, seed, weights, importance)
    lloyd = _Lloyd(scaled, weights, group)
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
    largest = _largest(points)
    if not math.isfinite(largest):
        fail("points", "finite values", f"{int((~points.isfinite()).sum())} that are NaN or infinite")
    if largest > MAX_MAGNITUDE:
        fail("points", f"magnitudes up to {MAX_MAGNITUDE:g}, whose squares fp32 holds", f"{largest:g}")
    return points


def _largest(points: torch.Tensor) -> float:
    """Largest magnitude among the points; NaN if there is one."""
    low, high = points.aminmax()
    return float(torch.maximum(-low, high))


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


def _start(points, n_clusters, init, seed, weights, importance) -> torch.Tensor:
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


class _Lloyd:
    """Iterations over the points of this process."""

    def __init__(self, points: torch.Tensor, weights: torch.Tensor | None, group) -> None:
        self._group, self._n, self._points_of_all = group, len(points), points
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._begin, self._end = self._n * rank // world, self._n * (rank + 1) // world
        self._points = points[self._begin : self._end]
        self._weights = None if weights is None else weights[self._begin : self._end]
        self._largest = _largest(points)
        self._heaviest = 1.0 if weights is None else float(weights.max())
        # so that sums over all n points stay below 2^BITS
        self._exponent = _exponent(self._n * self._largest * self._heaviest)
        self._weight_exponent = 0 if weights is None else _exponent(self._n * self._heaviest)
        self._codes = self._mass = None

    def step(self, centroids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The means of the points nearest to each centroid, and the objective they reach. A cluster without
        points keeps its centroid.
        """
        reach = max(self._largest, float(centroids.abs().max()))
        exponent = self._objective_exponent(reach)
        exponents = (self._exponent, self._weight_exponent, exponent)
        self._codes, sums, mass, total = torch.ops.qnkernels.kmeans_step(
            self._points, centroids, *exponents, self._weights
        )
        self._all_reduce(sums, mass, total)
        self._mass = mass = mass.double() * 2.0**-self._weight_exponent
        means = sums.double() * 2.0**-self._exponent / mass[:, None].clamp(min=1e-300)
        means = torch.where(mass[:, None] > 0, means.float(), centroids)
        # the squared error falls by mass * |step|^2 when a centroid moves to the mean of its points
        moved = mass[:, None] * (means.double() - centroids.double()) ** 2
        squared = int(total) - int(fixed_point(moved, exponent).sum())
        if squared * CANCELLED < int(total):  # the centroids came from afar: little is left of the digits
            exponent = self._objective_exponent(self._largest)
            squared = self._squared_error(means, exponent)
        return means, math.sqrt(math.ldexp(max(squared, 0), -exponent))

    def _objective_exponent(self, reach: float) -> int:
        """For the sum of squared distances to centroids whose coordinates do not exceed `reach`."""
        return _exponent(self._n * self._points.shape[1] * (self._largest + reach) ** 2 * self._heaviest)

    def _squared_error(self, means: torch.Tensor, exponent: int) -> int:
        """Of all points to the means of their clusters, in the unit 2^-exponent."""
        total = torch.zeros((), dtype=torch.int64, device=means.device)
        for begin in range(0, len(self._points), CHUNK):
            rows = slice(begin, begin + CHUNK)
            difference = self._points[rows].double() - means[self._codes[rows].long()].double()
            terms = difference.square().sum(1)
            terms = terms if self._weights is None else terms * self._weights[rows].double()
            total += fixed_point(terms, exponent).sum()
        self._all_reduce(total)
        return int(total)

    def _all_reduce(self, *parts: torch.Tensor) -> None:
        if self._group is not None:
            for part in parts:
                dist.all_reduce(part, group=self._group)

    def refilled(self, centroids: torch.Tensor) -> torch.Tensor:
        """Give each cluster that was empty half of the most populated one: two centroids, a little to either
        side of its mean.
        """
        if self._mass is None or bool((self._mass > 0).all()):
            return centroids
        means, mass = centroids.clone(), self._mass.clone()
        signs = torch.ones(means.shape[1], device=means.device)
        signs[1::2] = -1
        spread = float(self._points_of_all.std(unbiased=False))
        step = signs * max(SPLIT * spread, torch.finfo(torch.float32).tiny)
        for empty in (mass == 0).nonzero()[:, 0].tolist():
            donor = int(mass.argmax())
            means[empty], means[donor] = means[donor] + step, means[donor] - step
            mass[empty] = mass[donor] = mass[donor] / 2
        return means

    def all_codes(self) -> torch.Tensor:
        if self._group is None:
            return self._codes
        codes = self._codes.new_zeros(self._n)
        codes[self._begin : self._end] = self._codes
        self._all_reduce(codes)
        return codes


def _exponent(bound: float) -> int:
    """The largest e with bound * 2^e below 2^BITS, within what a double can scale by."""
    return 0 if bound == 0.0 else max(-900, min(900, BITS - math.frexp(bound)[1]))


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
