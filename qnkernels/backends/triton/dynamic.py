"""Fake quantization over the range of each sample, or a moving average, to the nearest or a random level."""

import torch
import triton
import triton.language as tl

from . import launch
from .fake_quantize import BLOCK, WARPS, fake_quantize, quantizer, span
from .launch import cdiv, power_of_two
from .minmax import refresh
from .numeric import (
    ALL,
    at_levels_of_one,
    from_fp32,
    largest_code,
    nearest_code,
    quotient_by_one,
    reciprocal_serves,
    to_fp32,
)
from .parameters import quantization_parameters
from .philox import draws
from .range import update_range_

# Elements of a sample that one program keeps in registers, 16 per thread, while it takes their range.
SAMPLE, SAMPLE_WARPS = 8192, 16


@triton.jit
def _lower(a, b):
    return tl.minimum(a, b, propagate_nan=ALL)


@triton.jit
def _higher(a, b):
    return tl.maximum(a, b, propagate_nan=ALL)


@triton.jit
def _at_random_levels(
    x, scale, zero_point, top, first_call, seed_ptr, ONE: tl.constexpr, CALLS: tl.constexpr
):
    """x fp32 [CALLS, 8], from element 8 * first_call on, at levels of quantizers whose ranges hold it.

    t = x / s + z rounded down, and up by one where (draw + 0.5) / 2^16 < t - floor(t). ONE: s and z scalars.
    """
    if ONE:
        if reciprocal_serves(scale, zero_point):
            code = quotient_by_one(x, scale)
        else:
            code = tl.div_rn(x, scale)
    else:
        code = tl.div_rn(x, tl.zeros_like(x) + scale)  # it does not broadcast
    code += zero_point
    nearest = (code + 12582912.0) - 12582912.0  # an integer; tl.floor would flush denormals
    whole = tl.where(code < nearest, nearest - 1.0, nearest)
    # as the last bits of a number from 128 to 129, the draw counts steps of 2^-16
    draw = (draws(first_call, seed_ptr, CALLS) | 0x43000000).to(tl.float32, bitcast=True)
    code = tl.where(draw - (128.0 - 2.0**-17) < code - whole, whole + 1.0, whole)
    code = tl.minimum(tl.maximum(code, 0.0, propagate_nan=ALL), top, propagate_nan=ALL)
    return (code - zero_point) * scale


@triton.jit(do_not_specialize=["inner"])
def sample_fake_quantize_kernel(
    x_ptr,
    y_ptr,
    inner,
    bits_ptr,
    seed_ptr,
    STOCHASTIC: tl.constexpr,
    EIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[i] = (code(x[i] / s + z) - z) * s over the range of x[i], widened to hold 0; a program per sample.

    x, y [samples, inner], BLOCK >= inner + 7: tiles start where a Philox call does. EIGHTS: inner is a
    multiple of 8, so that samples do, too, and BLOCK >= inner.
    Floor: bytes of x + bytes of y.
    """
    start = tl.program_id(0).to(tl.int64) * inner
    row = tl.arange(0, BLOCK // 8)[:, None] * 8
    offset = row + tl.arange(0, 8)[None, :]
    if EIGHTS:
        first = tl.multiple_of(start, 8)
        inside = row < inner
    else:
        first = start // 8 * 8
        before = (start - first).to(tl.int32)
        inside = (offset >= before) & (offset < before + inner)
    x = to_fp32(tl.load(x_ptr + first + offset, mask=inside, other=0.0))
    # the range holds 0, as do the places outside
    low = tl.minimum(tl.reduce(x, None, _lower), 0.0, propagate_nan=ALL)
    high = tl.maximum(tl.reduce(x, None, _higher), 0.0, propagate_nan=ALL)
    top = largest_code(bits_ptr)
    scale = tl.div_rn(high - low, top)
    scale = tl.where(scale == 0.0, 1.0, scale)
    zero_point = nearest_code(-low, scale, 0.0, top)
    if STOCHASTIC:
        y = _at_random_levels(x, scale, zero_point, top, first // 8, seed_ptr, True, BLOCK // 8)
    else:
        y = at_levels_of_one(x, scale, zero_point, top)
    tl.store(y_ptr + first + offset, from_fp32(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _random_tile(
    x_ptr,
    y_ptr,
    n,
    first,
    scale_ptr,
    zero_point_ptr,
    channels,
    inner,
    bits_ptr,
    seed_ptr,
    SPAN: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = None if FULL else offset < n - first
    x = to_fp32(tl.load(x_ptr + first + offset, mask=inside))
    scale, zero_point = quantizer(scale_ptr, zero_point_ptr, first, channels, inner, BLOCK, SPAN)
    top = largest_code(bits_ptr)
    ONE: tl.constexpr = SPAN == 0 or SPAN == BLOCK
    y = _at_random_levels(x, scale, zero_point, top, first // 8, seed_ptr, ONE, BLOCK // 8)
    tl.store(y_ptr + first + offset, from_fp32(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "channels", "inner"])
def random_fake_quantize_kernel(
    x_ptr,
    y_ptr,
    n,
    scale_ptr,
    zero_point_ptr,
    channels,
    inner,
    bits_ptr,
    seed_ptr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """fake_quantize_kernel to one of the two levels next to each element. Floor: bytes of x + bytes of y."""
    first = tl.program_id(0).to(n.dtype) * BLOCK
    if n - first >= BLOCK:
        _random_tile(
            x_ptr, y_ptr, n, first, scale_ptr, zero_point_ptr, channels, inner, bits_ptr, seed_ptr,
            SPAN, True, BLOCK,
        )  # fmt: skip
    else:
        _random_tile(
            x_ptr, y_ptr, n, first, scale_ptr, zero_point_ptr, channels, inner, bits_ptr, seed_ptr,
            SPAN, False, BLOCK,
        )  # fmt: skip


def dynamic_fake_quantize(x, bits, seed, per_sample, stochastic, dtype=None):
    """Signature of reference.dynamic.dynamic_fake_quantize; x contiguous and not empty.

    A sample of up to SAMPLE elements is read once; larger ones twice, by a kernel for the range and another.
    """
    samples, n, dtype = len(x) if per_sample else 1, x.numel(), dtype or x.dtype
    inner = n // samples
    eights = inner % 8 == 0
    needed = inner if eights else inner + 7
    if needed <= SAMPLE:
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        block = max(power_of_two(needed), 8)
        warps = max(1, min(SAMPLE_WARPS, block // 512))
        constants = dict(STOCHASTIC=stochastic, EIGHTS=eights, BLOCK=block, num_warps=warps)
        launch.run(sample_fake_quantize_kernel, (samples,), x, y, inner, bits, seed, **constants)
        return y
    rows = x.reshape(samples, inner)
    low, high = (torch.empty(samples, dtype=torch.float32, device=x.device) for _ in range(2))
    refresh(rows, low, high, 0, None)
    quantizers = quantization_parameters(low, high, bits)
    if not stochastic:
        return fake_quantize(rows, *quantizers, bits, 1.0, seed, 0, None, dtype).reshape(x.shape)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch.run(
        random_fake_quantize_kernel,
        (cdiv(n, BLOCK),),
        *(x, y, n, *quantizers, samples, inner, bits, seed),
        **dict(SPAN=span(samples, inner, BLOCK), BLOCK=BLOCK, num_warps=WARPS),
    )
    return y


def moving_fake_quantize_(x, low, high, step, bits, momentum, axis=None, group_size=None, dtype=None):
    """Signature of reference.dynamic.moving_fake_quantize_; x contiguous.

    x is read twice, since its range moves the one that it is quantized over; nothing waits for the device.
    """
    update_range_(x, low, high, step, bits, "ema_minmax", 1, momentum, axis, group_size)
    quantizers = quantization_parameters(low.contiguous(), high.contiguous(), bits)
    # every element is quantized: the seed is not read
    return fake_quantize(x, *quantizers, bits, 1.0, bits, axis, group_size, dtype), *quantizers
