"""Quantization noise on weights."""

import torch

from .. import ops
from .arguments import bits_tensor, fp32_tensor, seed_tensor


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float,
    bits: int | torch.Tensor = 8,
    axis: int | None = None,
    group_size: int | None = None,
    p: float = 1.0,
    seed: int | torch.Tensor = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Quantization noise at rate p: y = (clamp(round(x / s + z), 0, 2^bits - 1) - z) * s where noised.

    x: fp32, bf16 or fp16, any shape. scale, zero_point: 0-d, [channels] along `axis`, or [.., groups]
    with `group_size` elements of a row each. bits: 2 to 16. The same seed noises the same elements on
    every backend. Returns the shape of x, in `dtype` (that of x by default).
    Gradient: straight-through; stopped where x is noised and outside [-z s, (2^bits - 1 - z) s].
    Source: Quant-Noise, arXiv 2004.07320, sections 3.1 and 4.2.
    Raises ValueError (shapes, p, bits, device) and TypeError (dtypes).
    """
    mark = torch.is_grad_enabled() and x.requires_grad
    y, _ = ops.fake_quantize.fake_quantize(
        x,
        fp32_tensor(scale, x.device),
        fp32_tensor(zero_point, x.device),
        bits_tensor(bits, x.device),
        p,
        seed_tensor(seed, x.device),
        axis,
        group_size,
        dtype,
        mark,
    )
    return y


def noisy_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float,
    bits: int | torch.Tensor = 8,
    axis: int | None = None,
    group_size: int | None = None,
    p: float = 1.0,
    seed: int | torch.Tensor = 0,
) -> torch.Tensor:
    """F.linear(x, fake_quantize(weight, ...), bias), with one pass over the weight's gradient less.

    x [..., in], weight [out, in] and bias [out] or None, all of one dtype; the rest as for fake_quantize.
    Returns [..., out]. Raises ValueError (shapes, p, bits, device) and TypeError (dtypes).
    """
    if x.dtype != weight.dtype:
        raise TypeError(f"x: expected the dtype of weight, {weight.dtype}, got {x.dtype}")
    device = weight.device
    scale, zero_point = fp32_tensor(scale, device), fp32_tensor(zero_point, device)
    quantizer = (scale, zero_point, bits_tensor(bits, device), p, seed_tensor(seed, device), axis, group_size)
    return ops.noisy_linear.noisy_linear(x, weight, bias, *quantizer)


def block_noise(
    weight: torch.Tensor,
    block_size: int,
    p: float,
    seed: int | torch.Tensor = 0,
    kind: str = "zero",
    rescale: bool = True,
    dtype: torch.dtype | None = None,
    codebook: torch.Tensor | None = None,
) -> torch.Tensor:
    """Noise blocks of `block_size` consecutive weights of weight [out, in] at rate p.

    kind "zero": noised blocks become 0 and, with `rescale`, the others are multiplied by 1 / (1 - p);
    "mean": noised blocks become their mean; "centroid": noised blocks become the nearest row (the lowest
    among equals) of codebook fp32 [K, block_size], K up to 65,536 and block_size up to 64.
    Returns [out, in] in `dtype` (that of weight by default).
    Gradient: straight-through (identity). Source: Quant-Noise, arXiv 2004.07320, section 4.2.
    Raises ValueError (shapes, p, block_size, kind, device) and TypeError (dtypes).
    """
    seed = seed_tensor(seed, weight.device)
    return ops.block_noise.block_noise(weight, block_size, p, seed, kind, rescale, dtype, codebook)


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to the values of a narrower `dtype`, in its own dtype; the gradient is straight-through."""
    return ops.rounding.round_to(x, dtype)
