"""Linear layers in integer arithmetic: rows of x become 8-bit codes, then one integer product.

Weights as in packed.py. Codes of x are stored less 128, int8 [m, k]; over 4-bit weights those of the even
columns of a row come first, then those of the odd ones, as the nibbles of a byte are taken apart.
"""

import torch
import triton
import triton.language as tl

from ...reference.int_linear import EXACT_COLUMNS
from . import launch
from .launch import cdiv
from .numeric import from_fp32
from .packed import (
    FEW_ROWS,
    ONE_GROUP,
    ONE_TILE,
    load_bytes,
    load_zero,
    split,
    tile_bytes,
    tile_of,
    unit,
    walk,
    whole_bytes,
)
from .quantize_rows import quantize_rows

SUM_BLOCK = 256
# Columns of ones that an operand is multiplied with for the sums of its rows: the least of a tensor core.
ONES: tl.constexpr = tl.constexpr(16)


@triton.jit
def _add(
    sums,
    codes_ptr,
    weight_ptr,
    zero,
    k,
    pitch,
    first,
    end,
    row_inside,
    out_inside,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums = (product [BLOCK_N, BLOCK_M], sums of w and, with OFFSET, of codes) + those of BLOCK bytes.

    codes_ptr and weight_ptr: the first byte of a group in the first row of the tile. w = q - 128 of 8 bits,
    q - zero of 4. The sums of rows are columns of a product with ones, which costs little beside the first.
    """
    total, out_sum, row_sum = sums
    byte = first + tl.arange(0, BLOCK)
    packed = load_bytes(weight_ptr, pitch, byte, out_inside, end, BLOCK_N)
    inside = row_inside[:, None] & (byte < end)[None, :]
    code_ptr = codes_ptr + tl.arange(0, BLOCK_M)[:, None] * k + byte[None, :]
    # w is not 0 from `end` on, but what it is multiplied with is
    ones = tl.broadcast_to((byte < end)[:, None], [BLOCK, ONES]).to(tl.int8)
    code = tl.load(code_ptr, mask=inside, other=0)
    if BITS == 8:
        w = (packed ^ 128).to(tl.int8, bitcast=True)
        if OFFSET:
            row_sum = tl.dot(code, ones, row_sum, out_dtype=tl.int32)
    else:
        odd = tl.load(code_ptr + k // 2, mask=inside, other=0)
        w = (packed >> 4).to(tl.int8) - zero[:, None].to(tl.int8)
        total = tl.dot(w, tl.trans(odd), total, out_dtype=tl.int32)
        out_sum = tl.dot(w, ones, out_sum, out_dtype=tl.int32)
        w = (packed & 15).to(tl.int8) - zero[:, None].to(tl.int8)
    total = tl.dot(w, tl.trans(code), total, out_dtype=tl.int32)
    out_sum = tl.dot(w, ones, out_sum, out_dtype=tl.int32)
    return total, out_sum, row_sum


@triton.jit(do_not_specialize=["m", "n", "groups", "group_units", "pieces", "turns"])
def int_linear_quantized_kernel(
    codes_ptr,
    row_scale_ptr,
    row_zero_ptr,
    weight_ptr,
    scale_ptr,
    zero_point_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    groups,
    group_units,
    pieces,
    turns,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    WALK: tl.constexpr,
    SPLIT: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[i, j] = (sum_g fp32(acc) * s[j, g]) * row_scale[i] + bias[j], acc the exact int32 sum over g of
    (codes[i, l] - row_zero[i]) * (q[j, l] - z[j, g]).

    codes int8 [m, k]; y [m, n]; bias fp32 [n] or None. A group, group_units * UNIT bytes of a row of weight,
    is taken in `pieces` pieces of PIECE bytes. Each part, program_id(1), takes `turns` tiles of the only
    piece or `turns` pieces. SPLIT: y is what the parts have, [parts, m, n]: int32 sums of the only piece,
    or fp32 sums over pieces, without row_scale and bias.
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
    codes_ptr += first_row * k
    weight_ptr += first_out * pitch
    first_slot = first_out * groups
    part = tl.program_id(1)
    OFFSET: tl.constexpr = BITS == 8 and zero_point_ptr is not None
    row_zero = tl.load(row_zero_ptr + first_row + row, mask=row_inside, other=0)
    INTEGER: tl.constexpr = SPLIT and WALK == ONE_GROUP
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
    if WALK == ONE_GROUP:
        first_piece, last_piece = 0, 1
    else:
        first_piece = part * turns
        last_piece = tl.minimum(first_piece + turns, groups * pieces)
    for piece in range(first_piece, last_piece):
        group = piece // pieces
        begin = piece % pieces * PIECE
        end = tl.minimum(begin + PIECE, group_bytes)
        if WALK == ONE_GROUP:
            begin = part * turns * BLOCK
            end = tl.minimum(begin + turns * BLOCK, group_bytes)
        slot = first_slot + out * groups + group
        zero = load_zero(zero_point_ptr, slot, out_inside, BITS)
        group_codes, group_weight = codes_ptr + group * group_bytes, weight_ptr + group * group_bytes
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
        out_sum = tl.zeros([BLOCK_N, ONES], tl.int32)
        row_sum = tl.zeros([BLOCK_M, ONES], tl.int32)
        if WALK == ONE_TILE:
            total, out_sum, row_sum = _add(
                (total, out_sum, row_sum), group_codes, group_weight, zero, k, pitch, 0, end,
                row_inside, out_inside, BITS, OFFSET, BLOCK_M, BLOCK_N, BLOCK,
            )  # fmt: skip
        else:
            for first in range(begin, end, BLOCK):
                total, out_sum, row_sum = _add(
                    (total, out_sum, row_sum), group_codes, group_weight, zero, k, pitch, first, end,
                    row_inside, out_inside, BITS, OFFSET, BLOCK_M, BLOCK_N, BLOCK,
                )  # fmt: skip
        # sum (c - a)(w - b) = sum cw - b sum c - a (sum w - size b); all terms are below 2^29 in size
        out_term = tl.max(out_sum, axis=1)
        if OFFSET:
            offset = zero - 128
            out_term -= (end - begin) * offset
            total -= offset[:, None] * tl.max(row_sum, axis=1)[None, :]
        total -= out_term[:, None] * row_zero[None, :]
        if INTEGER:
            y += total
        else:
            y += total.to(tl.float32) * tl.load(scale_ptr + slot, mask=out_inside, other=0.0)[:, None]
    if not SPLIT:
        y *= tl.load(row_scale_ptr + first_row + row, mask=row_inside, other=0.0)[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + first_out + out, mask=out_inside, other=0.0)[:, None]
        y = from_fp32(y, y_ptr.dtype.element_ty)
    y_ptr += (part * tl.cast(m, tl.int64) + first_row) * n + first_out
    tl.store(y_ptr + row[None, :] * n + out[:, None], y, mask=out_inside[:, None] & row_inside[None, :])


@triton.jit(do_not_specialize=["size", "n", "parts"])
def int_linear_quantized_sum_kernel(
    parts_ptr, row_scale_ptr, scale_ptr, bias_ptr, y_ptr, size, n, parts, BLOCK: tl.constexpr
):
    """y[i, j] = sum_p parts[p, i, j] * row_scale[i] + bias[j]; int32 parts are multiplied by s[j] first.

    parts [parts, size]; y [size], size = m * n; row_scale fp32 [m], scale and bias fp32 [n].
    Floor: 4 bytes per part and element.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.load(parts_ptr + index, mask=inside, other=0)
    for part in range(1, parts):
        total += tl.load(parts_ptr + part * tl.cast(size, tl.int64) + index, mask=inside, other=0)
    out = index % n
    if parts_ptr.dtype.element_ty == tl.int32:
        y = total.to(tl.float32) * tl.load(scale_ptr + out, mask=inside, other=0.0)
    else:
        y = total
    y *= tl.load(row_scale_ptr + index // n, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + out, mask=inside, other=0.0)
    tl.store(y_ptr + index, from_fp32(y, y_ptr.dtype.element_ty), mask=inside)


def _tile(m: int, bits: int, groups: int, group_bytes: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, columns, warps, stages): few rows wait for memory, many for the tensor cores. Over
    groups a program keeps fp32 sums besides the integers, and byte by byte addresses, too: registers bound
    its tile.
    """
    if m <= FEW_ROWS or (groups > 1 and unit(group_bytes) == 1):
        return 16, 64, 128, 4, 4
    if groups > 1:
        # groups of one tile each are a single loop, in which loads run ahead from one group to the next
        return 64, 128, 128 if group_bytes * 8 <= 128 * bits else 64, 8, 3
    return (64, 64, 128, 4, 3) if m <= 64 else (64, 128, 128, 8, 3)


def int_linear_quantized(x, weight, scale, zero_point, bias, bits, x_scale, x_zero_point):
    """Signature of reference.int_linear.int_linear_quantized; x [m, k], all contiguous but bias.

    With one group of up to EXACT_COLUMNS columns the result is the reference's to the bit.
    """
    m, (n, groups) = x.shape[0], scale.shape
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y
    weight, zero_point, bits = whole_bytes(weight, scale, zero_point, bits)
    bias = None if bias is None else bias.float().contiguous()
    group_bytes = weight.shape[1] // groups
    block_m, block_n, columns, warps, stages = _tile(m, bits, groups, group_bytes)
    block = tile_bytes(group_bytes, columns, bits, 32)
    piece = EXACT_COLUMNS * bits // 8
    pieces = max(cdiv(group_bytes, piece), 1)
    mode = walk(groups * pieces, group_bytes, block)
    tiles = cdiv(m, block_m) * cdiv(n, block_n)
    parts, turns = split(
        m, tiles, cdiv(group_bytes, block) if mode == ONE_GROUP.value else groups * pieces, x.device
    )
    sums = torch.int32 if mode == ONE_GROUP.value else torch.float32
    out = y if parts == 1 else torch.empty(parts, m, n, dtype=sums, device=x.device)
    codes, row_scale, row_zero = quantize_rows(x, x_scale, x_zero_point, bits == 4)
    count = unit(group_bytes)
    launch.run(
        int_linear_quantized_kernel,
        (tiles, parts),
        *(codes, row_scale, row_zero, weight, scale, zero_point, bias if parts == 1 else None, out),
        *(m, n, groups, group_bytes // count, pieces, turns),
        **dict(BITS=bits, UNIT=count, WALK=mode, SPLIT=parts > 1, PIECE=piece),
        **dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK=block, num_warps=warps, num_stages=stages),
    )
    if parts > 1:
        launch.run(
            int_linear_quantized_sum_kernel,
            (cdiv(m * n, SUM_BLOCK),),
            *(out, row_scale, scale, bias, y, m * n, n, parts),
            **dict(BLOCK=SUM_BLOCK, num_warps=4),
        )
    return y
