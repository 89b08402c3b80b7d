"""Tiles of a product-quantized weight, decoded as they are read.

Block b of row o of the weight is codebook[codes[o, b]]. Columns are taken in steps: BLOCKS whole blocks of
SUB >= d lanes each, the lanes past d idle, or, where a block is wider than a step, SUB columns of one block.
codes uint8 or uint16 [rows, n_blocks] in any strides; codebook [n_centroids, d] contiguous.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import cdiv, power_of_two


class Steps(NamedTuple):
    """How n_blocks blocks of d columns are cut into steps of BLOCKS * SUB columns."""

    count: int
    parts: int  # steps that a block takes
    constants: dict[str, int | bool]  # BLOCKS, SUB and EXACT, which says that SUB is d


def steps(n_blocks: int, d: int, columns: int) -> Steps:
    """Steps of `columns` columns, a power of two."""
    sub = min(power_of_two(d), columns)
    blocks = columns // sub
    parts = cdiv(d, sub)
    return Steps(cdiv(n_blocks, blocks) * parts, parts, dict(BLOCKS=blocks, SUB=sub, EXACT=sub == d))


@triton.jit
def column_count(n_blocks, d, SUB: tl.constexpr, EXACT: tl.constexpr):
    """n_blocks * d, known to be a multiple of SUB where it is: rows of x are then read in vector accesses."""
    return n_blocks * SUB if EXACT else n_blocks * d


@triton.jit
def step_columns(step, parts, n_blocks, d, BLOCKS: tl.constexpr, SUB: tl.constexpr, EXACT: tl.constexpr):
    """(column, inside) [BLOCKS * SUB] of a step: the columns of the weight, and which of them exist."""
    lane = tl.arange(0, BLOCKS * SUB)
    if EXACT:
        column = step * (BLOCKS * SUB) + lane
        inside = column < n_blocks * SUB
    else:
        block = step // parts * BLOCKS + lane // SUB
        within = step % parts * SUB + lane % SUB
        column = block * d + within
        inside = (block < n_blocks) & (within < d)
    return column, inside


@triton.jit
def step_codes(
    codes_ptr, row_stride, block_stride, row, row_inside, step, parts, n_blocks, BLOCKS: tl.constexpr
):
    """(codes int32, inside) [ROWS, BLOCKS] of a step, for the rows `row` from codes_ptr on."""
    first_block = step // parts * BLOCKS
    block = tl.arange(0, BLOCKS)
    inside = row_inside[:, None] & (block < n_blocks - first_block)[None, :]
    codes_ptr += tl.cast(first_block, tl.int64) * block_stride
    offset = row[:, None] * row_stride + block[None, :] * block_stride
    return tl.load(codes_ptr + offset, mask=inside, other=0).to(tl.int32), inside


@triton.jit
def step_weight(
    code,
    inside,
    codebook_ptr,
    n_centroids,
    step,
    parts,
    d,
    SUB: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Decoded weight [ROWS, BLOCKS, SUB] in the dtype of the codebook, 0 outside.

    A codeword is one vector access where its size is known. Codes past the codebook read its last codeword.
    """
    code = tl.minimum(code, n_centroids - 1)[:, :, None]
    within = step % parts * SUB + tl.arange(0, SUB)[None, None, :]
    if EXACT:
        offset = code * SUB + tl.arange(0, SUB)[None, None, :]
        mask = tl.broadcast_to(inside[:, :, None], offset.shape)
    else:
        offset = code * d + within
        mask = inside[:, :, None] & (within < d)
    return tl.load(codebook_ptr + offset, mask=mask, other=0.0)


@triton.jit
def as_matrix(w, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """w [ROWS, BLOCKS, SUB] as the operand [ROWS, COLUMNS] of a product.

    In 16 bits adding zero keeps Triton 3.6 from reshaping it in shared memory, where wgmma has no layout for
    short codewords ("Illegal shared layout").
    """
    w = tl.reshape(w, [ROWS, COLUMNS])
    if w.dtype.primitive_bitwidth == 16:
        w += 0.0
    return w
