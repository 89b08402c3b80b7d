"""The CUDA kernels of pq_linear and its gradients in the emulator, against float64."""

import itertools

import pytest
import torch
from helpers_emulator import emulated, processors
from numeric import DTYPES, assert_identical

from qnkernels.backends import kernels

SOURCES = (
    *("pq_linear", "pq_linear_few", "pq_linear_few_float", "pq_linear_tiles", "pq_linear_float"),
    "pq_linear_codebook",
)
EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# rows of the weight, blocks, d, centroids: one of each; odd; one past a tile; codes of two bytes in shared memory and
# through the cache; wide blocks; runs of whole vectors
WEIGHTS = (
    (1, 1, 1, 1),
    (5, 7, 2, 4),
    (33, 20, 8, 256),
    (67, 9, 4, 300),
    (129, 17, 4, 255),
    (17, 5, 9, 2),
    (40, 3, 33, 7),
    (19, 2, 64, 16),
    (64, 9, 16, 257),
    (96, 5, 8, 1024),
    (24, 6, 8, 60_000),
    (35, 11, 3, 50_000),
)
ROWS = (1, 2, 3, 8, 9, 33, 65, 130)


def ours() -> dict:
    return emulated(*SOURCES)


def weight(rows, n_blocks, d, n_centroids, dtype, transposed, generator):
    """(codes, codebook) and the decoded weight in float64; transposed: codes are stored block by block."""
    codes = torch.randint(0, n_centroids, (rows, n_blocks), generator=generator)
    codes = codes.to(torch.uint8 if n_centroids <= 256 else torch.uint16)
    if transposed:
        codes = codes.t().contiguous().t()
    codebook = torch.randn(n_centroids, d, generator=generator).to(dtype)
    return codes, codebook, codebook.double()[codes.long()].flatten(1)


def assert_near(actual, exact, magnitude, terms, dtype):
    """|error| <= fp32 roundings of `terms` products and sums, and one rounding to dtype."""
    bound = (terms + 4) * 2**-24 * magnitude + exact.abs() * EPSILON[dtype]
    bound += 2**-25 if dtype == torch.float16 else 0.0  # half a step of its subnormal numbers
    assert actual.dtype == dtype and actual.shape == exact.shape
    assert ((actual.double() - exact).abs() <= bound).all()


def by_codeword(blocks, codes, n_centroids, mean):
    """Sum or mean by codeword of blocks float64 [len(codes), d]."""
    index = codes.long().flatten()
    total = blocks.new_zeros(n_centroids, blocks.shape[1]).index_add_(0, index, blocks)
    return total / torch.bincount(index, minlength=n_centroids).clamp(min=1)[:, None] if mean else total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_linear_against_float64(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    for m, transposed in zip(ROWS, itertools.cycle((False, True))):
        # every other time the codebook comes in another dtype, with values that both have
        codes, codebook, decoded = weight(*shape, torch.bfloat16, transposed, generator)
        codebook = codebook.to(dtype if m % 2 else torch.float32)
        decoded = decoded if dtype != torch.float16 else codebook.half().double()[codes.long()].flatten(1)
        x = torch.randn(m, decoded.shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if m % 3 else None
        y = ours()["pq_linear"](x, codes, codebook, bias)
        shift = torch.zeros(shape[0]).double() if bias is None else bias.double()
        exact, magnitude = x.double() @ decoded.T + shift, x.double().abs() @ decoded.abs().T + shift.abs()
        assert_near(y, exact, magnitude, x.shape[1], dtype)
