"""fake_quantize and its gradient under the interpreter: exactly the reference."""

import itertools

import pytest
import torch
from numeric import DTYPES, assert_identical, few_outside, integer, layouts, random_seed

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.backends import kernels

RATES = (0.0, 0.05, 0.5, 1.0)
# one element, prime, one past 8, odd runs, one past a tile of 2048, tiles in one channel, runs that cross it
SHAPES = ((1,), (7,), (3, 5), (13, 131), (4, 3, 9), (2049,), (3, 2048), (60, 40), (1030, 2))


def case(shape, dtype, axis, group_size, generator):
    """(x, scale, zero_point): values in and out of range, on ties, huge, tiny and not finite."""
    x = torch.randn(shape, generator=generator) * 3
    low, high = F.minmax(x, axis, group_size)
    scale, zero_point = F.quantization_parameters(low * 0.7, high * 0.7, 4)
    flat = x.view(-1)
    for value in (float("nan"), float("inf"), -float("inf"), 1e-41, -3e38, 0.0):
        if x.numel() > 8:
            flat[torch.randint(0, x.numel(), (), generator=generator)] = value
    if axis is None and group_size is None:
        flat[:2] = (torch.tensor([2.5, 3.5])[: x.numel()] - zero_point) * scale
    return x.to(dtype), scale, zero_point


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    turns = itertools.cycle(itertools.product(DTYPES, RATES))
    for (axis, group_size), _ in itertools.product(layouts(shape), range(2)):
        dtype, p = next(turns)
        x, scale, zero_point = case(shape, dtype, axis, group_size, generator)
        bits = integer(int(torch.randint(2, 17, (), generator=generator)))
        rest = (scale, zero_point, bits, p, random_seed(generator), axis, group_size)
        grad = torch.randn(shape, generator=generator).to(dtype)
        for op, leading in (("fake_quantize", (x,)), ("fake_quantize_backward", (grad, x))):
            actual, expected = (kernels(name)[op](*leading, *rest) for name in ("triton", "reference"))
            assert_identical(actual, expected)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize(("dtype", "other"), itertools.product(DTYPES, DTYPES), ids=str)
def test_every_dtype_in_and_out(dtype, other, p):
    generator = torch.Generator().manual_seed(int(p * 100))
    x, scale, zero_point = case((19, 61), dtype, None, None, generator)
    quantizer = (scale, zero_point, integer(8), p, integer(2**40 + 5), None, None)
    grad = torch.randn(x.shape, generator=generator).to(other)
    ours, reference = kernels("triton"), kernels("reference")
    expected = reference["fake_quantize"](x, *quantizer, other)
    assert_identical(ours["fake_quantize"](x, *quantizer, other), expected)
    expected = reference["fake_quantize_backward"](grad, x, *quantizer)
    assert_identical(ours["fake_quantize_backward"](grad, x, *quantizer), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 12, 16])
def test_ties_round_to_even(bits):
    """x on every half step of the grid, with a power of two for a scale, so that the quotient is exact."""
    x = (torch.arange(0, min(2 ** (bits + 1), 4000)) - 3) * 0.125
    quantizer = (torch.tensor(0.25), torch.tensor(1.0), integer(bits), 1.0, integer(0))
    actual, expected = (kernels(name)["fake_quantize"](x, *quantizer) for name in ("triton", "reference"))
    assert_identical(actual, expected)
    assert len(actual.unique()) == min(2**bits, 2000)


def test_division_is_the_rounded_quotient():
    """Scales whose reciprocals are inexact: multiplying by 1 / s would move some elements by a step."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(64, generator=generator) + 0.01
    steps = torch.randint(0, 2**16, (64, 40), generator=generator) + 0.5
    x = (steps * scale[:, None]).contiguous()
    quantizer = (scale, torch.zeros(64), integer(16), 1.0, integer(0), 0)
    actual, expected = (kernels(name)["fake_quantize"](x, *quantizer) for name in ("triton", "reference"))
    assert_identical(actual, expected)


@pytest.mark.parametrize(("dtype", "axis", "p"), zip(DTYPES, (None, 0, 1), (0.0, 0.5, 1.0), strict=True))
def test_tiles_with_values_outside_are_marked(dtype, axis, p):
    x, quantizer, expected = few_outside(dtype, axis)
    run, rest = kernels("triton"), (*quantizer, p, integer(5), axis, None)
    outside = torch.full_like(expected, 9)
    y = run["fake_quantize"](x, *rest, dtype, outside)
    assert_identical(y, kernels("reference")["fake_quantize"](x, *rest))
    assert_identical(outside, expected)
    grad = torch.randn(x.shape).to(dtype)
    passed = kernels("reference")["fake_quantize_backward"](grad, x, *rest)
    assert_identical(run["fake_quantize_backward"](grad, x, *rest, outside), passed)
    nowhere = torch.zeros_like(outside)  # then x is not read
    assert_identical(run["fake_quantize_backward"](grad, x, *rest, nowhere), grad)
    run["fake_quantize_backward"](grad, x, *rest, outside, out=grad)
    assert_identical(grad, passed)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_in_place(dtype, p):
    generator = torch.Generator().manual_seed(9)
    x, scale, zero_point = case((11, 97), dtype, None, None, generator)
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    quantizer = (scale, zero_point, integer(4), p, integer(77), None, None)
    expected = kernels("reference")["fake_quantize_backward"](grad, x, *quantizer)
    other = torch.full_like(grad, 5.0)
    for out in (other, grad):
        result = kernels("triton")["fake_quantize_backward"](grad, x, *quantizer, out=out)
        assert result is out
        assert_identical(out, expected)


def test_a_rate_below_half_a_step_is_none():
    x = torch.randn(50)
    quantizer = (torch.tensor(9.0), torch.tensor(0.0), integer(2), 1e-6, integer(1))
    y = kernels("triton")["fake_quantize"](x, *quantizer)
    assert_identical(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_empty_and_not_aligned():
    quantizer = (torch.tensor(0.1), torch.tensor(3.0), integer(4), 0.5, integer(8))
    assert kernels("triton")["fake_quantize"](torch.empty(0, 4), *quantizer).shape == (0, 4)
    x = torch.randn(1100)[3:]
    actual, expected = (kernels(name)["fake_quantize"](x, *quantizer) for name in ("triton", "reference"))
    assert_identical(actual, expected)


def test_through_the_public_face():
    """Strided input, gradient and forced backend, as a caller meets them."""
    weight = torch.randn(40, 24).t().requires_grad_()
    scale, zero_point = torch.full((24,), 0.1), torch.full((24,), 8.0)
    results = []
    for name in ("triton", "reference"):
        with qnk.backend(name):
            y = F.fake_quantize(weight, scale, zero_point, 4, axis=0, p=0.5, seed=3)
            (gradient,) = torch.autograd.grad((y * y).sum(), weight)
        results.append((y, gradient))
    for actual, expected in zip(*results, strict=True):
        assert_identical(actual, expected)
