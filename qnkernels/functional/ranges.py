"""Ranges of tensors, and the quantizers over them."""

import torch

from .. import ops
from .arguments import bits_tensor


def minmax(
    x: torch.Tensor, axis: int | None = None, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of x, fp32: 0-d, [channels] along `axis`, or [.., groups] of a row."""
    return ops.range.minmax(x, axis, group_size)


def histogram_range(
    x: torch.Tensor, bits: int | torch.Tensor = 8, axis: int | None = None, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipping range of least squared error for a 2^bits quantizer, from a 2048-bin histogram of x.

    Shapes as for `minmax`.
    """
    return ops.range.histogram_range(x, bits_tensor(bits, x.device), axis, group_size)


def quantization_parameters(
    low: torch.Tensor, high: torch.Tensor, bits: int | torch.Tensor = 8, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (fp32, integer valued) of the 2^bits quantizer over each range [low, high].

    low, high: fp32 of any one shape, which the results have. The range is widened to hold 0, so that 0 is
    a level: s = (high - low) / (2^bits - 1), z = round(-low / s). symmetric: z = 2^(bits - 1), and -high
    and high fit. A range of width 0 gives s = 1.
    """
    return ops.range.quantization_parameters(low, high, bits_tensor(bits, low.device), symmetric)


def update_range_(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    observer: str = "minmax",
    every: int = 1,
    momentum: float = 0.1,
    axis: int | None = None,
    group_size: int | None = None,
) -> None:
    """Count a forward in `step` (0-d int64) and refresh the range (low, high) in place where it is due.

    Due: the first forward and, for every > 0, each forward whose number is a multiple of `every`. The
    decision is taken on the device, without a host sync. Observers: "minmax" and "histogram" replace
    the range, "ema_minmax" moves it by `momentum`.
    """
    bits = bits_tensor(bits, x.device)
    ops.range.update_range_(x, low, high, step, bits, observer, every, momentum, axis, group_size)
