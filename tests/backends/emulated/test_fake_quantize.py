"""The CUDA kernel of fake_quantize in the emulator: exactly the reference."""

import itertools

import pytest
import torch
from helpers_emulator import TYPES, alignment, emulated, launches
from numeric import DTYPES, assert_identical, few_outside, integer, layouts, random_seed

from qnkernels import functional as F
from qnkernels.backends import kernels

RATES = (0.0, 0.05, 0.5, 1.0)
# one element, prime, one past 8, odd runs, a block of 2048 and one past it, runs of 8 that cross it
SHAPES = ((1,), (7,), (9,), (3, 5), (13, 131), (4, 3, 9), (2049,), (2, 1024), (33, 40), (1030, 2))


def assert_equals_reference(arguments: tuple) -> None:
    actual = emulated("fake_quantize")["fake_quantize"](*arguments)
    assert_identical(actual, kernels("reference")["fake_quantize"](*arguments))


def case(shape, dtype, axis, group_size, generator):
    """(x, scale, zero_point): values in and out of range, huge, tiny and not finite."""
    x = torch.randn(shape, generator=generator) * 3
    low, high = F.minmax(x, axis, group_size)
    scale, zero_point = F.quantization_parameters(low * 0.7, high * 0.7, 4)
    for value in (float("nan"), float("inf"), -float("inf"), 1e-41, -3e38, 0.0):
        if x.numel() > 8:
            x.view(-1)[torch.randint(0, x.numel(), (), generator=generator)] = value
    return x.to(dtype), scale, zero_point


@pytest.mark.parametrize("bytes_aligned", [64, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, bytes_aligned):
    generator = torch.Generator().manual_seed(sum(shape))
    turns = itertools.cycle(itertools.product(DTYPES, RATES))
    with alignment(bytes_aligned, "fake_quantize"):
        for (axis, group_size), _ in itertools.product(layouts(shape), range(2)):
            dtype, p = next(turns)
            x, scale, zero_point = case(shape, dtype, axis, group_size, generator)
            bits = integer(int(torch.randint(2, 17, (), generator=generator)))
            assert_equals_reference(
                (x, scale, zero_point, bits, p, random_seed(generator), axis, group_size, dtype)
            )


@pytest.mark.parametrize(("dtype", "other"), itertools.product(DTYPES, DTYPES), ids=str)
def test_every_dtype_in_and_out(dtype, other):
    for p in RATES:
        generator = torch.Generator().manual_seed(int(p * 100))
        x, scale, zero_point = case((19, 61), dtype, None, None, generator)
        quantizer = (scale, zero_point, integer(8), p, integer(2**40 + 5), None, None)
        assert_equals_reference((x, *quantizer, other))


@pytest.mark.parametrize(("dtype", "other"), itertools.product(DTYPES, DTYPES), ids=str)
def test_forms(dtype, other):
    """Whether vectors can be loaded, and whether all of a vector has one scale."""
    for aligned, axis, form in ((64, None, "true, true"), (64, 1, "true, false"), (1, 0, "false, false")):
        x, scale, zero_point = case((3, 21), dtype, axis, None, torch.Generator().manual_seed(6))
        with alignment(aligned, "fake_quantize"):
            assert_equals_reference((x, scale, zero_point, integer(4), 0.5, integer(9), axis, None, other))
        (launch,) = launches("fake_quantize")
        assert launch.kernel == f"fake_quantize_kernel<{TYPES[dtype]}, {TYPES[other]}, {form}>"


@pytest.mark.parametrize(("dtype", "axis"), zip(DTYPES, (None, 0, 1), strict=True))
def test_tiles_with_values_outside_are_marked(dtype, axis):
    x, quantizer, expected = few_outside(dtype, axis)
    rest = (*quantizer, 0.5, integer(5), axis, None)
    y, outside = emulated("fake_quantize")["fake_quantize_marked"](x, *rest, dtype)
    assert_identical(y, kernels("reference")["fake_quantize"](x, *rest))
    assert_identical(outside, expected)


def test_division_is_the_rounded_quotient():
    """Scales whose reciprocals are inexact: multiplying by 1 / s would move some elements by a step."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(64, generator=generator) + 0.01
    steps = torch.randint(0, 2**16, (64, 40), generator=generator) + 0.5
    x = (steps * scale[:, None]).contiguous()
    assert_equals_reference((x, scale, torch.zeros(64), integer(16), 1.0, integer(0), 0))


def test_empty():
    assert_equals_reference(
        (torch.empty(0, 4), torch.tensor(0.1), torch.tensor(3.0), integer(4), 0.5, integer(8))
    )
