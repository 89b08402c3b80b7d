"""block_noise under the interpreter: exactly the reference."""

import itertools

import pytest
import torch
from numeric import DTYPES, assert_identical, integer, random_seed

from qnkernels.backends import kernels

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_is_summed_left_to_right(dtype):
    """Blocks whose sum depends on the order."""
    weight = torch.tensor([1e4, 3.0, -1e4, 1e-3, 7.7, -0.3, 1e-4, 2.0]).repeat(20, 1).to(dtype)
    weight = weight * torch.linspace(0.5, 2, 20).to(dtype)[:, None]
    arguments = (weight, 8, 1.0, integer(0), "mean", True, torch.float32)
    actual, expected = (kernels(name)["block_noise"](*arguments) for name in ("triton", "reference"))
    assert_identical(actual, expected)
    assert (actual == actual[:, :1]).all()
