"""Rows of activations in 8-bit codes, each row with a quantizer over its range or all with a given one."""

import torch
import triton
import triton.language as tl

from . import launch
from .numeric import ALL, nearest_code, to_fp32
from .packed import unit

# Elements of a row that a program quantizes at a time, 8 per thread.
BLOCK, WARPS = 2048, 8


@triton.jit
def _row_range(x_ptr, k, BLOCK: tl.constexpr):
    """(scale, zero point) over the range of a row, widened to hold 0; the scale is NaN where it has none."""
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for first in range(0, k, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = to_fp32(tl.load(x_ptr + column, mask=column < k, other=0.0))
        low = tl.minimum(low, x, propagate_nan=ALL)
        high = tl.maximum(high, x, propagate_nan=ALL)
    # reductions drop NaN, so whether there was one is reduced on the side
    nan = tl.max((low != low).to(tl.int32), axis=0) > 0
    low, high = tl.min(low, axis=0), tl.max(high, axis=0)
    scale = tl.div_rn(high - low, tl.zeros_like(low) + 255.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    zero_point = nearest_code(-low, scale, 0.0, 255.0)
    return tl.where(nan | (scale == float("inf")), float("nan"), scale), zero_point


@triton.jit(do_not_specialize=["k_units"])
def quantize_rows_kernel(
    x_ptr,
    x_scale_ptr,
    x_zero_point_ptr,
    codes_ptr,
    row_scale_ptr,
    row_zero_ptr,
    k_units,
    UNIT: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """codes = clamp(round(x / s + z), 0, 255) - 128; row_scale = s, NaN for a row without a quantizer;
    row_zero = z - 128.

    x [m, k], codes int8 [m, k], k = k_units * UNIT; row_scale fp32 and row_zero int32 [m]. s and z are read
    from x_scale and x_zero_point, fp32 [], or taken from the range of the row where those are None.
    PAIRS: even columns are stored before odd ones. Floor: bytes of x + 1 byte per element.
    """
    k = k_units * UNIT
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * k
    codes_ptr += row * k
    if x_scale_ptr is None:
        scale, zero_point = _row_range(x_ptr, k, BLOCK)
    else:
        scale, zero_point = tl.load(x_scale_ptr), tl.load(x_zero_point_ptr)
    lost = tl.zeros([BLOCK], tl.int32)
    for first in range(0, k, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = to_fp32(tl.load(x_ptr + column, mask=column < k, other=0.0))
        code = nearest_code(x, scale, zero_point, 255.0)
        lost |= ((code != code) & (column < k)).to(tl.int32)
        code = (tl.where(code == code, code, 0.0).to(tl.int32) - 128).to(tl.int8)
        if PAIRS:
            even, odd = tl.split(tl.reshape(code, [BLOCK // 2, 2]))
            pair = first // 2 + tl.arange(0, BLOCK // 2)
            tl.store(codes_ptr + pair, even, mask=pair < k // 2)
            tl.store(codes_ptr + k // 2 + pair, odd, mask=pair < k // 2)
        else:
            tl.store(codes_ptr + column, code, mask=column < k)
    has_none = (tl.max(lost, axis=0) > 0) | (scale != scale) | (zero_point != zero_point)
    tl.store(row_scale_ptr + row, tl.where(has_none, float("nan"), scale))
    tl.store(row_zero_ptr + row, tl.where(has_none, 0.0, zero_point).to(tl.int32) - 128)


def quantize_rows(x, x_scale, x_zero_point, pairs):
    """(codes, row_scale, row_zero) of quantize_rows_kernel; x [m, k] contiguous."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    row_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    row_zero = torch.empty(m, dtype=torch.int32, device=x.device)
    count = unit(k)
    launch.run(
        quantize_rows_kernel,
        (m,),
        *(x, x_scale, x_zero_point, codes, row_scale, row_zero, k // count),
        **dict(UNIT=count, PAIRS=pairs, BLOCK=BLOCK, num_warps=WARPS),
    )
    return codes, row_scale, row_zero
