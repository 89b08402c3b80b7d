"""The gradients of pq_linear: neither the dense weight nor its gradient is written anywhere."""

import torch
import triton
import triton.language as tl

from ..fixed_point import exponent_below, unscaled
from . import launch
from .decode import as_matrix, column_count, step_codes, step_columns, step_weight, steps
from .fixed_point import copies, fixed_point
from .launch import cdiv
from .numeric import dot, from_fp32
from .pq_embedding import block_counts


@triton.jit(do_not_specialize=["m", "n_blocks", "d", "n_centroids", "steps", "parts"])
def pq_linear_grad_x_kernel(
    grad_ptr,
    codes_ptr,
    codebook_ptr,
    grad_x_ptr,
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
    """grad_x[i, l] = sum_j grad[i, j] * W[j, l], fp32 accumulation, for the columns l of one step.

    grad [m, n]; codes [n, n_blocks], codebook [n_centroids, d] in the dtype of grad; grad_x [m, k].
    Floor: codes once per BLOCK_M rows of grad; one access of a codeword per code read.
    """
    k = column_count(n_blocks, d, SUB, EXACT)
    step = tl.program_id(0) % steps
    first_row = (tl.program_id(0) // steps).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    out = tl.arange(0, BLOCK_N)
    row_inside = row < m - first_row
    grad_ptr += first_row * n
    total = tl.zeros([BLOCK_M, BLOCKS * SUB], tl.float32)
    for first_out in range(0, n, BLOCK_N):
        out_inside = out < n - first_out
        inside = row_inside[:, None] & out_inside[None, :]
        grad = tl.load(grad_ptr + first_out + row[:, None] * n + out[None, :], mask=inside, other=0.0)
        rows_ptr = codes_ptr + tl.cast(first_out, tl.int64) * row_stride
        code, known = step_codes(
            rows_ptr, row_stride, block_stride, out, out_inside, step, parts, n_blocks, BLOCKS
        )
        w = step_weight(code, known, codebook_ptr, n_centroids, step, parts, d, SUB, EXACT)
        total = dot(grad, as_matrix(w, BLOCK_N, BLOCKS * SUB), total, "ieee")
    column, column_inside = step_columns(step, parts, n_blocks, d, BLOCKS, SUB, EXACT)
    grad_x_ptr += first_row * k
    grad_x = from_fp32(total, grad_x_ptr.dtype.element_ty)
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(grad_x_ptr + row[:, None] * k + column[None, :], grad_x, mask=inside)


@triton.jit(do_not_specialize=["m", "n_blocks", "d", "n_centroids", "steps", "parts", "copies"])
def pq_linear_grad_codebook_kernel(
    grad_ptr,
    x_ptr,
    codes_ptr,
    sums_ptr,
    exponent_ptr,
    m,
    n,
    n_blocks,
    d,
    n_centroids,
    row_stride,
    block_stride,
    steps,
    parts,
    copies,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    SUB: tl.constexpr,
    EXACT: tl.constexpr,
):
    """sums[codes[j, b]] += fixed(sum_i grad[i, j] * x[i, block b]) for a tile of the weight.

    grad [m, n], x [m, n_blocks * d] of one dtype; sums int64 [copies, n_centroids, d], zeros at first;
    exponent int64 []. The tile of the weight's gradient stays in registers.
    Floor: the products of the dense gradient; one atomic per weight.
    """
    k = column_count(n_blocks, d, SUB, EXACT)
    step = tl.program_id(0) % steps
    first_out = (tl.program_id(0) // steps).to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)
    out = tl.arange(0, BLOCK_N)
    out_inside = out < n - first_out
    column, column_inside = step_columns(step, parts, n_blocks, d, BLOCKS, SUB, EXACT)
    total = tl.zeros([BLOCK_N, BLOCKS * SUB], tl.float32)
    for first_row in range(0, m, BLOCK_M):
        row_inside = row < m - first_row
        grads_ptr = grad_ptr + tl.cast(first_row, tl.int64) * n + first_out
        inside = row_inside[:, None] & out_inside[None, :]
        grad = tl.load(grads_ptr + row[:, None] * n + out[None, :], mask=inside, other=0.0)
        rows_ptr = x_ptr + tl.cast(first_row, tl.int64) * k
        inside = row_inside[:, None] & column_inside[None, :]
        x = tl.load(rows_ptr + row[:, None] * k + column[None, :], mask=inside, other=0.0)
        total = dot(tl.trans(grad), x, total, "ieee")
    codes_ptr += first_out * row_stride
    code, known = step_codes(
        codes_ptr, row_stride, block_stride, out, out_inside, step, parts, n_blocks, BLOCKS
    )
    within = step % parts * SUB + tl.arange(0, SUB)[None, None, :]
    mask = (known & (code < n_centroids))[:, :, None] & (within < d)
    slot = (tl.program_id(0) % copies).to(tl.int64) * n_centroids * d + code[:, :, None] * d + within
    terms = fixed_point(tl.reshape(total, [BLOCK_N, BLOCKS, SUB]), tl.load(exponent_ptr))
    tl.atomic_add(sums_ptr + slot, terms, mask=mask, sem="relaxed")


def _tile(m: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, columns, warps); fp32 products are taken by plain threads, from registers."""
    if dtype == torch.float32:
        return (16 if m <= 16 else 64), 16, 32, 4 if m <= 16 else 8
    return (16, 64, 64, 4) if m <= 16 else (64, 32, 64, 4)


def _grad_x(grad, codes, codebook):
    (m, n), n_blocks, (n_centroids, d) = grad.shape, codes.shape[1], codebook.shape
    grad_x = grad.new_empty(m, n_blocks * d)
    block_m, block_n, columns, warps = _tile(m, grad.dtype)
    count, parts, constants = steps(n_blocks, d, columns)
    launch.run(
        pq_linear_grad_x_kernel,
        (cdiv(m, block_m) * count,),
        *(grad, codes, codebook.to(grad.dtype), grad_x, m, n, n_blocks, d, n_centroids),
        *(*codes.stride(), count, parts),
        **dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, **constants),
    )
    return grad_x


def _grad_codebook(grad, x, codes, n_centroids, d, mean):
    """Sum or mean over the blocks of each codeword of the dense weight's gradient, fp32 [n_centroids, d]."""
    (m, n), n_blocks = grad.shape, codes.shape[1]
    entries = n_centroids * d
    if grad.numel() == 0 or x.numel() == 0:
        return grad.new_zeros(n_centroids, d, dtype=torch.float32)
    # |sum_i grad_ij x_il| <= |grad_j| |x_l|, by columns (Cauchy-Schwarz)
    largest = (torch.linalg.vector_norm(one, dim=0, dtype=torch.float64).amax() for one in (grad, x))
    bound = torch.mul(*largest) * codes.numel()
    exponent = exponent_below(bound)
    sums = torch.zeros(copies(entries), entries, dtype=torch.int64, device=grad.device)
    if grad.dtype == torch.float32:
        block_m, block_n, columns, warps = 16, 64, 32, 8
    else:
        block_m, block_n, columns, warps = 64, 64, 64, 8
    count, parts, constants = steps(n_blocks, d, columns)
    launch.run(
        pq_linear_grad_codebook_kernel,
        (cdiv(n, block_n) * count,),
        *(grad, x, codes, sums, exponent, m, n, n_blocks, d, n_centroids),
        *(*codes.stride(), count, parts, len(sums)),
        **dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, **constants),
    )
    total = unscaled(sums.sum(0), exponent, bound).view(n_centroids, d)
    return (total / block_counts(codes, n_centroids) if mean else total).float()


def pq_linear_backward(grad, x, codes, codebook, mean, needs_x, needs_codebook):
    """Signature of reference.pq.pq_linear_backward; all contiguous but codes.

    The gradient of the codebook is the same in every run: its terms are added in fixed point.
    """
    grad_x = _grad_x(grad, codes, codebook) if needs_x else x.new_empty(0)
    if not needs_codebook:
        return grad_x, x.new_empty(0, dtype=torch.float32)
    return grad_x, _grad_codebook(grad, x, codes, *codebook.shape, mean)
