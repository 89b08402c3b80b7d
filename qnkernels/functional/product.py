"""Product quantization: layers over codebooks, and the k-means behind them."""

import torch

from .. import ops


def kmeans_assign(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of each point: index int32 [n], lowest among equals, and squared distance fp32 [n].

    points fp32 [n, d], d up to 64; centroids fp32 [K, d], K up to 65,536. The choice is that of fp32
    arithmetic: where two centroids are equally near within its rounding, backends may differ.
    Raises ValueError (shapes, device) and TypeError (dtypes).
    """
    return ops.kmeans.kmeans_assign(points, centroids)


def kmeans_update(
    points: torch.Tensor,
    codes: torch.Tensor,
    n_clusters: int,
    exponent: int,
    weight_exponent: int = 0,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the points (int64 [K, d], unit 2^-exponent) and masses (int64 [K]) by cluster, in any order.

    points fp32 [n, d], codes int32 [n]. weights fp32 [n]: masses are in the unit 2^-weight_exponent; without
    weights they are counts. Raises ValueError, TypeError, and IndexError for codes outside [0, K) on the CPU.
    """
    arguments = (points, codes, n_clusters, exponent, weight_exponent, weights)
    return ops.kmeans.kmeans_update(*arguments)


def pq_decode(codes: torch.Tensor, codebook: torch.Tensor, codebook_grad: str = "mean") -> torch.Tensor:
    """Weight [rows, n_blocks * d] whose block b of row o is codebook[codes[o, b]]; arguments as pq_linear."""
    return ops.pq.pq_decode(codes, codebook, codebook_grad)


def pq_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None = None,
    codebook_grad: str = "mean",
) -> torch.Tensor:
    """y = x @ pq_decode(codes, codebook)^T + bias, without the dense weight.

    The CUDA C++ backend decodes the weight for many tokens, in slices of about 32 MB.

    x [..., in] fp32, bf16 or fp16; codes uint8 or uint16 [out, in / d], below K (not checked); codebook
    [K, d], K up to 256 or 65,536, d up to 64. Returns [..., out] in the dtype of x, accumulated in fp32.
    Gradients flow to x, codebook and bias; that of a codeword is the mean of the dense weight's gradient
    over the codeword's blocks (arXiv 1907.05686), or with codebook_grad="sum" the sum, the true derivative.
    Raises ValueError (shapes, device) and TypeError (dtypes).
    """
    return ops.pq.pq_linear(x, codes, codebook, bias, codebook_grad)


def pq_embedding(
    indices: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, codebook_grad: str = "mean"
) -> torch.Tensor:
    """Rows of a product-quantized table: indices [...] int64 -> [..., n_blocks * d], as the codebook."""
    return ops.pq.pq_embedding(indices, codes, codebook, codebook_grad)
