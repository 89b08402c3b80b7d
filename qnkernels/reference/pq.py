"""Layers over product-quantized weights: block b of row o of the weight is codebook[codes[o, b]]."""

import torch
import torch.nn.functional as F


def pq_decode(codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """codes [rows, n_blocks] uint8 or uint16, codebook [K, d] -> weight [rows, n_blocks * d]."""
    return codebook[codes.long()].flatten(1)


def pq_decode_backward(grad: torch.Tensor, codes: torch.Tensor, n_centroids: int, mean: bool) -> torch.Tensor:
    """Gradient [K, d] of the codebook, in the dtype of grad [rows, n_blocks * d]: the sum, or the mean, over
    the blocks of each codeword (0 for a codeword without blocks).
    """
    index = codes.long().flatten()
    blocks = grad.to(_accumulate(grad.dtype)).reshape(len(index), _width(grad, codes))
    total = blocks.new_zeros(n_centroids, blocks.shape[1]).index_add_(0, index, blocks)
    return (total / _divisor(codes, n_centroids, mean)).to(grad.dtype)


def pq_linear(
    x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """y = x @ decode(codes, codebook)^T + bias, fp32 accumulation; [m, in] -> [m, out] in the dtype of x."""
    wide = _accumulate(x.dtype)
    weight = pq_decode(codes, codebook.to(wide))
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def pq_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    mean: bool,
    needs_x: bool,
    needs_codebook: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x [m, in], in its dtype, and of the codebook [K, d], fp32; empty where not needed.

    grad [m, out], x [m, in]. The codebook's gradient is the sum, or the mean, over the blocks of each
    codeword of the gradient of the dense weight.
    """
    wide = _accumulate(x.dtype)
    grad, empty = grad.to(wide), x.new_empty(0)
    grad_x = (grad @ pq_decode(codes, codebook.to(wide))).to(x.dtype) if needs_x else empty
    grad_codebook = empty.to(wide)
    if needs_codebook:
        grad_codebook = pq_decode_backward(grad.t() @ x.to(wide), codes, len(codebook), mean)
    return grad_x, grad_codebook


def pq_embedding(indices: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Rows of the decoded table: indices [count] int64 -> [count, n_blocks * d] in the dtype of codebook."""
    return pq_decode(_rows(codes, indices.long()), codebook)


def pq_embedding_backward(
    grad: torch.Tensor, indices: torch.Tensor, codes: torch.Tensor, n_centroids: int, mean: bool
) -> torch.Tensor:
    """Gradient [K, d] of the codebook, fp32, from grad [count, n_blocks * d]; the mean is over all blocks of
    the table, as if the table's gradient had been written out.
    """
    blocks = grad.to(_accumulate(grad.dtype)).reshape(indices.numel() * codes.shape[1], _width(grad, codes))
    index = _rows(codes, indices).long().flatten()
    total = blocks.new_zeros(n_centroids, blocks.shape[1]).index_add_(0, index, blocks)
    return total / _divisor(codes, n_centroids, mean)


def _rows(codes: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """codes[indices], which torch does not do with uint16 on a GPU."""
    if codes.dtype != torch.uint16:
        return codes[indices]
    return codes.view(torch.int16)[indices].view(torch.uint16)


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _width(grad: torch.Tensor, codes: torch.Tensor) -> int:
    """d, also where grad [.., n_blocks * d] has no rows."""
    return grad.shape[-1] // max(codes.shape[1], 1)


def _divisor(codes: torch.Tensor, n_centroids: int, mean: bool) -> torch.Tensor | int:
    return block_counts(codes, n_centroids) if mean else 1


def block_counts(codes: torch.Tensor, n_centroids: int) -> torch.Tensor:
    """How many blocks have each codeword, int64 [K, 1]; 1 for none, so that a mean of nothing is 0."""
    return torch.bincount(codes.long().flatten(), minlength=n_centroids).clamp(min=1)[:, None]
