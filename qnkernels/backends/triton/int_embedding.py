"""Rows of a packed integer table, decoded as they are read."""

import torch
import triton
import triton.language as tl

from . import launch
from .launch import cdiv, power_of_two
from .numeric import from_fp32
from .packed import level, load_zero, unit

# Columns of a tile, 8 per thread: at least what a warp takes, at most what four take.
COLUMNS = (256, 1024)


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
    byte = (tile * (BLOCK * BITS // 8) + tl.arange(0, BLOCK * BITS // 8))[None, :]
    code = tl.load(weight_ptr + row * pitch + byte, mask=byte < pitch, other=0)
    if BITS == 4:
        code = tl.reshape(tl.join(code & 15, code >> 4), [1, BLOCK])
    scale = tl.load(scale_ptr + slot, mask=inside, other=0.0)
    value = level(code, load_zero(zero_point_ptr, slot, inside, BITS)) * scale
    tl.store(out_ptr + token * k + column, from_fp32(value, out_ptr.dtype.element_ty), mask=inside)


def int_embedding(indices, weight, scale, zero_point, bits, dtype):
    """Signature of reference.int_linear.int_embedding; indices are clamped to the table."""
    rows, pitch = weight.shape
    k = pitch * 8 // bits
    if rows == 0 and indices.numel():
        raise IndexError("indices: expected none for an empty table")
    out = torch.empty((*indices.shape, k), dtype=dtype, device=indices.device)
    groups = scale.shape[1]
    size = unit(pitch)
    narrow, wide = COLUMNS
    block = min(max(power_of_two(k), narrow), wide)
    launch.run(
        int_embedding_kernel,
        (indices.numel(), cdiv(k, block)),
        *(indices, weight, scale, zero_point, out, rows, pitch // size, groups, k // groups),
        **dict(BITS=bits, UNIT=size, BLOCK=block),
        num_warps=block // narrow,
    )
    return out
