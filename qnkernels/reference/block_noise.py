"""Product-quantization noise and its proxies: blocks of consecutive weights of a row, noised together."""

import torch

from .kmeans import kmeans_assign
from .philox import noise_mask


def block_noise(
    weight: torch.Tensor,
    block_size: int,
    p: float,
    seed: torch.Tensor,
    kind: str,
    rescale: bool,
    dtype: torch.dtype | None = None,
    codebook: torch.Tensor | None = None,
) -> torch.Tensor:
    """Noise blocks of `block_size` weights of weight [out, in] at rate p; fp32 arithmetic, one rounding.

    "zero": noised blocks become 0 and, with `rescale`, the others are multiplied by 1 / (1 - p).
    "mean": noised blocks become their mean, summed left to right.
    "centroid": noised blocks become the nearest row of codebook fp32 [K, block_size].
    """
    blocks = weight.float().reshape(-1, block_size)
    mask = noise_mask(len(blocks), p, seed)[:, None]
    if kind == "centroid":
        noised = blocks.clone()
        codes, _ = kmeans_assign(blocks[mask[:, 0]], codebook)
        noised[mask[:, 0]] = codebook[codes.long()]
    elif kind == "mean":
        total = blocks[:, 0]
        for i in range(1, block_size):
            total = total + blocks[:, i]
        noised = torch.where(mask, (total / block_size)[:, None], blocks)
    else:
        factor = 1 / (1 - p) if rescale and p < 1 else 1.0
        noised = torch.where(mask, torch.zeros_like(blocks), blocks * factor)
    return noised.reshape(weight.shape).to(dtype or weight.dtype)
