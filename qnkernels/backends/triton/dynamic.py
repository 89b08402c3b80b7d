"""Fake quantization over the range of each sample, or a moving average, to the nearest or a random level."""

import torch
import triton
import triton.language as tl

from . import launch
from .fake_quantize import BLOCK, WARPS, fake_quantize, quantizer, span
from .launch import cdiv, power_of_two
from .minmax import refresh
from .numeric import ALL, from_fp32, largest_code, nearest_code, to_fp32
from .parameters import quantization_parameters
from .philox import draws
from .range import update_range_

# Elements of a sample that one program keeps in registers, 32 per thread, while it takes their range.
SAMPLE, SAMPLE_WARPS = 8192, 8


@triton.jit
def _at_levels(
    x, scale, zero_point, top, first_call, seed_ptr, STOCHASTIC: tl.constexpr, CALLS: tl.constexpr
):
    """x fp32 [CALLS, 8], from element 8 * first_call on, at the levels of the quantizer.

    Stochastic: t = x / s + z rounded down, and up by one where (draw + 0.5) / 2^16 < t - floor(t).
    """
    if STOCHASTIC:
        code = tl.div_rn(x, scale) + zero_point
        nearest = (code + 12582912.0) - 12582912.0  # an integer; tl.floor would flush denormals
        whole = tl.where(code < nearest, nearest - 1.0, nearest)
        up = draws(first_call, seed_ptr, CALLS).to(tl.float32) + 0.5 < (code - whole) * 65536.0
        code = tl.where(up, whole + 1.0, whole)
        code = tl.minimum(tl.maximum(code, 0.0, propagate_nan=ALL), top, propagate_nan=ALL)
    else:
        code = nearest_code(x, scale, zero_point, top)
    return (code - zero_point) * scale


@triton.jit(do_not_specialize=["inner"])
def sample_fake_quantize_kernel(
    x_ptr, y_ptr, inner, bits_ptr, seed_ptr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr
):
    """y[i] = (code(x[i] / s + z) - z) * s over the range of x[i], widened to hold 0; a program per sample.

    x, y [samples, inner], BLOCK >= inner + 7: tiles start where a Philox call does.
    Floor: bytes of x + bytes of y.
    """
    start = tl.program_id(0).to(tl.int64) * inner
    first = start // 8 * 8
    offset = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    before = (start - first).to(tl.int32)
    inside = (offset >= before) & (offset < before + inner)
    x = to_fp32(tl.load(x_ptr + first + offset, mask=inside, other=0.0))
    # the range holds 0, as do the places outside; reductions drop NaN, so that is reduced on the side
    low = tl.min(tl.min(x, axis=1), axis=0)
    high = tl.max(tl.max(x, axis=1), axis=0)
    nan = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0) > 0
    low = tl.where(nan, float("nan"), tl.minimum(low, 0.0))
    high = tl.where(nan, float("nan"), tl.maximum(high, 0.0))
    top = largest_code(bits_ptr)
    scale = tl.div_rn(high - low, top)
    scale = tl.where(scale == 0.0, 1.0, scale)
    zero_point = nearest_code(-low, scale, 0.0, top)
    y = _at_levels(x, scale, zero_point, top, first // 8, seed_ptr, STOCHASTIC, BLOCK // 8)
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
    # a shape for the division, which broadcasts nothing
    scale, zero_point = tl.zeros_like(x) + scale, tl.zeros_like(x) + zero_point
    top = largest_code(bits_ptr)
    y = _at_levels(x, scale, zero_point, top, first // 8, seed_ptr, True, BLOCK // 8)
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
    if inner + 7 <= SAMPLE:
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        block = power_of_two(inner + 7)
        warps = max(1, min(SAMPLE_WARPS, block // 256))
        constants = dict(STOCHASTIC=stochastic, BLOCK=block, num_warps=warps)
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
        **dict(SPAN=span(samples, inner), BLOCK=BLOCK, num_warps=WARPS),
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
