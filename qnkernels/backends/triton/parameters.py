"""quantization_parameters: scale and zero point of the quantizers over given ranges."""

import torch
import triton
import triton.language as tl

from . import launch
from .launch import cdiv
from .numeric import ALL, largest_code, nearest_code

BLOCK = 256


@triton.jit(do_not_specialize=["n"])
def quantization_parameters_kernel(
    low_ptr, high_ptr, n, bits_ptr, scale_ptr, zero_point_ptr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr
):
    """s = (high - low) / (2^bits - 1), z = clamp(round(-low / s), 0, 2^bits - 1), the range holding 0.

    SYMMETRIC: z = 2^(bits - 1), s = max(-low, high) / (z - 1). s = 0 becomes 1. All fp32 [n].
    Floor: 8 bytes read and 8 written per range.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    low = tl.minimum(tl.load(low_ptr + index, mask=inside, other=0.0), 0.0, propagate_nan=ALL)
    high = tl.maximum(tl.load(high_ptr + index, mask=inside, other=0.0), 0.0, propagate_nan=ALL)
    top = largest_code(bits_ptr)
    if SYMMETRIC:
        half = (top + 1.0) * 0.5  # the operator / is approximate
        bound = tl.maximum(-low, high, propagate_nan=ALL)
        scale = tl.div_rn(bound, tl.zeros_like(bound) + (half - 1.0))
        scale = tl.where(scale == 0.0, 1.0, scale)
        zero_point = tl.zeros_like(scale) + half
    else:
        scale = tl.div_rn(high - low, tl.zeros_like(low) + top)
        scale = tl.where(scale == 0.0, 1.0, scale)
        zero_point = nearest_code(-low, scale, 0.0, top)
    tl.store(scale_ptr + index, scale, mask=inside)
    tl.store(zero_point_ptr + index, zero_point, mask=inside)


def quantization_parameters(low, high, bits, symmetric=False):
    """Signature of reference.range.quantization_parameters; low and high contiguous, bits a 0-d tensor."""
    scale, zero_point = torch.empty_like(low), torch.empty_like(low)
    n = low.numel()
    launch.run(
        quantization_parameters_kernel,
        (cdiv(n, BLOCK),),
        *(low, high, n, bits, scale, zero_point),
        **dict(SYMMETRIC=symmetric, BLOCK=BLOCK, num_warps=4),
    )
    return scale, zero_point
