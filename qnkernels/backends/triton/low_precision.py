"""Operands of a linear layer that trains in low precision, and the gradient of its input."""

import torch
import triton
import triton.language as tl

from . import launch
from .dynamic import dynamic_fake_quantize
from .fake_quantize import BLOCK, WARPS
from .launch import cdiv
from .numeric import at_levels_of_one, from_fp32, largest_code, to_fp32
from .parameters import quantization_parameters
from .range import update_range_


@triton.jit
def _nearest_and_outside_tile(
    x_ptr, y_ptr, outside_ptr, left, scale, zero_point, top, FULL: tl.constexpr, BLOCK: tl.constexpr
):
    """The next min(left, BLOCK) elements."""
    row = tl.arange(0, BLOCK // 8)
    offset = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = None if FULL else offset < left
    x = to_fp32(tl.load(x_ptr + offset, mask=inside))
    y = at_levels_of_one(x, scale, zero_point, top)
    tl.store(y_ptr + offset, from_fp32(y, y_ptr.dtype.element_ty), mask=inside)
    stopped = (x < (0.0 - zero_point) * scale) | (x > (top - zero_point) * scale)
    if not FULL:
        stopped = stopped & inside
    bits = tl.sum(stopped.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(outside_ptr + row, bits.to(tl.uint8), mask=None if FULL else row * 8 < left)


@triton.jit(do_not_specialize=["n"])
def nearest_and_outside_kernel(
    x_ptr, y_ptr, outside_ptr, n, scale_ptr, zero_point_ptr, bits_ptr, BLOCK: tl.constexpr
):
    """y_i = (code(x_i / s + z) - z) * s; bit i % 8 of outside[i // 8]: x_i not in [-z s, (2^bits - 1 - z) s].

    x, y [n]. Floor: bytes of x + bytes of y + 1/8 per element.
    """
    first = tl.program_id(0).to(n.dtype) * BLOCK
    x_ptr += first
    y_ptr += first
    outside_ptr += first // 8
    scale, zero_point, top = tl.load(scale_ptr), tl.load(zero_point_ptr), largest_code(bits_ptr)
    if n - first >= BLOCK:
        _nearest_and_outside_tile(x_ptr, y_ptr, outside_ptr, n - first, scale, zero_point, top, True, BLOCK)
    else:
        _nearest_and_outside_tile(x_ptr, y_ptr, outside_ptr, n - first, scale, zero_point, top, False, BLOCK)


@triton.jit(do_not_specialize=["n"])
def stop_gradient_kernel(grad_ptr, outside_ptr, n, BLOCK: tl.constexpr):
    """grad_i = 0 where bit i % 8 of outside[i // 8] is set; grad [n]. Floor: 1/8 byte per element."""
    first = tl.program_id(0).to(n.dtype) * BLOCK
    row = tl.arange(0, BLOCK // 8)
    bits = tl.load(outside_ptr + first // 8 + row, mask=row * 8 < n - first, other=0).to(tl.int32)
    column = tl.arange(0, 8)[None, :]
    offset = row[:, None] * 8 + column
    stopped = ((bits[:, None] >> column) & 1) != 0
    zero = tl.zeros([BLOCK // 8, 8], tl.float32).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + first + offset, zero, mask=stopped & (offset < n - first))


def low_precision_operands_(x, weight, low, high, step, bits, momentum, moves, per_channel):
    """Signature of reference.low_precision.low_precision_operands_; x and weight contiguous, not empty."""
    if not moves:
        low, high, step = low.clone(), high.clone(), step.clone()
    update_range_(x, low, high, step, bits, "ema_minmax", int(moves), momentum)
    quantizer = quantization_parameters(low, high, bits)
    y, n = torch.empty_like(x), x.numel()
    outside = torch.empty(cdiv(n, 8), dtype=torch.uint8, device=x.device)
    arguments = (x, y, outside, n, *quantizer, bits)
    grid = (cdiv(n, BLOCK),)
    launch.run(nearest_and_outside_kernel, grid, *arguments, BLOCK=BLOCK, num_warps=WARPS)
    return y, outside, dynamic_fake_quantize(weight, bits, bits, per_channel, False, x.dtype)


def stop_gradient_(grad, outside):
    """Signature of reference.low_precision.stop_gradient_; grad contiguous."""
    grid = (cdiv(grad.numel(), BLOCK),)
    launch.run(stop_gradient_kernel, grid, grad, outside, grad.numel(), BLOCK=BLOCK, num_warps=WARPS)
