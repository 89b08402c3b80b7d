"""For the tests of the GPU kernels of pq_linear, in the emulator and under the interpreter."""

import torch

SOURCES = (  # of the CUDA kernels
    *("pq_linear", "pq_linear_few", "pq_linear_few_float", "pq_linear_tiles", "pq_linear_float"),
    *("pq_linear_codebook", "pq_linear_wgmma", "pq_linear_codebook_wgmma"),
)
EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


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
