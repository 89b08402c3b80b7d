"""Linear layers and embeddings over packed integer weights: straightforward tiles, decoded as they are read.

weight uint8 [n, k * BITS / 8], low bits first; scale fp32 and zero_point uint8 [n, groups], or None for
z = 2^(BITS - 1). A group is k / groups consecutive columns.
"""

import torch
import triton
import triton.language as tl

from ...reference.int_linear import unpack
from . import launch
from .launch import cdiv, power_of_two
from .numeric import dot, from_fp32, to_fp32

# Columns of an embedding tile, 8 per thread: at least what a warp takes, at most what four take.
EMBEDDING_COLUMNS = (256, 1024)
# Groups of whole multiples of this many bytes are counted in them, so that loads are known to be aligned.
ALIGNMENT = 16


@triton.jit
def _codes(
    weight_ptr, pitch, first, end, row_inside, BITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Codes int32 [ROWS, COLS] of ROWS rows from weight_ptr on, from byte `first`; 0 at and after byte `end`.

    pitch: bytes of a row. Bytes are read once, side by side, and split into nibbles in registers.
    """
    byte = first + tl.arange(0, COLS * BITS // 8)
    inside = row_inside[:, None] & (byte < end)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    packed = tl.load(weight_ptr + row * pitch + byte[None, :], mask=inside, other=0)
    if BITS == 4:
        packed = tl.reshape(tl.join(packed & 15, packed >> 4), [ROWS, COLS])
    return packed.to(tl.int32)


@triton.jit
def _zero(zero_point_ptr, slot, inside, BITS: tl.constexpr):
    """Zero points int32 at `slot` of [n, groups]."""
    if zero_point_ptr is None:
        zero = tl.zeros_like(slot).to(tl.int32) + (1 << (BITS - 1))
    else:
        zero = tl.load(zero_point_ptr + slot, mask=inside, other=0).to(tl.int32)
    return zero


@triton.jit(do_not_specialize=["m", "n", "groups", "group_units"])
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
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[i, j] = bias[j] + sum_g s[j, g] * sum_{l in g} x[i, l] * (q[j, l] - z[j, g]), fp32 accumulation.

    x [m, k]; y [m, n]; bias fp32 [n] or None; a group is group_units * UNIT bytes of a row of weight.
    q - z is exact in the dtype of x, so 16-bit products are exact.
    Floor: weight once per BLOCK_M rows of x, BITS / 8 bytes per weight element.
    """
    group_bytes = group_units * UNIT
    group_size = group_bytes * (8 // BITS)
    pitch = groups * group_bytes
    k = groups * group_size
    tiles_n = tl.cdiv(n, BLOCK_N)
    first_row = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    first_out = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)
    out = tl.arange(0, BLOCK_N)
    row_inside = row < m - first_row
    out_inside = out < n - first_out
    # bases are 64-bit scalars; inside a tile 32 bits are enough
    x_ptr += first_row * k
    weight_ptr += first_out * pitch
    first_slot = first_out * groups
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(0, groups):
        slot = first_slot + out * groups + group
        zero = _zero(zero_point_ptr, slot, out_inside, BITS)
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for tile in range(0, tl.cdiv(group_size, BLOCK_K)):
            inner = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = row_inside[:, None] & (inner < group_size)[None, :]
            x = tl.load(
                x_ptr + row[:, None] * k + (group * group_size + inner)[None, :], mask=inside, other=0.0
            )
            first = group * group_bytes + tile * (BLOCK_K * BITS // 8)
            end = (group + 1) * group_bytes
            code = _codes(weight_ptr, pitch, first, end, out_inside, BITS, BLOCK_N, BLOCK_K)
            w = from_fp32((code - zero[:, None]).to(tl.float32), x.dtype)
            part = dot(x, tl.trans(w), part, "ieee")
        total += part * tl.load(scale_ptr + slot, mask=out_inside, other=0.0)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + first_out + out, mask=out_inside, other=0.0)[None, :]
    y = from_fp32(total, y_ptr.dtype.element_ty)
    y_ptr += first_row * n + first_out
    tl.store(y_ptr + row[:, None] * n + out[None, :], y, mask=row_inside[:, None] & out_inside[None, :])


@triton.jit(do_not_specialize=["m", "n", "groups", "group_units"])
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
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_x[i, l] = sum_j (grad[i, j] * s[j, g]) * (q[j, l] - z[j, g]), l in group g, fp32 accumulation.

    grad [m, n]; grad_x [m, k]; the columns of a program lie in one group, group_units * UNIT bytes of a row.
    grad * s is fp32, q - z an integer.
    Floor: weight once per BLOCK_M rows of grad, BITS / 8 bytes per weight element.
    """
    group_bytes = group_units * UNIT
    group_size = group_bytes * (8 // BITS)
    pitch = groups * group_bytes
    tiles = tl.cdiv(group_size, BLOCK_K)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    first_row = (tl.program_id(0) // (tiles * groups)).to(tl.int64) * BLOCK_M
    first = group * group_bytes + tile * (BLOCK_K * BITS // 8)
    end = (group + 1) * group_bytes
    row = tl.arange(0, BLOCK_M)
    out = tl.arange(0, BLOCK_N)
    row_inside = row < m - first_row
    grad_ptr += first_row * n
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first_out in range(0, n, BLOCK_N):
        out_inside = out < n - first_out
        inside = row_inside[:, None] & out_inside[None, :]
        grad = to_fp32(
            tl.load(grad_ptr + first_out + row[:, None] * n + out[None, :], mask=inside, other=0.0)
        )
        slot = tl.cast(first_out, tl.int64) * groups + out * groups + group
        grad *= tl.load(scale_ptr + slot, mask=out_inside, other=0.0)[None, :]
        rows_ptr = weight_ptr + tl.cast(first_out, tl.int64) * pitch
        code = _codes(rows_ptr, pitch, first, end, out_inside, BITS, BLOCK_N, BLOCK_K)
        zero = _zero(zero_point_ptr, slot, out_inside, BITS)
        total = dot(grad, (code - zero[:, None]).to(tl.float32), total, PRECISION)
    inner = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = row_inside[:, None] & (inner < group_size)[None, :]
    k = groups * group_size
    grad_x_ptr += first_row * k + group * group_size
    grad_x = from_fp32(total, grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + row[:, None] * k + inner[None, :], grad_x, mask=inside)


@triton.jit(do_not_specialize=["rows", "k_units", "groups", "group_size"])
def int_embedding_kernel(
    indices_ptr,
    weight_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    rows,
    k_units,
    groups,
    group_size,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t, l] = (q[r, l] - z[r, g(l)]) * s[r, g(l)], r = min(max(indices[t], 0), rows - 1), rounded once.

    indices int64 [count]; out [count, k]; the grid is (count, column tiles). Only those rows are read.
    Floor: BITS / 8 bytes of weight + bytes of out per element of out.
    """
    pitch = k_units * UNIT
    k = pitch * (8 // BITS)
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    row = tl.minimum(tl.maximum(tl.load(indices_ptr + token), 0), rows - 1)
    column = (tile * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = column < k
    slot = row * groups + column // group_size
    everywhere = tl.full([1], 1, tl.int1)
    code = _codes(
        weight_ptr + row * pitch, pitch, tile * (BLOCK * BITS // 8), pitch, everywhere, BITS, 1, BLOCK
    )
    scale = tl.load(scale_ptr + slot, mask=inside, other=0.0)
    value = (code - _zero(zero_point_ptr, slot, inside, BITS)).to(tl.float32) * scale
    tl.store(out_ptr + token * k + column, from_fp32(value, out_ptr.dtype.element_ty), mask=inside)


def _whole_bytes(weight, scale, zero_point, bits):
    """(weight, zero_point, bits) with groups of whole bytes: 4-bit groups of odd size become 8-bit ones."""
    if bits == 8 or weight.shape[1] % scale.shape[1] == 0:
        return weight, zero_point, bits
    if zero_point is None:
        zero_point = torch.full(scale.shape, 8, dtype=torch.uint8, device=scale.device)
    return unpack(weight, bits), zero_point, 8


def _unit(size: int) -> int:
    """The unit in which `size` bytes are counted."""
    return ALIGNMENT if size % ALIGNMENT == 0 else 1


def _rows(m: int) -> int:
    """Rows of a tile: 16, the least that a tensor core takes, for a few tokens, and 64."""
    return 16 if m <= 16 else 64


def int_linear(x, weight, scale, zero_point, bias, bits):
    """Signature of reference.int_linear.int_linear; x [m, k], all contiguous but bias."""
    m, (n, groups) = x.shape[0], scale.shape
    y = x.new_empty(m, n)
    weight, zero_point, bits = _whole_bytes(weight, scale, zero_point, bits)
    bias = None if bias is None else bias.float().contiguous()
    group_bytes = weight.shape[1] // groups
    unit = _unit(group_bytes)
    block_m = _rows(m)
    wide = 64 if block_m == 64 else 32  # few rows: more programs, to keep the memory busy
    # fp32 products are taken by plain threads, which keep their operands in registers
    block_n, block_k = (wide // 2, 16) if x.dtype == torch.float32 else (wide, 32)
    launch.run(
        int_linear_kernel,
        (cdiv(m, block_m) * cdiv(n, block_n),),
        *(x, weight, scale, zero_point, bias, y, m, n, groups, group_bytes // unit),
        **dict(BITS=bits, UNIT=unit, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k),
        num_warps=4 if block_m == 16 else 8,
    )
    return y


def int_linear_backward(grad, weight, scale, zero_point, bits):
    """Signature of reference.int_linear.int_linear_backward; grad [m, n], all contiguous."""
    (m, n), groups = grad.shape, scale.shape[1]
    k = weight.shape[1] * 8 // bits
    weight, zero_point, bits = _whole_bytes(weight, scale, zero_point, bits)
    grad_x = grad.new_empty(m, k)
    group_bytes = weight.shape[1] // groups
    unit = _unit(group_bytes)
    block_m = _rows(m)
    block_k = 32 if k // groups > 16 else 16
    # q - z is exact in tf32, and three tf32 products carry 21 bits of grad * s: more than 16 bits can show
    precision = "ieee" if grad.dtype == torch.float32 else "tf32x3"
    launch.run(
        int_linear_backward_kernel,
        (cdiv(m, block_m) * groups * cdiv(k // groups, block_k),),
        *(grad, weight, scale, zero_point, grad_x, m, n, groups, group_bytes // unit),
        **dict(BITS=bits, UNIT=unit, PRECISION=precision, BLOCK_M=block_m, BLOCK_N=32, BLOCK_K=block_k),
        num_warps=4 if block_m == 16 else 8,
    )
    return grad_x


def int_embedding(indices, weight, scale, zero_point, bits, dtype):
    """Signature of reference.int_linear.int_embedding; indices are clamped to the table."""
    rows, pitch = weight.shape
    k = pitch * 8 // bits
    if rows == 0 and indices.numel():
        raise IndexError("indices: expected none for an empty table")
    out = torch.empty((*indices.shape, k), dtype=dtype, device=indices.device)
    groups = scale.shape[1]
    unit = _unit(pitch)
    narrow, wide = EMBEDDING_COLUMNS
    block = min(max(power_of_two(k), narrow), wide)
    launch.run(
        int_embedding_kernel,
        (indices.numel(), cdiv(k, block)),
        *(indices, weight, scale, zero_point, out, rows, pitch // unit, groups, k // groups),
        **dict(BITS=bits, UNIT=unit, BLOCK=block),
        num_warps=block // narrow,
    )
    return out
