"""block_noise: both proxies, exactness of every backend, straight-through gradient, bad input."""

import pytest
import torch
from numeric import DTYPES, assert_identical, integer, random_seed

from qnkernels import functional as F
from qnkernels.backends import backend, kernels
from qnkernels.reference.philox import noise_mask


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_equals_reference(kind, dtype):
    generator = torch.Generator().manual_seed(11)
    cpu, reference = kernels("cpu")["block_noise"], kernels("reference")["block_noise"]
    for rows, columns in ((1, 1), (5, 6), (33, 72), (7, 515), (2, 9000)):
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        for size in {1, 2, 3, 4, 5, 8, 9, 103, columns}:
            if columns % size:
                continue
            for p, rescale, out_dtype in (
                (0.1, True, dtype),
                (0.5, False, torch.bfloat16),
                (1.0, True, dtype),
            ):
                arguments = (weight, size, p, random_seed(generator), kind, rescale, out_dtype)
                assert_identical(cpu(*arguments), reference(*arguments))


def test_zero_by_hand():
    weight = torch.randn(50, 64)
    mask = noise_mask(50 * 8, 0.25, integer(9)).reshape(50, 8, 1)
    expected = (weight.reshape(50, 8, 8) * (1 / 0.75)).masked_fill(mask, 0).reshape(50, 64)
    assert_identical(F.block_noise(weight, 8, 0.25, seed=9), expected)
    assert_identical(
        F.block_noise(weight, 8, 0.25, seed=9, rescale=False),
        weight.reshape(50, 8, 8).masked_fill(mask, 0).reshape(50, 64),
    )


def test_mean_in_float64():
    weight = torch.randn(40, 36)
    blocks = weight.double().reshape(-1, 9)
    mask = noise_mask(len(blocks), 0.5, integer(4))[:, None]
    expected = torch.where(mask, blocks.mean(1, keepdim=True).expand(-1, 9), blocks).reshape(40, 36)
    torch.testing.assert_close(
        F.block_noise(weight, 9, 0.5, seed=4, kind="mean").double(), expected, rtol=0, atol=1e-6
    )


def test_rescaled_noise_keeps_the_expectation():
    weight = torch.ones(64, 64)
    total = torch.zeros_like(weight)
    for seed in range(200):
        total += F.block_noise(weight, 8, 0.2, seed=seed)
    assert abs((total / 200).mean().item() - 1) < 5 * (0.25 / (200 * 512)) ** 0.5


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_gradient_is_straight_through(kind):
    weight = torch.randn(12, 16, requires_grad=True)
    upstream = torch.randn(12, 16)
    (grad,) = torch.autograd.grad(F.block_noise(weight, 4, 0.5, seed=1, kind=kind), weight, upstream)
    assert_identical(grad, upstream)
    narrow = F.block_noise(weight, 4, 0.5, seed=1, kind=kind, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(narrow, weight, upstream.bfloat16())
    assert_identical(grad, upstream.bfloat16().float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "size", "clusters"), [(8, 8, 1), (9, 3, 5), (12, 1, 300), (128, 64, 7)])
def test_reference_takes_the_nearest_codeword_of_noised_blocks(columns, size, clusters, dtype):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(11, columns, generator=generator).to(dtype)
    codebook = torch.randn(clusters, size, generator=generator)
    seed = random_seed(generator)
    blocks = weight.float().reshape(-1, size)
    distances = (blocks.double()[:, None] - codebook.double()).square().sum(-1)
    nearest = codebook[distances.argmin(1)]
    mask = noise_mask(len(blocks), 0.5, seed)[:, None]
    expected = torch.where(mask, nearest, blocks).reshape(11, columns)
    with backend("reference"):
        for out_dtype in (None, torch.float32, torch.bfloat16):
            noised = F.block_noise(weight, size, 0.5, seed, "centroid", dtype=out_dtype, codebook=codebook)
            assert_identical(noised, expected.to(out_dtype or dtype))
        whole = F.block_noise(weight, size, 1.0, seed, "centroid", codebook=codebook)
        assert_identical(whole, nearest.reshape(11, columns).to(dtype))


def test_centroid_passes_the_gradient_and_takes_the_lowest_of_equals():
    weight = torch.randn(6, 8, requires_grad=True)
    codebook = torch.zeros(3, 4)
    codebook[1:] = 1e-3
    upstream = torch.randn(6, 8)
    with backend("reference"):
        noised = F.block_noise(weight, 4, 0.5, 3, "centroid", codebook=codebook)
        (grad,) = torch.autograd.grad(noised, weight, upstream)
        assert_identical(grad, upstream)
        same = torch.stack([torch.ones(4), torch.full((4,), -1.0), torch.full((4,), -1.0)])
        tied = F.block_noise(torch.zeros(1, 4), 4, 1.0, 3, "centroid", codebook=same)
        assert_identical(tied, torch.ones(1, 4))
        arguments = (weight, 4, 0.5, integer(3), "centroid", True, None, codebook)
        torch.library.opcheck(torch.ops.qnkernels.block_noise.default, arguments)


def test_nan_stays_where_it_is():
    weight = torch.zeros(4, 16)
    weight[1, 3] = float("nan")
    noised = F.block_noise(weight, 8, 0.0, seed=0)
    assert noised.isnan().sum() == 1 and noised[1, 3].isnan()


def test_opcheck():
    weight = torch.randn(6, 16, requires_grad=True)
    for kind in ("zero", "mean"):
        torch.library.opcheck(torch.ops.qnkernels.block_noise.default, (weight, 8, 0.5, integer(3), kind))


W = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.block_noise(W.long(), 8, 0.1), TypeError, ("weight", "int64")),
        (lambda: F.block_noise(W[0], 8, 0.1), ValueError, ("weight", "[out, in]", "(8,)")),
        (lambda: F.block_noise(W, 3, 0.1), ValueError, ("block_size", "8", "3")),
        (lambda: F.block_noise(W, 0, 0.1), ValueError, ("block_size", "0")),
        (lambda: F.block_noise(W, 8, -0.1), ValueError, ("p", "-0.1")),
        (lambda: F.block_noise(W, 8, 0.1, kind="median"), ValueError, ("kind", "zero", "median")),
        (lambda: F.block_noise(W, 8, 0.1, kind="centroid"), ValueError, ("codebook", "[K, 8]", "None")),
        (
            lambda: F.block_noise(W, 8, 0.1, kind="centroid", codebook=W[:, :4]),
            ValueError,
            ("codebook", "[K, 8]", "(4, 4)"),
        ),
        (
            lambda: F.block_noise(W, 8, 0.1, kind="centroid", codebook=W.half()),
            TypeError,
            ("codebook", "float32", "float16"),
        ),
        (lambda: F.block_noise(W, 8, 0.1, codebook=W), ValueError, ("codebook", "None", "'zero'")),
        (
            lambda: F.block_noise(torch.ones(2, 65), 65, 0.1, kind="centroid", codebook=torch.ones(1, 65)),
            ValueError,
            ("block_size", "64", "65"),
        ),
        (lambda: F.block_noise(W[:0], 8, 0.1), ValueError, ("weight", "(0, 8)")),
        (lambda: F.block_noise(W, 8, 0.1, dtype=torch.int8), TypeError, ("dtype", "int8")),
        (lambda: F.block_noise(W, 8, 0.1, seed=torch.tensor(1.0)), ValueError, ("seed", "int64")),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
