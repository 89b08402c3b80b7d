"""Fake quantization over ranges that follow the data, under the interpreter: exactly the reference."""

import itertools

import pytest
import torch
from numeric import DTYPES, assert_identical, integer, layouts, random_seed

from qnkernels import functional as F
from qnkernels.backends import kernels

# one element, no multiple of 8, a tile with and without room for the start, kept in registers and not
SHAPES = (
    (1,),
    (7,),
    (3, 5),
    (5, 57),
    (4, 64),
    (33, 40),
    (3, 9, 7),
    (2, 8185),
    (2, 8186),
    (2, 8192),
    (3, 8200),
    (1, 17_000),
)


def same(op, *arguments):
    actual, expected = (kernels(name)[op](*arguments) for name in ("triton", "reference"))
    return actual, expected


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, stochastic):
    generator = torch.Generator().manual_seed(sum(shape))
    for (dtype, other), per_sample in itertools.product(
        ((torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)),
        (True, False),
    ):
        x = (torch.randn(shape, generator=generator) * 3 - 0.5).to(dtype)
        bits = integer(int(torch.randint(2, 17, (), generator=generator)))
        seed = random_seed(generator)
        assert_identical(*same("dynamic_fake_quantize", x, bits, seed, per_sample, stochastic, other))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("columns", [37, 8200])
def test_not_finite_and_extreme_values(columns, stochastic):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(10, columns, generator=generator)
    x[0, 5], x[1, 3], x[2, 0], x[3, 36] = float("nan"), float("inf"), -float("inf"), 3e38
    x[4], x[5], x[6], x[7] = 0.0, 1.5, -2.0, 1e-40
    x[8] *= 1e-38
    for per_sample in (True, False):
        assert_identical(*same("dynamic_fake_quantize", x, integer(4), integer(9), per_sample, stochastic))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 64), (13, 131), (2, 3, 40)], ids=str)
def test_moving_range(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    for axis, group_size in layouts(shape):
        x = torch.randn(shape, generator=generator).to(dtype)
        low, _ = F.minmax(x, axis, group_size)
        states = {name: (low * 0, low * 0, integer(0)) for name in ("triton", "reference")}
        for bits, other in ((4, dtype), (8, torch.float32)):
            x = torch.randn(shape, generator=generator).to(dtype)
            rest = integer(bits), 0.3, axis, group_size, other
            results = [
                (*kernels(name)["moving_fake_quantize_"](x, *state, *rest), *state)
                for name, state in states.items()
            ]
            for actual, expected in zip(*results, strict=True):
                assert_identical(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (5, 57), (2, 3, 40), (3, 1400)], ids=str)
def test_low_precision(shape, dtype):
    """Operands of a layer, and the gradient that is stopped by them."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(9, 21, generator=generator)
    for moves, step, per_channel in ((True, 0, True), (True, 3, False), (False, 3, True), (False, 0, True)):
        x = (torch.randn(shape, generator=generator) * 2).to(dtype)
        results = []
        for name in ("triton", "reference"):
            state = torch.tensor(-0.5), torch.tensor(1.0), integer(step)
            arguments = x, weight, *state, integer(4), 0.3, moves, per_channel
            results.append((*kernels(name)["low_precision_operands_"](*arguments), *state))
        for actual, expected in zip(*results, strict=True):
            assert_identical(actual, expected)
        grad = torch.randn(shape, generator=generator).to(dtype)
        grads = grad.clone(), grad.clone()
        for one, name in zip(grads, ("triton", "reference"), strict=True):
            kernels(name)["stop_gradient_"](one, results[0][1])
        assert_identical(*grads)
