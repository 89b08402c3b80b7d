"""Fake quantization over ranges that follow the data: of the tensor itself, or a moving average.

The quantizers of low-precision training (cyclic precision training, arXiv 2101.09868): gradients take the
range of each sample and stochastic rounding, activations that of each sample or a moving average.
"""

import torch

from .grouping import expand_to_elements
from .philox import draws
from .range import level_count, minmax, nearest_code, quantization_parameters, update_range_


def dynamic_fake_quantize(
    x: torch.Tensor,
    bits: torch.Tensor,
    seed: torch.Tensor,
    per_sample: bool,
    stochastic: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = (clamp(round(x / s + z), 0, 2^bits - 1) - z) * s over the range of x, or of each x[i] by itself.

    The range is widened to hold 0, which is a level. Stochastic: with t = x / s + z, floor(t) goes up by one
    with probability t - floor(t): where (draw + 0.5) / 2^16 is below it, draw being the 16 bits of the
    element under `seed`. What lies on a level stays there. All arithmetic is fp32, rounded once, to `dtype`.
    """
    axis = 0 if per_sample else None
    low, high = minmax(x, axis)
    scale, zero_point = quantization_parameters(low, high, bits)
    s = expand_to_elements(scale, x.shape, axis, None)
    z = expand_to_elements(zero_point, x.shape, axis, None)
    codes = x.float() / s + z
    if stochastic:
        whole = torch.floor(codes)
        up = draws(x.numel(), seed).reshape(x.shape).float() + 0.5 < (codes - whole) * 65536
        codes = whole + up
    codes = nearest_code(codes, level_count(bits) - 1)
    return ((codes - z) * s).to(dtype or x.dtype)


def moving_fake_quantize_(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: torch.Tensor,
    momentum: float,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Move (low, high) towards the range of x by `momentum`, count in `step`, and quantize x over the result.

    The first forward (step 0) takes the range of x. Returns y as fake_quantize at rate 1 gives it, with its
    scale and zero point.
    """
    update_range_(x, low, high, step, bits, "ema_minmax", 1, momentum, axis, group_size)
    scale, zero_point = quantization_parameters(low, high, bits)
    s = expand_to_elements(scale, x.shape, axis, group_size)
    z = expand_to_elements(zero_point, x.shape, axis, group_size)
    codes = nearest_code(x.float() / s + z, level_count(bits) - 1)
    return ((codes - z) * s).to(dtype or x.dtype), scale, zero_point
