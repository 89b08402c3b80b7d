"""The gradient of a linear layer over a packed integer weight in its input.

Weights as in packed.py. grad * scale is taken apart into bf16 pieces, and codes less their zero points are
exact in bf16, so that tensor cores multiply them as they are.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .launch import cdiv
from .numeric import bf16_head, dot, from_fp32, to_fp32
from .packed import FEW_ROWS, level, load_bytes, load_zero, split, tile_bytes, tile_of, unit, whole_bytes
from .parts import add_up, parts_of


@triton.jit
def _multiply_scaled(grad, w, total, PIECES: tl.constexpr):
    """total + grad @ w; grad fp32 in PIECES pieces; w fp32, integers of 8 bits and a sign."""
    w = from_fp32(w, tl.bfloat16)
    for _ in tl.static_range(PIECES - 1):
        piece, grad = bf16_head(grad)
        total = dot(piece, w, total, "ieee")
    return dot(from_fp32(grad, tl.bfloat16), w, total, "ieee")


@triton.jit(do_not_specialize=["m", "n", "groups", "group_units", "turns"])
def int_linear_backward_kernel(
    grad_ptr,
    weight_ptr,
    scale_ptr,
    zero_point_ptr,
    grad_x_ptr,
    m,
    n,
    groups,
    group_units,
    turns,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_x[p, i, l] = sum_j (grad[i, j] * s[j, g]) * (q[j, l] - z[j, g]), l in group g, fp32 accumulation.

    grad [m, n]; grad_x [parts, m, k]; the columns of a program lie in one group, group_units * UNIT bytes of
    a row. Each part p, program_id(1), sums over `turns` tiles of outputs j. grad * s is fp32, in PIECES
    pieces of bf16. Floor: weight once per BLOCK_M rows of grad, BITS / 8 bytes per weight element.
    """
    group_bytes = group_units * UNIT
    pitch = groups * group_bytes
    k = pitch * (8 // BITS)
    tiles = tl.cdiv(group_bytes, BLOCK)
    tile_m, tile_k = tile_of(tl.cdiv(m, BLOCK_M), groups * tiles)
    group = (tile_k // tiles).to(tl.int32)
    first = (tile_k % tiles).to(tl.int32) * BLOCK
    byte = first + tl.arange(0, BLOCK)
    first_row = tile_m * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    out = tl.arange(0, BLOCK_N)
    row_inside = row < m - first_row
    grad_ptr += first_row * n
    weight_ptr += group * group_bytes
    part = tl.program_id(1)
    total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    odd_total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    first_tile = part * turns
    for tile in range(first_tile, tl.minimum(first_tile + turns, tl.cdiv(n, BLOCK_N))):
        first_out = tile * BLOCK_N
        out_inside = out < n - first_out
        inside = row_inside[:, None] & out_inside[None, :]
        grad = to_fp32(
            tl.load(grad_ptr + first_out + row[:, None] * n + out[None, :], mask=inside, other=0.0)
        )
        slot = tl.cast(first_out, tl.int64) * groups + out * groups + group
        grad *= tl.load(scale_ptr + slot, mask=out_inside, other=0.0)[None, :]
        zero = load_zero(zero_point_ptr, slot, out_inside, BITS)[:, None]
        rows_ptr = weight_ptr + tl.cast(first_out, tl.int64) * pitch
        packed = load_bytes(rows_ptr, pitch, byte, out_inside, group_bytes, BLOCK_N)
        if BITS == 8:
            total = _multiply_scaled(grad, level(packed, zero), total, PIECES)
        else:
            total = _multiply_scaled(grad, level(packed & 15, zero), total, PIECES)
            odd_total = _multiply_scaled(grad, level(packed >> 4, zero), odd_total, PIECES)
    COLUMNS: tl.constexpr = BLOCK * 8 // BITS
    if BITS == 4:
        total = tl.reshape(tl.join(total, odd_total), [BLOCK_M, COLUMNS])
    column = first * (8 // BITS) + tl.arange(0, COLUMNS)
    inside = row_inside[:, None] & (column < group_bytes * (8 // BITS))[None, :]
    grad_x_ptr += (part * tl.cast(m, tl.int64) + first_row) * k + group * group_bytes * (8 // BITS)
    grad_x = from_fp32(total, grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + row[:, None] * k + column[None, :], grad_x, mask=inside)


def _tile(m: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, columns, warps, stages), BLOCK_N being what is summed over."""
    if m <= FEW_ROWS:
        return 16, 32, 128, 4, 4
    return 64, 32, 64 if dtype == torch.float32 else 128, 8, 3


def int_linear_backward(grad, weight, scale, zero_point, bits):
    """Signature of reference.int_linear.int_linear_backward; grad [m, n], all contiguous."""
    (m, n), groups = grad.shape, scale.shape[1]
    grad_x = grad.new_empty(m, weight.shape[1] * 8 // bits)
    if grad_x.numel() == 0:
        return grad_x
    weight, zero_point, bits = whole_bytes(weight, scale, zero_point, bits)
    group_bytes = weight.shape[1] // groups
    block_m, block_n, columns, warps, stages = _tile(m, grad.dtype)
    block = tile_bytes(group_bytes, columns, bits, 16)
    tiles = cdiv(m, block_m) * groups * cdiv(group_bytes, block)
    parts, turns = split(m, tiles, cdiv(n, block_n), grad.device)
    out, size = parts_of(grad_x, parts), unit(group_bytes)
    launch.run(
        int_linear_backward_kernel,
        (tiles, parts),
        *(grad, weight, scale, zero_point, out, m, n, groups, group_bytes // size, turns),
        # two pieces carry grad * s to 2^-16: more than a result of 16 bits shows
        **dict(BITS=bits, UNIT=size, PIECES=3 if grad.dtype == torch.float32 else 2),
        **dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK=block, num_warps=warps, num_stages=stages),
    )
    add_up(out, None, grad_x)
    return grad_x
