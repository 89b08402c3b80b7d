"""Linear layers over packed integer weights, whose codes are decoded as they are read.

Weights as in packed.py. Codes less their zero points are exact in 16-bit floating point, so tensor cores
multiply them as they are, and a scale is applied to the sum over its group. fp32 operands are taken apart
into bf16 pieces, which are multiplied one by one: no bit is lost, as tf32 would lose some.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .launch import cdiv
from .numeric import bf16_head, dot, from_fp32
from .packed import (
    FEW_ROWS,
    ONE_GROUP,
    ONE_TILE,
    level,
    load_bytes,
    load_zero,
    split,
    tile_bytes,
    tile_of,
    unit,
    walk,
    whole_bytes,
)
from .parts import add_up, parts_of


@triton.jit
def _multiply(w, x, total):
    """total + w @ x^T; w fp32 [n, l], integers of 8 bits and a sign; x [m, l], fp32 in three pieces."""
    if x.dtype == tl.float32:
        w = from_fp32(w, tl.bfloat16)
        first, rest = bf16_head(x)
        second, third = bf16_head(rest)
        total = dot(w, tl.trans(from_fp32(third, tl.bfloat16)), total, "ieee")
        total = dot(w, tl.trans(second), total, "ieee")
        total = dot(w, tl.trans(first), total, "ieee")
    else:
        total = dot(from_fp32(w, x.dtype), tl.trans(x), total, "ieee")
    return total


@triton.jit
def _add(
    total,
    x_ptr,
    weight_ptr,
    zero,
    k,
    pitch,
    first,
    end,
    row_inside,
    out_inside,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total [BLOCK_N, BLOCK_M] + (q - z) @ x^T over BLOCK bytes of rows of weight, from byte `first` on.

    x_ptr and weight_ptr: the first column and byte of a group, which has `end` bytes, in the first row.
    """
    COLUMNS: tl.constexpr = BLOCK * 8 // BITS
    byte = first + tl.arange(0, BLOCK)
    packed = load_bytes(weight_ptr, pitch, byte, out_inside, end, BLOCK_N)
    column = first * (8 // BITS) + tl.arange(0, COLUMNS)
    inside = row_inside[:, None] & (column < end * (8 // BITS))[None, :]
    row = tl.arange(0, BLOCK_M)
    x = tl.load(x_ptr + row[:, None] * k + column[None, :], mask=inside, other=0.0)
    if BITS == 8:
        total = _multiply(level(packed, zero[:, None]), x, total)
    else:
        even, odd = tl.split(tl.reshape(x, [BLOCK_M, BLOCK, 2]))
        total = _multiply(level(packed & 15, zero[:, None]), even, total)
        total = _multiply(level(packed >> 4, zero[:, None]), odd, total)
    return total


@triton.jit(do_not_specialize=["m", "n", "groups", "group_units", "turns"])
def int_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_point_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    groups,
    group_units,
    turns,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    WALK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[p, i, j] = bias[j] + sum_g s[j, g] * sum_{l in g} x[i, l] * (q[j, l] - z[j, g]), fp32 accumulation.

    x [m, k]; y [parts, m, n]; bias fp32 [n] or None; a group is group_units * UNIT bytes of a row of weight.
    Each part p, program_id(1), takes `turns` tiles of the only group or `turns` groups.
    Floor: weight once per BLOCK_M rows of x, BITS / 8 bytes per weight element.
    """
    group_bytes = group_units * UNIT
    pitch = groups * group_bytes
    k = pitch * (8 // BITS)
    tile_m, tile_n = tile_of(tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N))
    first_row, first_out = tile_m * BLOCK_M, tile_n * BLOCK_N
    row = tl.arange(0, BLOCK_M)
    out = tl.arange(0, BLOCK_N)
    row_inside = row < m - first_row
    out_inside = out < n - first_out
    # bases are 64-bit scalars; inside a tile 32 bits are enough
    x_ptr += first_row * k
    weight_ptr += first_out * pitch
    first_slot = first_out * groups
    part = tl.program_id(1)
    if WALK == ONE_GROUP:
        first_group, last_group = 0, 1
        begin = part * turns * BLOCK
        end = tl.minimum(begin + turns * BLOCK, group_bytes)
    else:
        first_group = part * turns
        last_group = tl.minimum(first_group + turns, groups)
        begin, end = 0, group_bytes
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for group in range(first_group, last_group):
        slot = first_slot + out * groups + group
        zero = load_zero(zero_point_ptr, slot, out_inside, BITS)
        scale = tl.load(scale_ptr + slot, mask=out_inside, other=0.0)
        group_x, group_weight = x_ptr + group * group_bytes * (8 // BITS), weight_ptr + group * group_bytes
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if WALK == ONE_TILE:
            total = _add(
                total, group_x, group_weight, zero, k, pitch, 0, end, row_inside, out_inside,
                BITS, BLOCK_M, BLOCK_N, BLOCK,
            )  # fmt: skip
        else:
            for first in range(begin, end, BLOCK):
                total = _add(
                    total, group_x, group_weight, zero, k, pitch, first, end, row_inside, out_inside,
                    BITS, BLOCK_M, BLOCK_N, BLOCK,
                )  # fmt: skip
        y += total * scale[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first_out + out, mask=out_inside, other=0.0)[:, None]
    y = from_fp32(y, y_ptr.dtype.element_ty)
    y_ptr += (part * tl.cast(m, tl.int64) + first_row) * n + first_out
    tl.store(y_ptr + row[None, :] * n + out[:, None], y, mask=out_inside[:, None] & row_inside[None, :])


def _tile(m: int, dtype: torch.dtype, bits: int, groups: int, k: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, columns, warps, stages): few rows wait for memory, many for the tensor cores."""
    if dtype == torch.float32:
        return (16, 64, 64, 4, 3) if m <= FEW_ROWS else (64, 64, 32, 8, 2)
    if m <= FEW_ROWS:
        return 16, 64, 1024 // bits, 4, 4
    if groups == 1 and m > 64:
        return 128, 128, 64, 8, 2
    # groups of one tile each are a single loop, in which loads run ahead from one group to the next
    columns, stages = (128, 3) if groups > 1 and k <= 128 * groups else (64, 4)
    return (64, 64, columns, 4, stages) if m <= 64 else (64, 128, columns, 8, stages)


def int_linear(x, weight, scale, zero_point, bias, bits):
    """Signature of reference.int_linear.int_linear; x [m, k], all contiguous but bias."""
    m, (n, groups) = x.shape[0], scale.shape
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y
    weight, zero_point, bits = whole_bytes(weight, scale, zero_point, bits)
    bias = None if bias is None else bias.float().contiguous()
    group_bytes = weight.shape[1] // groups
    block_m, block_n, columns, warps, stages = _tile(m, x.dtype, bits, groups, x.shape[1])
    block = tile_bytes(group_bytes, columns, bits, 16)
    mode = walk(groups, group_bytes, block)
    tiles = cdiv(m, block_m) * cdiv(n, block_n)
    count = cdiv(group_bytes, block) if mode == ONE_GROUP.value else groups
    parts, turns = split(m, tiles, count, x.device)
    out, size = parts_of(y, parts), unit(group_bytes)
    launch.run(
        int_linear_kernel,
        (tiles, parts),
        *(x, weight, scale, zero_point, bias if parts == 1 else None, out),
        *(m, n, groups, group_bytes // size, turns),
        **dict(BITS=bits, UNIT=size, WALK=mode, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK=block),
        **dict(num_warps=warps, num_stages=stages),
    )
    add_up(out, bias, y)
    return y
