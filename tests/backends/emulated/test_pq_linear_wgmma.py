"""pq_linear and its gradient of x by wgmma, in the emulator, against float64."""

import pytest
import torch
from helpers_emulator import (
    TYPES,
    capability,
    emulated,
    launches,
    processors,
    shared_memory,
    warpgroup_products,
    wgmma_wherever_possible,
)
from helpers_pq_linear import SOURCES, assert_near, by_codeword, weight

DTYPES = (torch.bfloat16, torch.float16)
# rows, blocks, d, centroids: least sizes; past a tile, and past a step; pieces of 4 and of 8 values, one and
# several of a block; codes of two bytes; few copies of the table
WEIGHTS = (
    (8, 1, 8, 1),
    (264, 9, 8, 256),
    (16, 34, 4, 255),
    (40, 5, 16, 300),
    (24, 3, 64, 256),
    (72, 17, 8, 1024),
    (8, 2, 32, 2000),
    (136, 40, 8, 16),
)


def ours() -> dict:
    return emulated(*SOURCES)


@pytest.fixture(autouse=True)
def on_sm_90():
    with capability(90, *SOURCES):
        warpgroup_products(*SOURCES)
        yield


def random(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_linear(shape, m, dtype, with_bias, seed=0):
    codes, codebook, decoded = weight(*shape, dtype, True, torch.Generator().manual_seed(seed))
    x = random(m, decoded.shape[1], dtype=dtype, seed=seed + 1)
    bias = random(shape[0], dtype=dtype, seed=seed + 2) if with_bias else None
    y = ours()["pq_linear"](x, codes, codebook, bias)
    shift = bias.double() if with_bias else torch.zeros(shape[0]).double()
    magnitude = x.double().abs() @ decoded.abs().T + shift.abs()
    assert_near(y, x.double() @ decoded.T + shift, magnitude, x.shape[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_linear_against_float64(shape, dtype):
    for m, with_bias in ((17, True), (131, False)):
        check_linear(shape, m, dtype, with_bias)
        assert warpgroup_products(*SOURCES) > 0


@pytest.mark.parametrize(
    ("shape", "code", "width"),
    [
        ((16, 34, 4, 255), "unsigned char", 4),
        ((24, 18, 4, 300), "unsigned short", 4),
        ((24, 9, 8, 256), "unsigned char", 8),
        ((40, 5, 16, 300), "unsigned short", 8),
    ],
)
def test_forms(shape, code, width):
    for dtype in DTYPES:
        check_linear(shape, 17, dtype, True)
        expected = f"pq_linear_wgmma_kernel<{TYPES[dtype]}, {code}, {width}, false>"
        assert launches(*SOURCES)[0].kernel == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_gradient_of_x_against_float64(shape, dtype):
    codes, codebook, decoded = weight(*shape, dtype, False, torch.Generator().manual_seed(3))
    grad = random(131, shape[0], dtype=dtype, seed=4)
    x = random(131, decoded.shape[1], dtype=dtype, seed=5)
    with wgmma_wherever_possible(*SOURCES):
        grad_x, _ = ours()["pq_linear_backward"](grad, x, codes, codebook, True, True, False)
    assert warpgroup_products(*SOURCES) > 0
    assert_near(grad_x, grad.double() @ decoded, grad.double().abs() @ decoded.abs(), shape[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "m", "count"),
    [
        ((1, 1, 8, 1), 1, 3),
        ((130, 33, 4, 300), 70, 1),
        ((67, 18, 8, 256), 131, 3),
        ((48, 3, 12, 7000), 33, 2),
        ((48, 3, 24, 256), 33, 2),
    ],
    ids=str,
)
def test_gradient_of_the_codebook_against_float64(shape, m, count, dtype):
    """count: multiprocessors. Blocks take several tiles; sums in shared and in global memory; odd sizes."""
    codes, codebook, decoded = weight(*shape, dtype, True, torch.Generator().manual_seed(9))
    x, grad = random(m, decoded.shape[1], dtype=dtype, seed=10), random(m, shape[0], dtype=dtype, seed=11)
    with processors(count, *SOURCES):
        arguments = (grad, x, codes, codebook, True, False, True)
        _, grad_codebook = ours()["pq_linear_backward"](*arguments)
    assert warpgroup_products(*SOURCES) > 0
    dense = (grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs())
    sums = [by_codeword(one.reshape(codes.numel(), -1), codes, shape[3], True) for one in dense]
    assert_near(grad_codebook, *sums, m, torch.float32)


@pytest.mark.parametrize("with_bias", [False, True])
def test_depth_divided_among_processors(with_bias):
    """Parts of the sums go through memory; one has a step more than the other."""
    with processors(4, *SOURCES):
        check_linear((264, 135, 8, 256), 70, torch.bfloat16, with_bias)
    assert warpgroup_products(*SOURCES) > 0


@pytest.mark.parametrize(
    ("shape", "m"),
    [
        ((12, 8, 8, 16), 70),
        ((16, 9, 4, 16), 70),
        ((16, 4, 12, 16), 70),
        ((16, 4, 8, 16), 16),
    ],
    ids=["rows", "columns", "pieces", "few tokens"],
)
def test_what_other_kernels_serve(shape, m):
    check_linear(shape, m, torch.bfloat16, True)
    assert warpgroup_products(*SOURCES) == 0


def test_gradient_of_few_tiles():
    """It is faster without; a test may want wgmma nevertheless."""
    codes, codebook, _ = weight(16, 4, 8, 16, torch.bfloat16, True, torch.Generator().manual_seed(7))
    x, grad = (random(70, n, dtype=torch.bfloat16, seed=8) for n in (32, 16))

    def run():
        return ours()["pq_linear_backward"](grad, x, codes, codebook, True, True, False)[0]

    with processors(132, *SOURCES):
        plain = run()
        assert warpgroup_products(*SOURCES) == 0
        with wgmma_wherever_possible(*SOURCES):
            other = run()
    assert warpgroup_products(*SOURCES) > 0
    torch.testing.assert_close(plain, other, rtol=2**-7, atol=2**-7)


def test_other_devices_and_tables_that_do_not_fit():
    check_linear((16, 4, 64, 1400), 70, torch.bfloat16, True)
    with shared_memory(99 * 1024, *SOURCES):
        check_linear((16, 4, 32, 1000), 70, torch.bfloat16, True)
    for tens in (80, 89, 100, 120):
        with capability(tens, *SOURCES):
            check_linear((16, 4, 8, 16), 70, torch.bfloat16, True)
    assert warpgroup_products(*SOURCES) == 0


@pytest.mark.parametrize("n_centroids", [200, 300])
def test_values_that_are_not_finite_stay_where_they_are_used(n_centroids):
    """Codeword 0 fills the depth past the end, and the last codeword stands for codes past it."""
    shape, generator = (24, 9, 8, n_centroids), torch.Generator().manual_seed(6)
    codes, codebook, _ = weight(*shape, torch.bfloat16, False, generator)
    codes = codes.int().clamp(min=1, max=n_centroids - 2).to(codes.dtype)
    codes[4, 1] = 0
    codes[9, 2] = torch.iinfo(codes.dtype).max
    codebook = codebook.abs() + 0.5
    codebook[0] = codebook[-1] = float("inf")
    x, grad = (torch.rand(70, n).to(torch.bfloat16) + 0.5 for n in (72, 24))
    x[13, 7] = float("nan")
    y = ours()["pq_linear"](x, codes, codebook, None)
    assert y[13].isnan().all()
    y = torch.cat((y[:13], y[14:]))
    used = torch.zeros(24, dtype=torch.bool)
    used[[4, 9]] = True
    assert y[:, used].isinf().all() and y[:, ~used].isfinite().all()
    grad[5, 3] = float("inf")
    warpgroup_products(*SOURCES)
    with wgmma_wherever_possible(*SOURCES):
        grad_x, _ = ours()["pq_linear_backward"](grad, x, codes, codebook, True, True, False)
    assert not grad_x[5].isfinite().any()
    used = torch.zeros(72, dtype=torch.bool)
    used[8:24] = True
    grad_x = torch.cat((grad_x[:5], grad_x[6:]))
    assert grad_x[:, used].isinf().all() and grad_x[:, ~used].isfinite().all()
    assert warpgroup_products(*SOURCES) > 0
