"""y = x @ W^T + bias over a product-quantized weight, decoded into tiles or, for few rows, on the fly."""

import torch
import triton
import triton.language as tl

from . import launch
from .decode import as_matrix, column_count, step_codes, step_columns, step_weight, steps
from .launch import cdiv
from .numeric import dot, from_fp32, to_fp32

# Rows of x that are multiplied as codewords are read; more go through tiles.
FEW_ROWS = 4
# Programs that a multiprocessor has to hold before the columns are no longer split: those of few rows wait
# for memory, those of many fill it with one.
PROGRAMS, PROGRAMS_OF_TILES = 4, 1
SUM_BLOCK = 256


@triton.jit(do_not_specialize=["m", "n_blocks", "d", "n_centroids", "steps", "parts"])
def pq_linear_kernel(
    x_ptr,
    codes_ptr,
    codebook_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    n_blocks,
    d,
    n_centroids,
    row_stride,
    block_stride,
    steps,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    SUB: tl.constexpr,
    EXACT: tl.constexpr,
):
    """y[s, i, j] = bias[j] + sum over the steps of split s of x[i, l] * W[j, l], fp32 accumulation.

    x [m, n_blocks * d]; codes [n, n_blocks], codebook [n_centroids, d] in the dtype of x; bias fp32 [n] or
    None; y [splits, m, n]; the grid is (tiles, splits).
    Floor: codes once per BLOCK_M rows of x; one access of a codeword per code read.
    """
    k = column_count(n_blocks, d, SUB, EXACT)
    tiles_n = tl.cdiv(n, BLOCK_N)
    first_row = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    first_out = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)
    out = tl.arange(0, BLOCK_N)
    row_inside = row < m - first_row
    out_inside = out < n - first_out
    # bases are 64-bit scalars; inside a tile 32 bits are enough
    x_ptr += first_row * k
    codes_ptr += first_out * row_stride
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.program_id(1), steps, tl.num_programs(1)):
        column, column_inside = step_columns(step, parts, n_blocks, d, BLOCKS, SUB, EXACT)
        inside = row_inside[:, None] & column_inside[None, :]
        x = tl.load(x_ptr + row[:, None] * k + column[None, :], mask=inside, other=0.0)
        code, known = step_codes(
            codes_ptr, row_stride, block_stride, out, out_inside, step, parts, n_blocks, BLOCKS
        )
        w = step_weight(code, known, codebook_ptr, n_centroids, step, parts, d, SUB, EXACT)
        total = dot(x, tl.trans(as_matrix(w, BLOCK_N, BLOCKS * SUB)), total, "ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + first_out + out, mask=out_inside, other=0.0)[None, :]
    y_ptr += (tl.program_id(1) * tl.cast(m, tl.int64) + first_row) * n + first_out
    y = from_fp32(total, y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * n + out[None, :], y, mask=row_inside[:, None] & out_inside[None, :])


@triton.jit(do_not_specialize=["n", "n_blocks", "d", "n_centroids", "steps", "parts"])
def pq_linear_few_kernel(
    x_ptr,
    codes_ptr,
    codebook_ptr,
    bias_ptr,
    y_ptr,
    n,
    n_blocks,
    d,
    n_centroids,
    row_stride,
    block_stride,
    steps,
    parts,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    SUB: tl.constexpr,
    EXACT: tl.constexpr,
):
    """As pq_linear_kernel, for M rows of x. Each lane keeps M sums, added up across lanes once at the end.

    Floor: bytes of codes; one access of a codeword and M of x per code.
    """
    k = column_count(n_blocks, d, SUB, EXACT)
    first_out = tl.program_id(0).to(tl.int64) * BLOCK_N
    out = tl.arange(0, BLOCK_N)
    out_inside = out < n - first_out
    codes_ptr += first_out * row_stride
    total = ()
    for _ in tl.static_range(M):
        total = total + (tl.zeros([BLOCK_N, BLOCKS, SUB], tl.float32),)  # noqa: RUF005 (no unpacking here)
    for step in range(tl.program_id(1), steps, tl.num_programs(1)):
        code, known = step_codes(
            codes_ptr, row_stride, block_stride, out, out_inside, step, parts, n_blocks, BLOCKS
        )
        w = to_fp32(step_weight(code, known, codebook_ptr, n_centroids, step, parts, d, SUB, EXACT))
        block = step // parts * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
        within = step % parts * SUB + tl.arange(0, SUB)[None, None, :]
        if EXACT:
            column = block * SUB + tl.arange(0, SUB)[None, None, :]
            inside = block < n_blocks
        else:
            column = block * d + within
            inside = (block < n_blocks) & (within < d)
        # repeated for every row, so that x is read in the layout of w
        column = tl.broadcast_to(column, [BLOCK_N, BLOCKS, SUB])
        inside = tl.broadcast_to(inside, [BLOCK_N, BLOCKS, SUB])
        sums = ()
        for i in tl.static_range(M):
            x = to_fp32(tl.load(x_ptr + i * k + column, mask=inside, other=0.0))
            sums = sums + (tl.fma(x, w, total[i]),)  # noqa: RUF005
        total = sums
    for i in tl.static_range(M):
        y = tl.sum(tl.sum(total[i], axis=2), axis=1)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + first_out + out, mask=out_inside, other=0.0)
        row = tl.program_id(1).to(tl.int64) * M + i
        tl.store(y_ptr + row * n + first_out + out, from_fp32(y, y_ptr.dtype.element_ty), mask=out_inside)


@triton.jit(do_not_specialize=["size", "n", "splits"])
def pq_linear_sum_kernel(parts_ptr, bias_ptr, y_ptr, size, n, splits, BLOCK: tl.constexpr):
    """y[i] = sum_s parts[s, i] + bias[i % n], in the order of s. parts fp32 [splits, size]; y [size]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.load(parts_ptr + i, mask=inside)
    for split in range(1, splits):
        total += tl.load(parts_ptr + split * size + i, mask=inside)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + i % n, mask=inside)
    tl.store(y_ptr + i, from_fp32(total, y_ptr.dtype.element_ty), mask=inside)


def _tile(m: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, columns, warps) for more than FEW_ROWS rows."""
    if dtype == torch.float32:  # products by plain threads, which keep their operands in registers
        return (16, 32, 16, 4) if m <= 16 else (64, 32, 16, 8)
    if m <= 16:
        return 16, 32, 64, 4
    return (64, 64, 32, 4) if m <= 64 else (128, 64, 32, 8)


def _splits(m: int, tiles: int, count: int, device: torch.device) -> int:
    """Parts that `count` steps are divided into, so that few tiles still fill the GPU."""
    programs = (PROGRAMS if m <= 16 else PROGRAMS_OF_TILES) * launch.processors(device)
    return max(min(programs // tiles, cdiv(count, 2)), 1)


def pq_linear(x, codes, codebook, bias):
    """Signature of reference.pq.pq_linear; x and codebook contiguous, codes in any strides. The codebook is
    rounded to the dtype of x.
    """
    m, (n, n_blocks), (n_centroids, d) = x.shape[0], codes.shape, codebook.shape
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y
    codebook = codebook.to(x.dtype)
    bias = None if bias is None else bias.float().contiguous()
    few = m <= FEW_ROWS
    block_m, block_n, columns, warps = (m, 16, 128, 4) if few else _tile(m, x.dtype)
    count, parts, constants = steps(n_blocks, d, columns)
    tiles = cdiv(m, block_m) * cdiv(n, block_n)
    splits = _splits(m, tiles, count, x.device)
    out = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    tensors = (x, codes, codebook, bias if splits == 1 else None, out)
    sizes = (n, n_blocks, d, n_centroids, *codes.stride(), count, parts)
    grid, options = (tiles, splits), dict(BLOCK_N=block_n, num_warps=warps, **constants)
    if few:
        launch.run(pq_linear_few_kernel, grid, *tensors, *sizes, M=m, **options)
    else:
        launch.run(pq_linear_kernel, grid, *tensors, m, *sizes, BLOCK_M=block_m, **options)
    if splits > 1:
        launch.run(
            pq_linear_sum_kernel,
            (cdiv(m * n, SUM_BLOCK),),
            *(out, bias, y, m * n, n, splits),
            **dict(BLOCK=SUM_BLOCK, num_warps=4),
        )
    return y
