"""minmax, histogram_range and update_range_ on a GPU: equal to the reference on the CPU."""

import pytest
import torch

import qnkernels as qnk
from qnkernels import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# shape, axis, group_size
CASES = [
    ((1,), None, None),
    ((1009,), None, None),
    ((33, 77), None, None),
    ((33, 77), 0, None),
    ((33, 77), 1, None),
    ((5, 3, 16), 1, None),
    ((5, 3, 16), 2, None),
    ((12, 96), None, 32),
    ((12, 96), None, 3),
]


def both(device, backend, function, x):
    """(expected on the CPU by the reference, actual on the device by the backend), as tuples."""
    with qnk.backend("reference"):
        expected = function(x)
    with qnk.backend(backend):
        actual = function(x.to(device))
    return expected, tuple(one.cpu() for one in actual)


def assert_equal(actual, expected):
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.of("minmax")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "group_size"), CASES)
def test_minmax(device, backend, dtype, shape, axis, group_size):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    expected, actual = both(device, backend, lambda t: F.minmax(t, axis, group_size), x)
    assert_equal(actual, expected)


@pytest.mark.of("minmax")
def test_minmax_passes_nan_on(device, backend):
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    x[4, 123] = float("nan")
    x[6, 7] = -float("inf")
    expected, actual = both(device, backend, lambda t: F.minmax(t, 0), x)
    assert actual[0][4].isnan() and actual[1][4].isnan()
    assert_equal(actual, expected)


@pytest.mark.of("minmax")
@pytest.mark.needs_cuda
def test_minmax_of_a_large_tensor(device, backend):
    x = torch.randn(40_000_003, generator=torch.Generator().manual_seed(1))
    x[31_234_567], x[17] = 77.0, -78.0
    expected, actual = both(device, backend, F.minmax, x)
    assert_equal(actual, expected)


@pytest.mark.of("histogram_range")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "axis", "group_size"), [((50, 61), None, None), ((6, 200), 0, None), ((4, 96), None, 48)]
)
def test_histogram_range(device, backend, bits, shape, axis, group_size):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) ** 3
    expected, actual = both(device, backend, lambda t: F.histogram_range(t, bits, axis, group_size), x)
    assert_equal(actual, expected)


@pytest.mark.of("histogram_range")
@pytest.mark.needs_cuda
def test_histogram_range_of_a_layer(device, backend):
    x = torch.randn(3072, 768, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected, actual = both(device, backend, lambda t: F.histogram_range(t, 4), x)
    assert_equal(actual, expected)


@pytest.mark.of("quantization_parameters")
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantization_parameters(device, backend, bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    for shape in ((), (1,), (777,), (12, 5)):
        ends = torch.randn(2, *shape, generator=generator)
        for low, high in ((ends.amin(0), ends.amax(0)), (ends.abs().amin(0), ends.abs().amax(0))):
            with qnk.backend("reference"):
                expected = F.quantization_parameters(low, high, bits, symmetric)
            with qnk.backend(backend):
                actual = F.quantization_parameters(low.to(device), high.to(device), bits, symmetric)
            assert_equal([one.cpu() for one in actual], expected)


@pytest.mark.of("quantization_parameters")
def test_quantization_parameters_of_a_range_without_width(device, backend):
    zeros = torch.zeros(3)
    with qnk.backend(backend):
        scale, zero_point = F.quantization_parameters(zeros.to(device), zeros.to(device), 8)
    assert_equal([scale.cpu(), zero_point.cpu()], [torch.ones(3), zeros])


@pytest.mark.of("update_range_")
@pytest.mark.parametrize("observer", ["minmax", "ema_minmax", "histogram"])
@pytest.mark.parametrize("every", [0, 1, 3])
def test_update_range(device, backend, observer, every):
    """Seven forwards on changing weights: the same state after each one."""
    generator = torch.Generator().manual_seed(every)
    state = [torch.zeros(5), torch.zeros(5), torch.zeros((), dtype=torch.int64)]
    theirs = [one.to(device) for one in state]
    for _ in range(7):
        x = torch.randn(5, 83, generator=generator)
        with qnk.backend("reference"):
            F.update_range_(x, *state, 8, observer, every, 0.3, 0)
        with qnk.backend(backend):
            F.update_range_(x.to(device), *theirs, 8, observer, every, 0.3, 0)
        assert int(theirs[2]) == int(state[2])
        assert_equal([one.cpu() for one in theirs[:2]], state[:2])
