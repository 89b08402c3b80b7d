"""block_noise under the interpreter: exactly the reference."""

import itertools

import pytest
import torch
from numeric import DTYPES, assert_identical, integer, random_seed

from qnkernels.backends import kernels
from qnkernels.reference.philox import noise_mask

# (shape, block_size): single weights, tiles of their own, idle lanes, blocks longer than a tile, one past one
CASES = (
    ((1, 1), 1),
    ((7, 13), 1),
    ((5, 9), 9),
    ((5, 27), 3),
    ((513, 8), 8),
    ((3, 24), 8),
    ((41, 32), 16),
    ((6, 60), 12),
    ((2, 1024), 1024),
    ((3, 515), 515),
)


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize(("shape", "block_size"), CASES, ids=str)
def test_equals_reference(shape, block_size, kind):
    generator = torch.Generator().manual_seed(block_size)
    pairs = itertools.cycle(itertools.product(DTYPES, DTYPES))
    for p, rescale in itertools.product((0.0, 0.05, 0.5, 1.0), (False, True)):
        dtype, other = next(pairs)
        weight = (torch.randn(shape, generator=generator) * 3).to(dtype)
        if weight.numel() > 8:
            values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-41]).to(dtype)
            weight.view(-1)[torch.randint(0, weight.numel(), (4,), generator=generator)] = values
        arguments = (weight, block_size, p, random_seed(generator), kind, rescale, other)
        actual, expected = (kernels(name)["block_noise"](*arguments) for name in ("triton", "reference"))
        assert_identical(actual, expected)


# (shape, block_size, codewords): single weights, tiles of their own, idle lanes, more than one program
CENTROID_CASES = (
    ((1, 1), 1, 1),
    ((7, 13), 1, 5),
    ((5, 27), 3, 9),
    ((513, 16), 8, 17),
    ((300, 45), 9, 4),
    ((9, 128), 64, 6),
)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "block_size", "n_codewords"), CENTROID_CASES, ids=str)
def test_centroid_is_the_nearest_codeword(shape, block_size, n_codewords, p):
    """The reference's mask; the float64 distance of the choice is the least up to 1e-5; the rest is kept."""
    generator = torch.Generator().manual_seed(block_size)
    for dtype, other in (*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16)):
        weight = torch.randn(shape, generator=generator).to(dtype)
        codebook = torch.randn(n_codewords, block_size, generator=generator)
        seed = random_seed(generator)
        arguments = (weight, block_size, p, seed, "centroid", True, other, codebook)
        actual = kernels("triton")["block_noise"](*arguments)
        blocks = weight.reshape(-1, block_size)
        distance = ((blocks.double()[:, None] - codebook.double()) ** 2).sum(2)
        rounded = codebook.to(other)
        found = (actual.reshape(-1, 1, block_size) == rounded).all(2)
        mask = noise_mask(len(blocks), p, seed)
        least = distance.min(1, keepdim=True).values
        assert (found & (distance <= least * (1 + 1e-5))).any(1)[mask].all()
        assert_identical(actual.reshape(-1, block_size)[~mask], blocks.to(other)[~mask])


def test_centroid_takes_the_first_of_equals_and_of_nothing_near():
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0, 0.5, 0.5, float("nan"), 0.0, float("inf"), 0.0]])
    actual = kernels("triton")["block_noise"](
        weight, 2, 1.0, integer(3), "centroid", True, torch.float32, codebook
    )
    assert_identical(actual, codebook[[1, 1, 0, 0]].reshape(1, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_is_summed_left_to_right(dtype):
    """Blocks whose sum depends on the order."""
    weight = torch.tensor([1e4, 3.0, -1e4, 1e-3, 7.7, -0.3, 1e-4, 2.0]).repeat(20, 1).to(dtype)
    weight = weight * torch.linspace(0.5, 2, 20).to(dtype)[:, None]
    arguments = (weight, 8, 1.0, integer(0), "mean", True, torch.float32)
    actual, expected = (kernels(name)["block_noise"](*arguments) for name in ("triton", "reference"))
    assert_identical(actual, expected)
    assert (actual == actual[:, :1]).all()
