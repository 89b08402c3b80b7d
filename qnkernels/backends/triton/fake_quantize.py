"""Scalar quantization noise and its straight-through gradient: one pass over the weight."""

import torch
import triton
import triton.language as tl

from ...reference.fake_quantize import OUTSIDE_TILE
from ...reference.philox import draw_bits, threshold
from ..native import layout
from . import launch
from .launch import cdiv
from .numeric import at_levels_of_one, from_fp32, largest_code, nearest_code, to_fp32
from .philox import noise_mask

# Elements of a program: 16 per thread; 8 share one Philox call (128 at p = 0.5), and all what is scalar.
BLOCK = OUTSIDE_TILE
# 8 per thread of the gradient, whose 16 conditions would leave the registers.
BACKWARD_BLOCK = OUTSIDE_TILE // 2
WARPS = 4

# How elements find their scale (SPAN): one for all, per tile (BLOCK), per 8 consecutive ones, per element.
PER_TENSOR, PER_EIGHT, PER_ELEMENT = 0, 8, 1


@triton.jit
def quotient(remainder, offset, size, LIMIT: tl.constexpr):
    """(remainder + offset) // size, int32, for 0 <= remainder < size and int32 offsets in [0, LIMIT).

    Vector arithmetic stays in 32 bits: past the first multiple of size only numbers below LIMIT are left.
    """
    gap = tl.minimum(size - remainder, LIMIT).to(tl.int32)
    step = tl.minimum(size, LIMIT).to(tl.int32)
    return tl.where(offset < gap, 0, 1 + (offset - gap) // step)


@triton.jit
def quantizer(scale_ptr, zero_point_ptr, first, channels, inner, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Scale and zero point, at (i // inner) % channels, of the tile [BLOCK / 8, 8] from element `first` on.

    Shapes [], [BLOCK / 8, 1] or [BLOCK / 8, 8] by SPAN.
    """
    if SPAN == 0:
        index = 0
    elif SPAN == BLOCK:
        index = first // inner % channels
    else:
        offset = tl.arange(0, BLOCK // 8)[:, None] * 8
        if SPAN == 1:
            offset = offset + tl.arange(0, 8)[None, :]
        run = first // inner
        row = quotient(first - run * inner, offset, inner, BLOCK)
        channel = run % channels
        turns = quotient(channel, row, channels, BLOCK + 1)
        index = channel + row - turns * channels
    return tl.load(scale_ptr + index), tl.load(zero_point_ptr + index)


@triton.jit
def is_outside(x, scale, zero_point, top):
    return (x < (0.0 - zero_point) * scale) | (x > (top - zero_point) * scale)


@triton.jit
def _forward_tile(
    x_ptr,
    y_ptr,
    outside_ptr,
    n,
    first,
    scale_ptr,
    zero_point_ptr,
    channels,
    inner,
    bits_ptr,
    threshold,
    seed_ptr,
    DRAW: tl.constexpr,
    SPAN: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = None if FULL else offset < n - first
    x = to_fp32(tl.load(x_ptr + first + offset, mask=inside))
    scale, zero_point = quantizer(scale_ptr, zero_point_ptr, first, channels, inner, BLOCK, SPAN)
    top = largest_code(bits_ptr)
    if outside_ptr is not None:
        outside = is_outside(x, scale, zero_point, top)
        if not FULL:
            outside = outside & inside
        tl.store(outside_ptr + first // BLOCK, tl.max(outside.to(tl.uint8).reshape(BLOCK), 0))
    if SPAN == 0 or SPAN == BLOCK:
        y = at_levels_of_one(x, scale, zero_point, top)
    else:
        y = (nearest_code(x, scale, zero_point, top) - zero_point) * scale
    if DRAW:
        y = tl.where(noise_mask(first, seed_ptr, threshold, BLOCK, DRAW), y, x)
    tl.store(y_ptr + first + offset, from_fp32(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "channels", "inner", "threshold"])
def fake_quantize_kernel(
    x_ptr,
    y_ptr,
    outside_ptr,
    n,
    scale_ptr,
    zero_point_ptr,
    channels,
    inner,
    bits_ptr,
    threshold,
    seed_ptr,
    DRAW: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y_i = (clamp(round(x_i / s + z), 0, 2^bits - 1) - z) * s where i is noised (noise_mask), x_i elsewhere.

    x, y [n]; scale, zero_point fp32 [channels]. DRAW: bits of a draw, 0 if every element is noised.
    outside uint8 [tiles of BLOCK], if given: whether any element of the tile lies outside the range.
    Floor: bytes of x + bytes of y per element.
    """
    # n fixes the width of all index arithmetic: 32 bits, or 64 from 2^31 elements on
    first = tl.program_id(0).to(n.dtype) * BLOCK
    # a tile in the middle needs no mask: masks would break up its 16-byte accesses
    if n - first >= BLOCK:
        _forward_tile(
            x_ptr, y_ptr, outside_ptr, n, first, scale_ptr, zero_point_ptr, channels, inner, bits_ptr,
            threshold, seed_ptr, DRAW, SPAN, True, BLOCK,
        )  # fmt: skip
    else:
        _forward_tile(
            x_ptr, y_ptr, outside_ptr, n, first, scale_ptr, zero_point_ptr, channels, inner, bits_ptr,
            threshold, seed_ptr, DRAW, SPAN, False, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    n,
    first,
    scale_ptr,
    zero_point_ptr,
    channels,
    inner,
    bits_ptr,
    threshold,
    seed_ptr,
    DRAW: tl.constexpr,
    SPAN: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = None if FULL else offset < n - first
    x = to_fp32(tl.load(x_ptr + first + offset, mask=inside))
    if DRAW:
        noised = noise_mask(first, seed_ptr, threshold, BLOCK, DRAW)
    scale, zero_point = quantizer(scale_ptr, zero_point_ptr, first, channels, inner, BLOCK, SPAN)
    stopped = is_outside(x, scale, zero_point, largest_code(bits_ptr))
    if DRAW:
        stopped = noised & stopped
    dtype = grad_x_ptr.dtype.element_ty
    if grad_ptr is None:
        written = stopped if FULL else stopped & inside
        tl.store(grad_x_ptr + first + offset, tl.zeros_like(x).to(dtype), mask=written)
    else:
        grad = to_fp32(tl.load(grad_ptr + first + offset, mask=inside))
        tl.store(grad_x_ptr + first + offset, from_fp32(tl.where(stopped, 0.0, grad), dtype), mask=inside)


@triton.jit(do_not_specialize=["n", "channels", "inner", "threshold"])
def fake_quantize_backward_kernel(
    grad_x_ptr,
    grad_ptr,
    x_ptr,
    outside_ptr,
    n,
    scale_ptr,
    zero_point_ptr,
    channels,
    inner,
    bits_ptr,
    threshold,
    seed_ptr,
    DRAW: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """grad_x_i = 0 where i is noised and x_i is outside [-z s, (2^bits - 1 - z) s], grad_i elsewhere.

    grad, x, grad_x [n]; grad None: grad_x holds it. The mask is drawn again from the seed.
    outside uint8 [tiles of TILE], if given: as the forward found it.
    Floor: bytes of grad + x + grad_x per element; in place those of x and of what is stopped. Where a tile
    has nothing outside, those of grad + grad_x, and none in place.
    """
    first = tl.program_id(0).to(n.dtype) * BLOCK
    any_outside = 1
    if outside_ptr is not None:
        any_outside = tl.load(outside_ptr + first // TILE).to(tl.int32)
    if any_outside == 0:
        if grad_ptr is not None:
            offset = tl.arange(0, BLOCK)
            inside = offset < n - first
            grad = to_fp32(tl.load(grad_ptr + first + offset, mask=inside))
            tl.store(grad_x_ptr + first + offset, from_fp32(grad, grad_x_ptr.dtype.element_ty), mask=inside)
    elif n - first >= BLOCK:
        _backward_tile(
            grad_ptr, x_ptr, grad_x_ptr, n, first, scale_ptr, zero_point_ptr, channels, inner, bits_ptr,
            threshold, seed_ptr, DRAW, SPAN, True, BLOCK,
        )  # fmt: skip
    else:
        _backward_tile(
            grad_ptr, x_ptr, grad_x_ptr, n, first, scale_ptr, zero_point_ptr, channels, inner, bits_ptr,
            threshold, seed_ptr, DRAW, SPAN, False, BLOCK,
        )  # fmt: skip


def span(channels: int, inner: int, block: int) -> int:
    if channels == 1:
        return PER_TENSOR
    if inner % block == 0:
        return block
    return PER_EIGHT if inner % 8 == 0 else PER_ELEMENT


def fake_quantize(x, scale, zero_point, bits, p, seed, axis=None, group_size=None, dtype=None, outside=None):
    """Signature of reference.fake_quantize.fake_quantize; x, scale and zero_point contiguous."""
    limit, n = threshold(p), x.numel()
    if limit == 0 and outside is None:
        return x.to(dtype or x.dtype, copy=True)
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    _, channels, inner = layout(x, axis, group_size)
    launch.run(
        fake_quantize_kernel,
        (cdiv(n, BLOCK),),
        *(x, y, outside, n, scale, zero_point, channels, inner, bits, limit, seed),
        **dict(
            DRAW=draw_bits(limit) if limit < 65536 else 0,
            SPAN=span(channels, inner, BLOCK),
            BLOCK=BLOCK,
            num_warps=WARPS,
        ),
    )
    return y


def fake_quantize_backward(
    grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None, outside=None, out=None
):
    """Signature of reference.fake_quantize.fake_quantize_backward; all tensors contiguous."""
    limit, n = threshold(p), x.numel()
    in_place = out is grad
    grad_x = torch.empty_like(x) if out is None else out
    if limit == 0:
        return grad_x if in_place else grad_x.copy_(grad)
    _, channels, inner = layout(x, axis, group_size)
    launch.run(
        fake_quantize_backward_kernel,
        (cdiv(n, BACKWARD_BLOCK),),
        *(grad_x, None if in_place else grad, x, outside, n),
        *(scale, zero_point, channels, inner, bits, limit, seed),
        **dict(
            DRAW=draw_bits(limit) if limit < 65536 else 0,
            SPAN=span(channels, inner, BACKWARD_BLOCK),
            BLOCK=BACKWARD_BLOCK,
            TILE=OUTSIDE_TILE,
            num_warps=WARPS,
        ),
    )
    return grad_x
