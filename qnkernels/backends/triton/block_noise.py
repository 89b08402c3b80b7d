"""Product-quantization noise: blocks of consecutive weights become zero, their mean, or a codeword."""

import torch
import triton
import triton.language as tl

from ...reference.philox import draw_bits, threshold
from . import launch
from .centroid_noise import centroid_noise
from .launch import cdiv, power_of_two
from .numeric import from_fp32, to_fp32
from .philox import noise_mask

# Weights of a tile, 16 per thread; at most this many columns of a block at a time.
TILE = 4096
COLUMNS = 512
WARPS = 8


@triton.jit
def _block_mean(weight_ptr, rows, width, inside):
    """Mean fp32 [ROWS] of the blocks that start at weight_ptr + rows, summed left to right."""
    total = to_fp32(tl.load(weight_ptr + rows, mask=inside))
    for i in range(1, width):
        total += to_fp32(tl.load(weight_ptr + rows + i, mask=inside))
    return tl.div_rn(total, tl.full([], width, tl.int32).to(tl.float32))


@triton.jit
def _add_columns(total, x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """total fp32 [ROWS] plus the columns of x [ROWS, COLS], one after another."""
    if COLS == 1:
        total += tl.reshape(x, [ROWS])
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLS // 2]), (0, 2, 1)))
        total = _add_columns(total, left, ROWS, COLS // 2)
        total = _add_columns(total, right, ROWS, COLS // 2)
    return total


@triton.jit
def _tile(
    weight_ptr,
    out_ptr,
    width,
    left,
    noised,
    factor,
    MEAN: tl.constexpr,
    KEPT: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    rows = row * width
    inside_row = None if FULL else row < left
    if MEAN and not KEPT:
        noise = _block_mean(weight_ptr, rows, width, inside_row)[:, None]
    for start in range(0, width, COLS):
        column = start + tl.arange(0, COLS)[None, :]
        offset = rows[:, None] + column
        inside = None if FULL else inside_row[:, None] & (column < width)
        x = to_fp32(tl.load(weight_ptr + offset, mask=inside))
        if KEPT:  # COLS is a power of two, whose reciprocal is exact; -0 changes nothing that is added to it
            total = _add_columns(tl.full([ROWS], -0.0, tl.float32), x, ROWS, COLS)
            noise = (total * (1.0 / COLS))[:, None]
        if MEAN:
            y = tl.where(noised, noise, x)
        else:
            y = tl.where(noised, 0.0, x * factor)
        tl.store(out_ptr + offset, from_fp32(y, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks", "threshold"])
def block_noise_kernel(
    weight_ptr,
    out_ptr,
    blocks,
    block_size,
    factor,
    threshold,
    seed_ptr,
    BITS: tl.constexpr,
    MEAN: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out_b = 0 or mean(w_b) where b is noised (noise_mask); elsewhere w_b * factor or, with MEAN, w_b.

    weight, out [blocks, block_size]. EXACT: block_size is COLS, known when compiled, which aligns the rows.
    Floor: bytes of weight + bytes of out per element.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = blocks - first
    noised = tl.reshape(noise_mask(first, seed_ptr, threshold, ROWS, BITS), [ROWS])[:, None]
    # a thread, or two next to each other, have the whole of a short block
    KEPT: tl.constexpr = MEAN and EXACT and COLS <= 8
    if EXACT:
        weight_ptr += first * COLS
        out_ptr += first * COLS
        if left >= ROWS:
            _tile(weight_ptr, out_ptr, COLS, left, noised, factor, MEAN, KEPT, True, ROWS, COLS)
        else:
            _tile(weight_ptr, out_ptr, COLS, left, noised, factor, MEAN, KEPT, False, ROWS, COLS)
    else:
        weight_ptr += first * block_size
        out_ptr += first * block_size
        _tile(weight_ptr, out_ptr, block_size, left, noised, factor, MEAN, False, False, ROWS, COLS)


def block_noise(weight, block_size, p, seed, kind, rescale, dtype=None, codebook=None):
    """Signature of reference.block_noise.block_noise; weight and codebook contiguous."""
    if kind == "centroid":
        return centroid_noise(weight, p, seed, dtype or weight.dtype, codebook)
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    blocks = weight.numel() // block_size
    factor = 1 / (1 - p) if kind == "zero" and rescale and p < 1 else 1.0
    columns = min(power_of_two(block_size), COLUMNS)
    rows, limit = max(TILE // columns, 8), threshold(p)
    launch.run(
        block_noise_kernel,
        (cdiv(blocks, rows),),
        *(weight, out, blocks, block_size, factor, limit, seed),
        **dict(
            BITS=draw_bits(limit),
            MEAN=kind == "mean",
            EXACT=block_size == columns,
            ROWS=rows,
            COLS=columns,
            num_warps=WARPS,
        ),
    )
    return out
