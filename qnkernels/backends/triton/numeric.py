"""Arithmetic shared by the kernels: fp32 inside, one rounding to the output dtype.

The interpreter truncates where it converts to bf16 and does not know bf16 products, so these helpers take
another way there; compiled kernels use the conversion instructions.
"""

import triton
import triton.language as tl

from .launch import INTERPRETED

SOFT: tl.constexpr = tl.constexpr(INTERPRETED)
ALL: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def to_fp32(x):
    """fp32, bf16 or fp16 -> fp32, exactly; of bf16 by a shift, past which LLVM moves no rounding to bf16."""
    if x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def from_fp32(x, dtype: tl.constexpr):
    """fp32 -> dtype, rounded to nearest, ties to even."""
    if SOFT and dtype == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        u = tl.where(x == x, tl.add(u, 0x7FFF + ((u >> 16) & 1), sanitize_overflow=False), 0x7FC00000)
        y = (u >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def largest_code(bits_ptr):
    """2^bits - 1 in fp32; bits int64 []."""
    one = tl.full([], 1, tl.int64)
    return (one << tl.load(bits_ptr)).to(tl.float32) - 1.0


@triton.jit
def nearest_code(x, scale, zero_point, top):
    """clamp(round(x / s + z), 0, top) with ties to even and NaN kept; div_rn, not /, which is approximate.

    Clamping first is the same, since 0 and top are integers, and leaves values below 2^22, which adding and
    subtracting 1.5 * 2^23 rounds to integers.
    """
    code = tl.div_rn(x, scale) + zero_point
    code = tl.minimum(tl.maximum(code, 0.0, propagate_nan=ALL), top, propagate_nan=ALL)
    return (code + 12582912.0) - 12582912.0


@triton.jit
def reciprocal_serves(scale, zero_point):
    """Whether scalars s and z, z a whole number, are what quotient_by_one is for; not if they are NaN."""
    whole = (zero_point + 12582912.0) - 12582912.0 == zero_point
    return (scale >= 2.0**-60) & (scale <= 2.0**40) & (tl.abs(zero_point) <= 65536.0) & whole


@triton.jit
def quotient_by_one(x, scale):
    """x / s rounded to nearest, with one division for all x; s in [2^-60, 2^40] and |x / s| <= 2^20.

    r + t is 1 / s to 46 bits, so q is off by less than a step, x - q * s is exact, and by Markstein's theorem
    (IBM J. Res. Dev. 34, 1990) adding r times it rounds to the quotient. Only |x| < 2^-100 may lose bits: its
    quotient is then any number below 2^-39, which no rounding to a level tells from another of its sign or 0.
    """
    if SOFT:  # fma rounds twice there
        q = tl.div_rn(x, scale)
    else:
        r = tl.div_rn(1.0, scale)
        t = tl.fma(r, -scale, 1.0) * r
        q = tl.fma(x, r, x * t)
        q = tl.fma(tl.fma(q, -scale, x), r, q)
    return q


@triton.jit
def at_levels_of_one(x, scale, zero_point, top):
    """(nearest_code(x, s, z, top) - z) * s for scalars s and z.

    x is clamped instead of its code, which never falls as x rises and is 0 and top at the two bounds.
    """
    if reciprocal_serves(scale, zero_point):
        x = tl.maximum(x, (0.0 - zero_point) * scale, propagate_nan=ALL)
        x = tl.minimum(x, (top - zero_point) * scale, propagate_nan=ALL)
        code = quotient_by_one(x, scale) + zero_point
        # the first sum is a whole number below 2^24, as is the second: their difference is exact
        y = ((code + 12582912.0) - (zero_point + 12582912.0)) * scale
    else:
        y = (nearest_code(x, scale, zero_point, top) - zero_point) * scale
    return y


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b with fp32 accumulation."""
    if SOFT:
        accumulator = tl.dot(to_fp32(a), to_fp32(b), accumulator, input_precision="ieee")
    else:
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def bf16_head(x):
    """fp32 x cut to its first 8 significant bits, as bf16, and what is left of it, exactly; 0 of infinity."""
    head = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return from_fp32(head, tl.bfloat16), tl.where(tl.abs(x) == float("inf"), 0.0, x - head)
