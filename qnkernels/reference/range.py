"""Ranges of a tensor and the affine quantizer that a range defines."""

import torch

from .grouping import split_by_parameter

HISTOGRAM_BINS = 2048
SHRINK_STEPS = 64


def minmax(
    x: torch.Tensor, axis: int | None = None, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value, fp32: 0-d, [channels] along axis, or [.., groups]. NaN propagates."""
    low, high = torch.aminmax(split_by_parameter(x, axis, group_size), dim=-1)
    return low.float(), high.float()


def level_count(bits: torch.Tensor | int) -> torch.Tensor | float:
    """2^bits, exactly, in fp32 (exp2 and pow need not be exact)."""
    if isinstance(bits, int):
        return float(2**bits)
    return torch.bitwise_left_shift(torch.ones_like(bits), bits).float()


def nearest_code(value: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The integer from 0 to top nearest to a value, ties to even, never -0; NaN propagates."""
    return torch.minimum(torch.round(value).clamp(min=0.0), top) + 0.0


def quantization_parameters(
    low: torch.Tensor, high: torch.Tensor, bits: torch.Tensor | int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (fp32, integer valued) of the quantizer with 2^bits levels over [low, high].

    s = (high - low) / (2^bits - 1) and z = clamp(round(-low / s), 0, 2^bits - 1), after the range is
    widened to hold 0, so that 0 is a level. Symmetric: z = 2^(bits-1) and the range is widened so that
    -high and high fit: s = max(|low|, |high|) / (2^(bits-1) - 1). A range of width 0 gives s = 1.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    levels = torch.zeros_like(low) + level_count(bits)  # on a GPU, x / number is x * (1 / number) to torch
    if symmetric:
        bound = torch.maximum(-low, high)
        scale = bound / (levels / 2 - 1)
        scale = torch.where(scale != 0, scale, torch.ones_like(scale))
        return scale, levels / 2
    scale = (high - low) / (levels - 1)
    # a denormal width over many levels underflows to 0, too
    scale = torch.where(scale != 0, scale, torch.ones_like(scale))
    return scale, nearest_code(-low / scale, levels - 1)


def histogram_range(
    x: torch.Tensor, bits: torch.Tensor, axis: int | None = None, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range inside [min, max] whose 2^bits quantizer has the least squared error on a histogram of x.

    The histogram has 2048 bins over [min(x, 0), max(x, 0)]. Both ends are first shrunk together by
    k / 64, then the low end alone, then the high end alone; the best of each search starts the next.
    """
    elements = split_by_parameter(x, axis, group_size).float()
    shape = elements.shape[:-1]
    elements = elements.reshape(-1, elements.shape[-1])
    low, high = torch.aminmax(elements, dim=-1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    low, high = least_error_range(*_histogram(elements, low, high), low, high, bits)
    return low.reshape(shape), high.reshape(shape)


def least_error_range(
    counts: torch.Tensor,
    centers: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    bits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The search of `histogram_range`: counts (float64) and centers of bins [rows, bins], low <= 0 and
    high >= 0 [rows] -> low and high [rows].
    """
    shrink = 1 - torch.arange(SHRINK_STEPS, device=low.device, dtype=torch.float32) / SHRINK_STEPS
    for shrink_low, shrink_high in ((True, True), (True, False), (False, True)):
        best = torch.full_like(low, float("inf"), dtype=torch.float64)
        best_low, best_high = low, high
        for factor in shrink:
            new_low = low * factor if shrink_low else low
            new_high = high * factor if shrink_high else high
            error = _squared_error(counts, centers, new_low, new_high, bits)
            better = error < best
            best = torch.where(better, error, best)
            best_low = torch.where(better, new_low, best_low)
            best_high = torch.where(better, new_high, best_high)
        low, high = best_low, best_high
    return low, high


def _histogram(
    elements: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [rows, bins] as float64 and bin centres [rows, bins] of each row of elements [rows, n]."""
    width = (high - low) / HISTOGRAM_BINS
    width = torch.where(width > 0, width, torch.ones_like(width))[:, None]
    index = ((elements - low[:, None]) / width).nan_to_num(0.0).clamp(0, HISTOGRAM_BINS - 1).long()
    counts = torch.zeros(len(low), HISTOGRAM_BINS, dtype=torch.float64, device=low.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    return counts, low[:, None] + (torch.arange(HISTOGRAM_BINS, device=low.device) + 0.5) * width


def _squared_error(counts, centers, low, high, bits) -> torch.Tensor:
    """Sum of counts * (centre - quantized centre)^2 per row, float64 [rows]."""
    scale, zero_point = (value[:, None] for value in quantization_parameters(low, high, bits))
    codes = torch.minimum((centers / scale + zero_point).round().clamp(min=0), level_count(bits) - 1)
    return (counts * ((codes - zero_point) * scale - centers).double().square()).sum(-1)


OBSERVERS = ("minmax", "ema_minmax", "histogram")


def update_range_(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: torch.Tensor,
    observer: str,
    every: int,
    momentum: float,
    axis: int | None = None,
    group_size: int | None = None,
    *,
    minmax=minmax,
    histogram_range=histogram_range,
) -> None:
    """Count one forward in `step`; where it is due, refresh (low, high), all in place.

    Due: the first forward, and, for every > 0, each forward whose number is a multiple of `every`.
    "minmax" and "histogram" replace the range; "ema_minmax" moves it by `momentum` towards the new one
    (the first observation replaces it). `minmax` and `histogram_range` are the kernels to use.
    """
    now = int(step)
    step += 1
    if now != 0 and (every == 0 or now % every != 0):
        return
    if observer == "histogram":
        new_low, new_high = histogram_range(x, bits, axis, group_size)
    else:
        new_low, new_high = minmax(x, axis, group_size)
    if observer == "ema_minmax" and now != 0:
        new_low, new_high = low + (new_low - low) * momentum, high + (new_high - high) * momentum
    low.copy_(new_low)
    high.copy_(new_high)
