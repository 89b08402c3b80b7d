"""Scalar quantization noise (Quant-Noise, arXiv 2004.07320, sections 3.1 and 4.2)."""

import torch
import torch.nn.functional as F

from .grouping import expand_to_elements
from .philox import noise_mask
from .range import level_count, nearest_code

OUTSIDE_TILE = 2048  # elements, in order, that share an element of `outside`


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
    outside: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (clamp(round(x / s + z), 0, 2^bits - 1) - z) * s where noised (rate p), x elsewhere.

    All arithmetic is fp32; the result is rounded once, to `dtype` (that of x by default).
    outside: uint8 [ceil(n / OUTSIDE_TILE)], if given, becomes 1 for the tiles of x in which any element,
    noised or not, lies outside [-z * s, (2^bits - 1 - z) * s], and 0 for the others.
    """
    s = expand_to_elements(scale, x.shape, axis, group_size)
    z = expand_to_elements(zero_point, x.shape, axis, group_size)
    codes = nearest_code(x.float() / s + z, level_count(bits) - 1)
    mask = noise_mask(x.numel(), p, seed).reshape(x.shape)
    if outside is not None and x.numel():
        elements = is_outside(x, s, z, bits).flatten()
        padded = F.pad(elements, (0, -x.numel() % OUTSIDE_TILE))
        outside.copy_(padded.view(-1, OUTSIDE_TILE).any(1))
    return torch.where(mask, (codes - z) * s, x.float()).to(dtype or x.dtype)


def is_outside(x: torch.Tensor, s: torch.Tensor, z: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Where x lies outside [-z * s, (2^bits - 1 - z) * s]; s and z per element."""
    return (x.float() < (0.0 - z) * s) | (x.float() > (level_count(bits) - 1 - z) * s)


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
    outside: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Straight-through gradient in the dtype of x: 0 where x is noised and outside
    [-z * s, (2^bits - 1 - z) * s], grad elsewhere. Written to `out` if given, which may be grad itself.
    outside: what fake_quantize found, or None; it changes no result, but spares reading x.
    """
    s = expand_to_elements(scale, x.shape, axis, group_size)
    z = expand_to_elements(zero_point, x.shape, axis, group_size)
    stopped = noise_mask(x.numel(), p, seed).reshape(x.shape) & is_outside(x, s, z, bits)
    passed = grad.to(x.dtype).masked_fill(stopped, 0.0)
    return passed if out is None else out.copy_(passed)
