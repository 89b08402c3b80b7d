"""The steps of Lloyd's k-means, over the points of one process of several."""

import math

import torch
import torch.distributed as dist

from ..reference.kmeans import fixed_point
from .bounds import Steps

BITS = 61  # of a fixed-point sum, without its sign
SPLIT = 1e-3  # distance that a split cluster's halves are moved, in units of the points' spread
CANCELLED = 16  # a difference this many times smaller than its parts is computed anew
CHUNK = 1 << 20  # points whose distances are computed anew at once


def largest_magnitude(points: torch.Tensor) -> float:
    """Largest magnitude among the points; NaN if there is one."""
    low, high = points.aminmax()
    return float(torch.maximum(-low, high))


class Lloyd:
    """Iterations over the points of this process."""

    def __init__(
        self,
        points: torch.Tensor,
        weights: torch.Tensor | None,
        centroids: torch.Tensor,
        n_iter: int,
        group: "dist.ProcessGroup | None",
    ) -> None:
        self._group, self._n, self._points_of_all = group, len(points), points
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._begin, self._end = self._n * rank // world, self._n * (rank + 1) // world
        self._points = points[self._begin : self._end]
        self._weights = None if weights is None else weights[self._begin : self._end]
        self._largest = largest_magnitude(points)
        self._heaviest = 1.0 if weights is None else float(weights.max())
        # so that sums over all n points stay below 2^BITS
        self._exponent = _exponent(self._n * self._largest * self._heaviest)
        self._weight_exponent = 0 if weights is None else _exponent(self._n * self._heaviest)
        self._steps = Steps(self._points, self._weights, centroids, n_iter)
        self._mass = None

    def step(self, centroids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The means of the points nearest to each centroid, and the objective they reach. A cluster without
        points keeps its centroid.
        """
        reach = max(self._largest, float(centroids.abs().max()))
        exponent = self._objective_exponent(reach)
        exponents = (self._exponent, self._weight_exponent, exponent)
        sums, mass, total = self._steps(centroids, *exponents)
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
            difference = self._points[rows].double() - means[self._steps.codes[rows].long()].double()
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
        own = self._steps.codes
        if self._group is None:
            return own
        codes = own.new_zeros(self._n)
        codes[self._begin : self._end] = own
        self._all_reduce(codes)
        return codes


def _exponent(bound: float) -> int:
    """The largest e with bound * 2^e below 2^BITS, within what a double can scale by."""
    return 0 if bound == 0.0 else max(-900, min(900, BITS - math.frexp(bound)[1]))
