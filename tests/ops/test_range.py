"""minmax, histogram_range, update_range_ and the quantizer that a range defines."""

import numpy as np
import pytest
import torch
from numeric import DTYPES, SHAPES, assert_identical, integer, layouts

from qnkernels import functional as F
from qnkernels.backends import kernels


@pytest.mark.parametrize("shape", [*SHAPES, (70_001,), (300, 2), (2, 300, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minmax_equals_numpy(shape, dtype):
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator).to(dtype)
    for poison in (None, float("inf"), -float("inf"), float("nan")):
        if poison is not None:
            x.view(-1)[torch.randint(0, x.numel(), (), generator=generator)] = poison
        for axis, group_size in layouts(shape):
            low, high = F.minmax(x, axis, group_size)
            values = x.float().numpy()
            if group_size is not None:
                values, axes = values.reshape(*shape[:-1], -1, group_size), (-1,)
            else:
                axes = tuple(i for i in range(len(shape)) if i != axis)
            np.testing.assert_array_equal(low.numpy(), values.min(axes))
            np.testing.assert_array_equal(high.numpy(), values.max(axes))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "axis", "group_size"), [((5000,), None, None), ((9, 600), 0, None), ((4, 96), None, 48)]
)
def test_histogram_range_equals_reference(bits, shape, axis, group_size):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) ** 3
    arguments = (x, integer(bits), axis, group_size)
    ranges = (kernels(name)["histogram_range"](*arguments) for name in ("cpu", "reference"))
    for actual, expected in zip(*ranges, strict=True):
        assert_identical(actual, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", [1, 3])
def test_histogram_range_is_near_the_best(bits, power):
    """Within 3 % of the least squared error over a 64 x 64 grid of ranges, and below that of min/max."""
    x = torch.randn(600, generator=torch.Generator().manual_seed(bits)) ** power

    def error(low, high):
        scale, zero_point = F.quantization_parameters(low, high, bits)
        return (F.fake_quantize(x, scale, zero_point, bits) - x).double().square().sum().item()

    low, high = F.minmax(x)
    shrink = 1 - torch.arange(64) / 64
    best = min(error(low * i, high * j) for i in shrink for j in shrink)
    found = error(*F.histogram_range(x, bits))
    assert found < 1.03 * best
    assert found < (1.0 if bits < 8 else 1.01) * error(low, high)


def test_histogram_range_of_odd_values():
    for x in (torch.zeros(10), torch.full((10,), 3.0), torch.tensor([-2.0]), torch.tensor([1e-40, 0.0])):
        low, high = F.histogram_range(x, 4)
        assert low <= 0 <= high
        scale, zero_point = F.quantization_parameters(low, high, 4)
        torch.testing.assert_close(F.fake_quantize(x, scale, zero_point, 4), x, rtol=0.05, atol=1e-30)
    for name in ("cpu", "reference"):
        low, _ = kernels(name)["histogram_range"](torch.tensor([1.0, float("nan")]), integer(4))
        assert low.isnan()


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_quantization_parameters(bits):
    low, high = torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([2.0, 4.0, -1.0, 0.0])
    scale, zero_point = F.quantization_parameters(low, high, bits)
    top = 2**bits - 1
    torch.testing.assert_close(scale, torch.tensor([3.0, 4.0, 3.0, top]) / top)
    assert zero_point.tolist() == [round(top / 3), 0, top, 0]
    scale, zero_point = F.quantization_parameters(low, high, bits, symmetric=True)
    torch.testing.assert_close(scale[:3], torch.tensor([2.0, 4.0, 3.0]) / (2 ** (bits - 1) - 1))
    assert (zero_point == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantization_parameters_equal_reference(symmetric):
    generator = torch.Generator().manual_seed(4)
    bounds = torch.randn(2, 5, 40, generator=generator) * torch.tensor([1e-40, 1e-7, 1.0, 1e20, 3.0])[:, None]
    bounds[:, 0, :3] = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 1.0, float("nan")]])
    low, high = bounds.amin(0), bounds.amax(0)
    low[0, :3], high[0, :3] = bounds[0, 0, :3], bounds[1, 0, :3]
    for bits in (2, 8, 16):
        results = (
            kernels(name)["quantization_parameters"](low, high, integer(bits), symmetric)
            for name in ("cpu", "reference")
        )
        for actual, expected in zip(*results, strict=True):
            assert_identical(actual, expected)


def test_update_range_is_due_at_multiples():
    state = (torch.zeros(()), torch.zeros(()), integer(0))
    seen = []
    for i in range(1, 8):
        F.update_range_(torch.tensor([-1.0, 1.0]) * i, *state, every=3)
        seen.append(state[1].item())
    assert seen == [1, 1, 1, 4, 4, 4, 7]
    assert state[2].item() == 7


def test_update_range_with_every_0_observes_once():
    state = (torch.zeros(()), torch.zeros(()), integer(0))
    for i in range(1, 4):
        F.update_range_(torch.tensor([-1.0, 1.0]) * i, *state, every=0)
    assert (state[0].item(), state[1].item(), state[2].item()) == (-1, 1, 3)


def test_ema_starts_at_the_first_range_and_moves_by_momentum():
    state = (torch.zeros(2), torch.zeros(2), integer(0))
    first, second = torch.randn(2, 50), torch.randn(2, 50) * 4
    for x in (first, second):
        F.update_range_(x, *state, observer="ema_minmax", momentum=0.25, axis=0)
    for got, pick in ((state[0], torch.amin), (state[1], torch.amax)):
        torch.testing.assert_close(got, pick(first, 1) * 0.75 + pick(second, 1) * 0.25)


def test_opcheck():
    x = torch.randn(6, 16)
    torch.library.opcheck(torch.ops.qnkernels.minmax.default, (x, 0))
    torch.library.opcheck(torch.ops.qnkernels.histogram_range.default, (x, integer(4), None, 8))
    torch.library.opcheck(torch.ops.qnkernels.quantization_parameters.default, (x, x.abs(), integer(4)))
    state = (torch.zeros(6), torch.zeros(6), integer(0))
    for observer in ("minmax", "ema_minmax", "histogram"):
        arguments = (x, *state, integer(4), observer, 2, 0.5, 0)
        torch.library.opcheck(torch.ops.qnkernels.update_range_.default, arguments)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.minmax(torch.empty(0)), ValueError, ("x", "(0,)")),
        (lambda: F.minmax(torch.ones(3).long()), TypeError, ("x", "int64")),
        (lambda: F.minmax(torch.ones(3), group_size=2), ValueError, ("group_size", "2")),
        (
            lambda: F.update_range_(
                torch.ones(3), torch.zeros(()), torch.zeros(()), integer(0), observer="mad"
            ),
            ValueError,
            ("observer", "mad"),
        ),
        (
            lambda: F.update_range_(
                torch.ones(3), torch.zeros(()), torch.zeros(()), integer(0), momentum=0.0
            ),
            ValueError,
            ("momentum", "0.0"),
        ),
        (
            lambda: F.update_range_(torch.ones(3), torch.zeros(2), torch.zeros(()), integer(0)),
            ValueError,
            ("low", "()", "(2,)"),
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
