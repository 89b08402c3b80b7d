"""Linear layers and embeddings over packed integer weights."""

import torch
import torch.nn.functional as F

from .range import quantization_parameters

EXACT_COLUMNS = 32768  # 255 * 255 * 32768 < 2^31


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [out, in] in [0, 2^bits) -> packed uint8 [out, in * bits / 8], low bits first."""
    if bits == 8:
        return codes.to(torch.uint8)
    pairs = codes.to(torch.uint8).reshape(codes.shape[0], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed uint8 [out, in * bits / 8] -> codes uint8 [out, in]."""
    if bits == 8:
        return weight
    return torch.stack((weight & 15, weight >> 4), dim=-1).reshape(weight.shape[0], 2 * weight.shape[1])


def quantize_weight(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int
) -> torch.Tensor:
    """Codes uint8 [out, in] = clamp(round(w / s + z), 0, 2^bits - 1) with scale, zero_point [out, groups]."""
    groups = weight.float().reshape(*scale.shape, -1)
    codes = torch.round(groups / scale[..., None] + zero_point[..., None]).clamp(0, 2**bits - 1)
    return codes.to(torch.uint8).reshape(weight.shape)


def dequantize_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """Packed weight [out, in * bits / 8], scale and zero_point [out, groups] -> fp32 (q - z) * s, [out, in].

    Without a zero point z = 2^(bits - 1).
    """
    codes = unpack(weight, bits).float()
    columns = codes.shape[1]
    codes = codes.reshape(*scale.shape, columns // scale.shape[1])
    z = 2.0 ** (bits - 1) if zero_point is None else zero_point.float()[..., None]
    return ((codes - z) * scale[..., None]).reshape(weight.shape[0], columns)


def int_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """y = x @ ((q - z) * s)^T + bias, fp32 accumulation, in the dtype of x. x [..., in] -> [..., out]."""
    decoded = dequantize_weight(weight, scale, zero_point, bits)
    return F.linear(x.float(), decoded, None if bias is None else bias.float()).to(x.dtype)


def quantize_rows(
    x: torch.Tensor, x_scale: torch.Tensor | None, x_zero_point: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """8-bit codes less their zero point, fp32 [rows, in], of x [rows, in]; scale and zero point [rows, 1].

    Without x_scale and x_zero_point (0-d) each row has a range of its own, as `quantization_parameters`
    makes it. The scale is NaN where a row has no finite quantizer: where it holds NaN or, without x_scale,
    infinity or a range beyond fp32.
    """
    x = x.float()
    if x_scale is None:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        scale, zero_point = quantization_parameters(low, high, 8)
        lost = ~scale.isfinite()
    else:
        scale, zero_point = x_scale.expand(len(x), 1), x_zero_point.expand(len(x), 1)
        lost = x.isnan().any(-1, keepdim=True)
    codes = torch.round(x / scale + zero_point).clamp(0, 255)
    shifted = (codes - zero_point).masked_fill(lost, 0.0)
    return shifted, scale.masked_fill(lost, float("nan")), zero_point


def int_linear_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    x_scale: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
) -> torch.Tensor:
    """int_linear with activations in 8 bits: x [rows, in] -> [rows, out] in the dtype of x.

    y = (sum over groups of fp32(acc) * scale) * x_scale + bias, in fp32, where acc is the exact integer sum
    of (x code - x zero point) * (weight code - zero point) over the columns of a group. A group of more than
    EXACT_COLUMNS is summed in pieces of so many, which fit 32-bit integers, as if each were a group.
    """
    codes, row_scale, _ = quantize_rows(x, x_scale, x_zero_point)
    ones, groups = torch.ones_like(scale), scale.shape[1]
    size = x.shape[1] // groups
    levels = dequantize_weight(weight, ones, zero_point, bits).double().reshape(len(weight), groups, size)
    codes = codes.double().reshape(len(x), groups, size)
    y = torch.zeros(len(x), len(weight), device=x.device)
    for group in range(groups):
        for start in range(0, size, EXACT_COLUMNS):
            piece = slice(start, start + EXACT_COLUMNS)
            exact = codes[:, group, piece] @ levels[:, group, piece].t()
            y = y + exact.float() * scale[:, group]
    y = y * row_scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def int_linear_backward(
    grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """grad_x = grad @ ((q - z) * s), fp32 sums, in the dtype of grad. grad [..., out] -> [..., in]."""
    return (grad.float() @ dequantize_weight(weight, scale, zero_point, bits)).to(grad.dtype)


def int_embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the decoded weight: indices [...] int64 -> [..., in] in `dtype`; only those rows are read."""
    rows = indices.reshape(-1)
    rows_zero_point = None if zero_point is None else zero_point[rows]
    decoded = dequantize_weight(weight[rows], scale[rows], rows_zero_point, bits)
    return decoded.reshape(*indices.shape, decoded.shape[1]).to(dtype)
