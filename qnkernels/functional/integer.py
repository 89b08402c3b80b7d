"""Layers over packed integer weights."""

import torch

from .. import ops
from .arguments import fp32_tensor


def int_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    group_size: int | None = None,
) -> torch.Tensor:
    """y = x @ ((q - z) * s)^T + bias over a packed integer weight.

    x [..., in] fp32, bf16 or fp16; weight uint8 [out, in * bits / 8], unsigned codes, low bits first;
    scale fp32 and zero_point uint8 [out] or [out, in / group_size]; without a zero point
    z = 2^(bits - 1); bits 4 or 8. Returns [..., out] in the dtype of x, accumulated in fp32.
    Gradients flow to x and bias. Raises ValueError (shapes, bits, device) and TypeError (dtypes).
    """
    scale, zero_point = _by_group(weight, scale, zero_point, bits, group_size)
    return ops.int_linear.int_linear(x, weight, scale, zero_point, bias, bits)


def int_linear_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    group_size: int | None = None,
    x_scale: torch.Tensor | float | None = None,
    x_zero_point: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """int_linear in integer arithmetic: activations are quantized to 8 bits, too; the rest as int_linear.

    Without x_scale and x_zero_point each row of x has a range of its own, from its smallest to its largest
    value, widened to hold 0 ("dynamic"). With them, 0-d fp32 or plain numbers as from
    `quantization_parameters`, that quantizer serves all of x, and values outside its range are clamped
    ("static"). Products and sums over a group (or over up to 32,768 columns of it) are exact integers;
    y = sum * scale * x_scale + bias in fp32. A row with NaN, or (dynamic) infinity, gives NaN. Gradients
    flow to x, straight through the rounding but not from outside a given range, and to bias.
    """
    scale, zero_point = _by_group(weight, scale, zero_point, bits, group_size)
    if x_scale is not None:
        x_scale = fp32_tensor(x_scale, x.device)
    if x_zero_point is not None:
        x_zero_point = fp32_tensor(x_zero_point, x.device)
    arguments = (x, weight, scale, zero_point, bias, bits, x_scale, x_zero_point)
    return ops.int_linear.int_linear_quantized(*arguments)


def int_embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bits: int = 8,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of a packed integer table: indices [...] int64 -> [..., in] in `dtype`, else as int_linear."""
    scale, zero_point = _by_group(weight, scale, zero_point, bits, group_size)
    return ops.int_linear.int_embedding(indices, weight, scale, zero_point, bits, dtype)


def _by_group(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    group_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """scale and zero_point as [out, groups]."""
    if scale.dim() == 1:
        scale = scale[:, None]
    if zero_point is not None and zero_point.dim() == 1:
        zero_point = zero_point[:, None]
    if group_size is not None and weight.dim() == 2 and scale.dim() == 2:
        in_features, groups = weight.shape[1] * 8 // bits, scale.shape[1]
        if group_size < 1 or groups * group_size != in_features:
            raise ValueError(
                f"group_size: expected {in_features} inputs / {groups} groups of scale, got {group_size}"
            )
    return scale, zero_point
