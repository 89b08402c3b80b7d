"""The steps of a search, most of which look only at centroids that bounds do not rule out."""

import math
import time
from collections.abc import Callable

import torch

SMALLEST = 32  # clusters from which on bounds can pay
WIDE = 512  # clusters from which on there are more groups of them
RANGE = 16.0  # the longest distance that bounds tell, in units of the points' root mean squared one
TOP = 65535
ROUNDED = 1 + 2**-20  # up, whatever fp32 does
PATIENCE = 4  # steps with bounds before they must be faster than without
SAMPLE = 4096  # points that tell what a step costs
FEW = 64  # and those that tell what a call costs


class Steps:
    """kmeans_step of the same points again and again, some n_iter times. Bounds change the time alone: all
    results are those of kmeans_step, to the bit.
    """

    def __init__(
        self, points: torch.Tensor, weights: torch.Tensor | None, centroids: torch.Tensor, n_iter: int
    ) -> None:
        self.codes = None
        self._points, self._weights = points, weights
        self._bounds, self._plain_time = None, math.inf
        if points.is_cpu and n_iter > 1 and len(points) >= 2 * SAMPLE and len(centroids) >= SMALLEST:
            self._consider_bounds(centroids, n_iter)

    def _consider_bounds(self, centroids: torch.Tensor, n_iter: int) -> None:
        """Bounds, if some of the points say that n_iter steps with them take less time."""
        some = self._points[:: max(1, len(self._points) // SAMPLE)].contiguous()
        distance = math.sqrt(float(torch.ops.qnkernels.kmeans_assign(some, centroids)[1].mean()))
        if not 0.0 < distance < math.inf:
            return
        groups = _Groups(centroids)
        plain = _time_of(lambda points: torch.ops.qnkernels.kmeans_step(points, centroids, 0, 0, 0), some)
        first = _time_of(
            lambda points: _Bounds(points, groups, distance).step(points, centroids, (0, 0, 0), None), some
        )
        if first * _firsts_in(n_iter) < plain * n_iter:
            self._bounds = _Bounds(self._points, groups, distance)
            self._plain_time = plain * len(self._points) / len(some)

    def __call__(self, centroids: torch.Tensor, *exponents: int) -> tuple[torch.Tensor, ...]:
        """Sums, masses and the objective of kmeans_step; its codes are in `codes`."""
        bounds = self._bounds
        if bounds is None:
            step = torch.ops.qnkernels.kmeans_step(self._points, centroids, *exponents, self._weights)
            self.codes = step[0]
            return step[1:]
        begin = time.perf_counter()
        total = bounds.step(self._points, centroids, exponents, self._weights)
        if bounds.steps > PATIENCE and time.perf_counter() - begin > self._plain_time:
            self._bounds = None
        self.codes = bounds.codes
        return bounds.sums.clone(), bounds.mass.clone(), total


def _firsts_in(n_iter: int) -> float:
    """What n_iter steps with bounds cost in units of the first one, as measured with K = 256 and d = 8."""
    return 1.0 + sum(max(0.3, 0.8 - 0.09 * step) for step in range(1, n_iter))


def _time_of(step: Callable[[torch.Tensor], object], points: torch.Tensor) -> float:
    """Seconds that a step of the points takes, without what a call on a few of them does."""

    def once(some: torch.Tensor) -> float:
        begin = time.perf_counter()
        step(some)
        return time.perf_counter() - begin

    few, all_points = (min(once(some) for _ in range(2)) for some in (points[:FEW], points))
    return max(all_points - few, 1e-9)


class _Groups:
    """Groups of near centroids: halved again and again, each time along the axis in which they vary most."""

    def __init__(self, centroids: torch.Tensor) -> None:
        self.number = 16 if len(centroids) < WIDE else 32
        self.centroids = centroids
        self.of = torch.empty(len(centroids), dtype=torch.int32)
        members = [torch.arange(len(centroids))]
        while len(members) < self.number:
            halves = []
            for some in members:
                axis = int(centroids[some].var(0, unbiased=False).argmax())
                halves += some[centroids[some, axis].argsort(stable=True)].tensor_split(2)
            members = halves
        for group, some in enumerate(members):
            self.of[some] = group


class _Bounds:
    """Lower bounds of the distances of points to the centroids of each group, and all that they rest on."""

    def __init__(self, points: torch.Tensor, groups: _Groups, distance: float) -> None:
        self.codes = torch.full((len(points),), -1, dtype=torch.int32)
        self.sums = torch.zeros(groups.centroids.shape, dtype=torch.int64)
        self.mass = torch.zeros(len(groups.centroids), dtype=torch.int64)
        self.steps = 0
        self._values = torch.zeros(len(points), groups.number, dtype=torch.uint16)
        self._unit = RANGE * distance / TOP
        self._group_of, self._centroids = groups.of, groups.centroids
        self._travelled = torch.zeros(groups.number, dtype=torch.float64)

    def step(self, points, centroids, exponents, weights) -> torch.Tensor:
        """Codes, sums and mass become those with these centroids. Returns the objective."""
        moved = (centroids.double() - self._centroids.double()).norm(dim=1)
        farthest = torch.zeros_like(self._travelled)
        self._travelled += farthest.scatter_reduce_(0, self._group_of.long(), moved, "amax")
        travelled = (self._travelled * ROUNDED).float()
        total, _ = torch.ops.qnkernels.kmeans_bounded_step_(
            *(points, centroids, self._group_of, travelled, self._unit, *exponents),
            *(self.codes, self._values, self.sums, self.mass, weights),
        )
        self._centroids, self.steps = centroids, self.steps + 1
        return total
