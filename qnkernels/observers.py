"""What range of values a calibration keeps of a tensor that it sees batch by batch."""

import math
from abc import ABC, abstractmethod
from fractions import Fraction

import torch

from . import functional
from .ops.checks import fail
from .reference.range import least_error_range

BITS = 8
BINS = 4096  # of a histogram, for each sign
MIN_EXPONENT = -100  # a histogram of smaller values than 2^-100 would have bins that fp32 cannot tell apart
CHUNK = 1 << 22  # elements that are put into bins at once


class Observer(ABC):
    """Sees batches, none of them empty, and tells their range; keeps none of them."""

    @abstractmethod
    def observe(self, x: torch.Tensor) -> None:
        """x: fp32, bf16 or fp16, any shape. Raises ValueError where it is not finite."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """Low and high of what was seen; at least one batch was."""


class MinMax(Observer):
    """Smallest and largest value of all batches."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def observe(self, x: torch.Tensor) -> None:
        low, high = _finite(x, *functional.minmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class EmaMinMax(Observer):
    """Smallest and largest value of a batch, averaged: each batch moves the range by `momentum`."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.state = torch.zeros(()), torch.zeros(()), torch.zeros((), dtype=torch.int64)

    def observe(self, x: torch.Tensor) -> None:
        self.state = tuple(tensor.to(x.device) for tensor in self.state)
        functional.update_range_(x, *self.state, BITS, "ema_minmax", 1, self.momentum)
        _finite(x, *self.state[:2])

    def range(self) -> tuple[float, float]:
        low, high, _ = self.state
        return low.item(), high.item()


class Histogram(Observer):
    """Counts in bins of equal width, from 0 to a power of two on either side.

    Where a batch exceeds it the power grows, and neighbouring bins become one. The range is that inside the
    extremes whose quantizer has the least squared error (the search of `functional.histogram_range`).
    """

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self.exponent = MIN_EXPONENT
        self.counts = torch.zeros(2, BINS, dtype=torch.int64)  # of values >= 0 and < 0, outward from 0

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self.exponent) / BINS

    def observe(self, x: torch.Tensor) -> None:
        low, high = _finite(x, *functional.minmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(self.high, -self.low))
        for part in x.reshape(-1).split(CHUNK):
            part = part.float()
            index = (part.abs() / self.width).long() + BINS * (part < 0)
            self.counts += torch.bincount(index, minlength=2 * BINS).reshape(2, BINS).cpu()

    def _grow(self, largest: float) -> None:
        exponent = math.frexp(largest)[1] if largest > 0 else MIN_EXPONENT  # largest < 2^exponent
        if exponent <= self.exponent:
            return
        merged = min(2 ** (exponent - self.exponent), BINS)
        counts = self.counts.reshape(2, -1, merged).sum(-1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[:, : counts.shape[1]] = counts
        self.exponent = exponent

    def range(self) -> tuple[float, float]:
        magnitudes = (torch.arange(BINS) + 0.5) * self.width
        filled = self.counts > 0
        counts, centers = self.counts[filled], torch.stack((magnitudes, -magnitudes))[filled]
        extremes = torch.tensor([self.low]), torch.tensor([self.high])
        low, high = least_error_range(counts.double()[None], centers[None], *extremes, torch.tensor(BITS))
        return low.item(), high.item()


class Percentile(Histogram):
    """[-c, c], cut to the extremes, where c is the upper edge of the bin that holds the percentile of |x|."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def range(self) -> tuple[float, float]:
        below = self.counts.sum(0).cumsum(0)
        rank = math.ceil(Fraction(str(self.percentile)) * int(below[-1]) / 100)
        clip = (int(torch.searchsorted(below, rank)) + 1) * self.width
        return max(self.low, -clip), min(self.high, clip)


def _finite(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[float, float]:
    """The extremes of x as numbers, after a check that x is finite."""
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        count = int((~x.isfinite()).sum())
        fail("input", "finite values", f"{count} of {x.numel()} NaN or infinite")
    return low.item(), high.item()
