"""minmax, histogram_range and update_range_ under the interpreter."""

import itertools

import pytest
import torch
from numeric import DTYPES, assert_identical, integer, layouts

from qnkernels import functional as F
from qnkernels.backends import kernels
from qnkernels.reference import range as reference_range

# one element, prime, a tile of 2048 and past it (two stages), columns, columns past a tile, runs in columns
SHAPES = ((1,), (7,), (5, 64), (3, 2049), (9001,), (300, 2), (130, 3, 9), (4, 45), (2100, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_minmax_equals_reference(shape):
    generator = torch.Generator().manual_seed(len(shape))
    turns = itertools.cycle(itertools.product((None, float("nan"), float("inf"), -float("inf")), DTYPES))
    for (axis, group_size), _ in itertools.product(layouts(shape), range(3)):
        poison, dtype = next(turns)
        x = torch.randn(shape, generator=generator).to(dtype)
        if poison is not None:
            x.view(-1)[torch.randint(0, x.numel(), (), generator=generator)] = poison
        ranges = (kernels(name)["minmax"](x, axis, group_size) for name in ("triton", "reference"))
        for actual, expected in zip(*ranges, strict=True):
            assert_identical(actual, expected)


def squared_error(x, low, high, bits, axis):
    """The objective of histogram_range, per row, float64."""
    elements = x.float().movedim(axis, 0).flatten(1) if axis is not None else x.float().reshape(1, -1)
    whole_low, whole_high = (value.reshape(-1) for value in F.minmax(elements, 0))
    counts, centers = reference_range._histogram(elements, whole_low.clamp(max=0), whole_high.clamp(min=0))
    return reference_range._squared_error(counts, centers, low.reshape(-1), high.reshape(-1), integer(bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    [
        ((2500,), None, torch.float32),
        ((1,), None, torch.float32),
        ((3, 600), 0, torch.bfloat16),
        ((500, 2), 1, torch.float16),
        ((40, 2, 30), 1, torch.float32),
    ],
)
def test_histogram_range_reaches_the_reference_objective(shape, axis, dtype, bits):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(bits)) ** 3).to(dtype)
    actual = kernels("triton")["histogram_range"](x, integer(bits), axis)
    expected = kernels("reference")["histogram_range"](x, integer(bits), axis)
    assert actual[0].shape == expected[0].shape
    errors = [squared_error(x, *found, bits, axis) for found in (actual, expected)]
    torch.testing.assert_close(*errors, rtol=1e-6, atol=0)


def test_histogram_range_per_group():
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(5))
    ranges = (kernels(name)["histogram_range"](x, integer(4), None, 48) for name in ("triton", "reference"))
    for actual, expected in zip(*ranges, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-40, float("nan"), float("inf"), -float("inf")])
def test_histogram_range_of_odd_values(value):
    x = torch.full((2, 60), value)
    x[1, 0] = 1.0
    ranges = (kernels(name)["histogram_range"](x, integer(4), 0) for name in ("triton", "reference"))
    for actual, expected in zip(*ranges, strict=True):
        assert_identical(actual, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_quantization_parameters_equal_reference(bits, symmetric):
    """Ranges around 0, on one side of it, empty, denormal, infinite and NaN."""
    generator = torch.Generator().manual_seed(bits)
    low, high = torch.randn(2, 300, generator=generator).sort(dim=0).values * 5
    odd = torch.tensor([0.0, 1e-45, 1e-40, 2.5, float("inf"), float("nan")])
    low = torch.cat((low, -odd, odd, -odd)).contiguous()
    high = torch.cat((high, odd, odd, torch.zeros(6))).contiguous()
    arguments = (low, high, integer(bits), symmetric)
    results = (kernels(name)["quantization_parameters"](*arguments) for name in ("triton", "reference"))
    for actual, expected in zip(*results, strict=True):
        assert_identical(actual, expected)


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("observer", ["minmax", "ema_minmax", "histogram"])
@pytest.mark.parametrize("axis", [None, 0])
def test_update_range_follows_the_reference(observer, every, axis):
    generator = torch.Generator().manual_seed(every)
    shape = () if axis is None else (2,)
    ours, theirs = ([torch.zeros(shape), torch.zeros(shape), integer(0)] for _ in range(2))
    for i in range(5 if observer == "histogram" else 8):
        x = torch.randn(2, 1500, generator=generator) * (i + 1)
        arguments = (integer(4), observer, every, 0.3, axis)
        kernels("triton")["update_range_"](x, *ours, *arguments)
        kernels("reference")["update_range_"](x, *theirs, *arguments)
        for actual, expected in zip(ours, theirs, strict=True):
            assert_identical(actual, expected)


def test_ranges_that_are_not_contiguous():
    low, high = torch.zeros(3, 2), torch.zeros(2, 3, 2)
    state = [low[:, 0], high[1, :, 1], integer(0)]
    x = torch.randn(3, 40)
    kernels("triton")["update_range_"](x, *state, integer(8), "minmax", 1, 0.1, 0)
    assert_identical(low, torch.stack((x.amin(1), torch.zeros(3)), dim=1))
    assert_identical(high[1, :, 1], x.amax(1))
    assert high.count_nonzero() == 3


def test_a_loaded_step_is_honoured():
    """Resumed at step 5 of every 3: step 6 is the next that is due."""
    state = [torch.tensor(-1.0), torch.tensor(1.0), integer(5)]
    x = torch.randn(100) * 10
    kernels("triton")["update_range_"](x, *state, integer(8), "minmax", 3, 0.1)
    assert [value.item() for value in state] == [-1, 1, 6]
    kernels("triton")["update_range_"](x, *state, integer(8), "minmax", 3, 0.1)
    assert [value.item() for value in state] == [x.min().item(), x.max().item(), 7]
