"""Scalar quantization noise (Quant-Noise, arXiv 2004.07320, sections 3.1 and 4.2)."""

import torch

from .grouping import expand_to_elements
from .philox import noise_mask
from .range import level_count, nearest_code


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = (clamp(round(x / s + z), 0, 2^bits - 1) - z) * s where noised (rate p), x elsewhere.

    All arithmetic is fp32; the result is rounded once, to `dtype` (that of x by default).
    """
    s = expand_to_elements(scale, x.shape, axis, group_size)
    z = expand_to_elements(zero_point, x.shape, axis, group_size)
    codes = nearest_code(x.float() / s + z, level_count(bits) - 1)
    mask = noise_mask(x.numel(), p, seed).reshape(x.shape)
    return torch.where(mask, (codes - z) * s, x.float()).to(dtype or x.dtype)


def fake_quantize_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: torch.Tensor,
    p: float,
    seed: torch.Tensor,
    axis: int | None = None,
    group_size: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Straight-through gradient in the dtype of x: 0 where x is noised and outside
    [-z * s, (2^bits - 1 - z) * s], grad elsewhere. Written to `out` if given, which may be grad itself.
    """
    s = expand_to_elements(scale, x.shape, axis, group_size)
    z = expand_to_elements(zero_point, x.shape, axis, group_size)
    outside = (x.float() < (0.0 - z) * s) | (x.float() > (level_count(bits) - 1 - z) * s)
    stopped = noise_mask(x.numel(), p, seed).reshape(x.shape) & outside
    passed = grad.to(x.dtype).masked_fill(stopped, 0.0)
    return passed if out is None else out.copy_(passed)
