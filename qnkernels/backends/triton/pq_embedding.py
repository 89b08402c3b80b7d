"""Product-quantized tables: rows decoded, and the gradient of their codebook."""

import torch
import triton
import triton.language as tl

from ..fixed_point import exponent_below, unscaled
from . import launch
from .fixed_point import copies, fixed_point
from .launch import cdiv, power_of_two
from .numeric import to_fp32
from .range import minmax

# Elements of a tile [blocks, d], 8 per thread, and blocks at most.
TILE = 1024
BLOCKS = 256
WARPS = 4


@triton.jit
def _codes(
    codes_ptr, indices_ptr, first, count, rows, n_blocks, row_stride, block_stride, BLOCKS: tl.constexpr
):
    """(codes int32, inside) [BLOCKS] of the blocks numbered from `first` on, of `count`, row after row.

    indices int64 names the rows of codes, clamped to the table; None: all of them in order.
    """
    first_row = first // n_blocks
    block = (first - first_row * n_blocks).to(tl.int32) + tl.arange(0, BLOCKS)
    inside = tl.arange(0, BLOCKS) < count - first
    row = first_row + block // n_blocks
    block = (block % n_blocks).to(tl.int64)
    if indices_ptr is not None:
        row = tl.minimum(tl.maximum(tl.load(indices_ptr + row, mask=inside, other=0), 0), rows - 1)
    code = tl.load(codes_ptr + row * row_stride + block * block_stride, mask=inside, other=0)
    return code.to(tl.int32), inside


@triton.jit(do_not_specialize=["count", "rows", "n_blocks", "n_centroids", "d"])
def pq_embedding_kernel(
    codes_ptr,
    indices_ptr,
    codebook_ptr,
    out_ptr,
    count,
    rows,
    n_blocks,
    row_stride,
    block_stride,
    n_centroids,
    d,
    BLOCKS: tl.constexpr,
    COLS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """out[t, b] = codebook[codes[r, b]], r = min(max(indices[t], 0), rows - 1) or, without indices, t.

    codebook [n_centroids, d]; out [count, d] with count = tokens * n_blocks. EXACT: d is COLS.
    Floor: bytes of out and of the codes read.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    strides = (row_stride, block_stride)
    code, inside = _codes(codes_ptr, indices_ptr, first, count, rows, n_blocks, *strides, BLOCKS)
    code = tl.minimum(code, n_centroids - 1)
    width = COLS if EXACT else d
    column = tl.arange(0, COLS)[None, :]
    block = tl.arange(0, BLOCKS)[:, None]
    mask = inside[:, None] & (column < width)
    value = tl.load(codebook_ptr + code[:, None] * width + column, mask=mask)
    tl.store(out_ptr + first * width + block * width + column, value, mask=mask)


@triton.jit(do_not_specialize=["count", "rows", "n_blocks", "n_centroids", "d", "copies"])
def pq_scatter_kernel(
    codes_ptr,
    indices_ptr,
    grad_ptr,
    sums_ptr,
    exponent_ptr,
    count,
    rows,
    n_blocks,
    row_stride,
    block_stride,
    n_centroids,
    d,
    copies,
    BLOCKS: tl.constexpr,
    COLS: tl.constexpr,
):
    """sums[codes[r, b]] += fixed(grad[t, b]), with r as in pq_embedding_kernel.

    grad [count, d]; sums int64 [copies, n_centroids, d], zeros at first; exponent int64 [].
    Floor: bytes of grad; one atomic per element.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    strides = (row_stride, block_stride)
    code, inside = _codes(codes_ptr, indices_ptr, first, count, rows, n_blocks, *strides, BLOCKS)
    column = tl.arange(0, COLS)[None, :]
    block = tl.arange(0, BLOCKS)[:, None]
    mask = (inside & (code < n_centroids))[:, None] & (column < d)
    grad = to_fp32(tl.load(grad_ptr + first * d + block * d + column, mask=mask, other=0.0))
    slot = (tl.program_id(0) % copies).to(tl.int64) * n_centroids * d + code[:, None] * d + column
    tl.atomic_add(sums_ptr + slot, fixed_point(grad, tl.load(exponent_ptr)), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["count", "n_blocks", "n_centroids", "copies"])
def pq_count_kernel(
    codes_ptr,
    counts_ptr,
    count,
    n_blocks,
    row_stride,
    block_stride,
    n_centroids,
    copies,
    BLOCKS: tl.constexpr,
):
    """counts[k] += the number of codes that are k; counts int64 [copies, n_centroids], zeros at first."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    strides = (row_stride, block_stride)
    code, inside = _codes(codes_ptr, None, first, count, 0, n_blocks, *strides, BLOCKS)
    slot = (tl.program_id(0) % copies).to(tl.int64) * n_centroids + code
    one = tl.full([BLOCKS], 1, tl.int64)
    tl.atomic_add(counts_ptr + slot, one, mask=inside & (code < n_centroids), sem="relaxed")


def block_counts(codes: torch.Tensor, n_centroids: int) -> torch.Tensor:
    """Blocks of each codeword, at least 1, int64 [n_centroids, 1]."""
    counts = torch.zeros(copies(n_centroids), n_centroids, dtype=torch.int64, device=codes.device)
    launch.run(
        pq_count_kernel,
        (cdiv(codes.numel(), TILE),),
        *(codes, counts, codes.numel(), codes.shape[1], *codes.stride(), n_centroids, len(counts)),
        **dict(BLOCKS=TILE, num_warps=WARPS),
    )
    return counts.sum(0).clamp(min=1)[:, None]


def _decode(indices, codes, codebook):
    """Rows [count, n_blocks * d] of the table that `indices` names; None: all."""
    (rows, n_blocks), (n_centroids, d) = codes.shape, codebook.shape
    tokens = rows if indices is None else indices.numel()
    if rows == 0 and tokens:
        raise IndexError("indices: expected none for an empty table")
    out = codebook.new_empty(tokens, n_blocks * d)
    columns = power_of_two(d)
    blocks, count = min(TILE // columns, BLOCKS), tokens * n_blocks
    launch.run(
        pq_embedding_kernel,
        (cdiv(count, blocks),),
        *(codes, indices, codebook, out, count, rows, n_blocks, *codes.stride(), n_centroids, d),
        **dict(BLOCKS=blocks, COLS=columns, EXACT=columns == d, num_warps=WARPS),
    )
    return out


def _scatter(grad, indices, codes, n_centroids, mean):
    """Sum or mean by codeword of the blocks of grad [count, n_blocks * d], float64 [n_centroids, d]."""
    rows, n_blocks = codes.shape
    d = grad.shape[1] // max(n_blocks, 1)
    entries = n_centroids * d
    if grad.numel() == 0:
        return grad.new_zeros(n_centroids, d, dtype=torch.float64)
    columns = power_of_two(d)
    blocks, count = min(TILE // columns, BLOCKS), grad.shape[0] * n_blocks
    low, high = minmax(grad)
    bound = torch.maximum(-low, high).double() * count
    exponent = exponent_below(bound)
    sums = torch.zeros(copies(entries), entries, dtype=torch.int64, device=grad.device)
    launch.run(
        pq_scatter_kernel,
        (cdiv(count, blocks),),
        *(codes, indices, grad, sums, exponent, count, rows, n_blocks, *codes.stride(), n_centroids, d),
        *(len(sums),),
        **dict(BLOCKS=blocks, COLS=columns, num_warps=WARPS),
    )
    total = unscaled(sums.sum(0), exponent, bound).view(n_centroids, d)
    return total / block_counts(codes, n_centroids) if mean else total


def pq_decode(codes, codebook):
    """Signature of reference.pq.pq_decode; codes in any strides, codebook contiguous."""
    return _decode(None, codes, codebook)


def pq_decode_backward(grad, codes, n_centroids, mean):
    """Signature of reference.pq.pq_decode_backward; grad contiguous."""
    return _scatter(grad, None, codes, n_centroids, mean).to(grad.dtype)


def pq_embedding(indices, codes, codebook):
    """Signature of reference.pq.pq_embedding; indices and codebook contiguous. Indices are clamped."""
    return _decode(indices, codes, codebook)


def pq_embedding_backward(grad, indices, codes, n_centroids, mean):
    """Signature of reference.pq.pq_embedding_backward; grad and indices contiguous."""
    return _scatter(grad, indices, codes, n_centroids, mean).float()
