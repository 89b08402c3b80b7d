"""Fake quantization over ranges that follow the data: formula, exactness, random rounding, gradients."""

import pytest
import torch
from numeric import DTYPES, SHAPES, assert_identical, integer, layouts, random_seed
from torch.library import opcheck

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.backends import kernels
from qnkernels.reference.philox import draws

SAMPLES = (*SHAPES, (1, 5000), (2, 9001), (3, 4096), (70, 64), (9, 2, 33))


@pytest.mark.parametrize("shape", SAMPLES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_equals_reference(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    for bits, per_sample, stochastic, out_dtype in (
        *((2, True, True, dtype), (8, True, False, dtype), (16, False, True, torch.bfloat16)),
        *((3, False, False, torch.float32), (8, True, True, dtype), (13, False, True, dtype)),
    ):
        x = (torch.randn(shape, generator=generator) * 3 + 0.5).to(dtype)
        arguments = (x, integer(bits), random_seed(generator), per_sample, stochastic, out_dtype)
        actual, expected = (
            kernels(name)["dynamic_fake_quantize"](*arguments) for name in ("cpu", "reference")
        )
        assert_identical(actual, expected)


@pytest.mark.parametrize("stochastic", [False, True])
def test_not_finite_and_extreme_values_equal_the_reference(stochastic):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 37, generator=generator)
    x[0, 5], x[1, 3], x[2, 0], x[3, 36] = float("nan"), float("inf"), -float("inf"), 3e38
    x[4], x[5], x[6], x[7] = 0.0, 1.5, -2.0, 1e-40
    x[8] *= 1e-38
    x[9] *= 1e37
    x[10] = x[10].abs()
    for per_sample in (True, False):
        arguments = (x, integer(4), integer(9), per_sample, stochastic)
        actual, expected = (
            kernels(name)["dynamic_fake_quantize"](*arguments) for name in ("cpu", "reference")
        )
        assert_identical(actual, expected)
    y = F.dynamic_fake_quantize(x, 4, per_sample=True, stochastic=stochastic, seed=9)
    assert y[4].eq(0).all()  # all zeros: the range has no width
    assert y[0].isnan().all() and y[9:].isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 8, 12, 16])
def test_formula_in_float64(bits):
    x = torch.randn(6, 500, generator=torch.Generator().manual_seed(bits)).double().float()
    y = F.dynamic_fake_quantize(x, bits, per_sample=True).double()
    low, high = x.double().amin(1, True).clamp(max=0), x.double().amax(1, True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    levels = y / step
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=0.02)
    # half a step, and where the rounded zero point cuts off the outermost value, as much again
    assert ((y - x.double()).abs() <= step * 1.01).all()
    inner = (x > low + step) & (x < high - step)
    assert ((y - x.double()).abs() <= step * 0.502)[inner].all()


def test_random_rounding_is_right_on_average():
    """Each of 4000 draws is a neighbouring level; their mean is the value within five standard errors."""
    generator = torch.Generator().manual_seed(11)
    x = torch.rand(1, 257, generator=generator)
    x[0, 0], x[0, 256] = 0.0, 1.0
    repeats, step = 4000, 1 / 15
    samples = torch.stack(
        [
            F.dynamic_fake_quantize(x, 4, stochastic=True, seed=random_seed(generator))[0]
            for _ in range(repeats)
        ]
    ).double()
    distance = (samples - x.double()).abs()
    assert (distance < step * (1 + 1e-5)).all()
    part = (x[0].double() / step) % 1
    error = step * (part * (1 - part) / repeats).sqrt()
    assert ((samples.mean(0) - x[0].double()).abs() <= 5 * error + 1e-6).all()
    assert (samples.std(0) > 0).sum() > 200


def test_levels_stay_where_they_are():
    """On a level there is nothing to round; sixteenths are exact in every step of the arithmetic."""
    x = torch.arange(0, 256).float()[None] / 16
    for seed in range(20):
        assert_identical(F.dynamic_fake_quantize(x, 8, stochastic=True, seed=seed), x)


def test_draws_decide_which_level():
    x = torch.full((1, 999), 0.4)
    x[0, 0], x[0, 1] = 0.0, 3.0
    seed = integer(123456789)
    y = F.dynamic_fake_quantize(x, 2, stochastic=True, seed=seed)
    up = draws(999, seed).double() + 0.5 < 65536 * 0.4
    assert torch.equal(y[0, 2:] == 1.0, up[2:])
    assert 0.3 < up.double().mean() < 0.5


def test_samples_are_independent():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, 4, 31, generator=generator) * torch.tensor([1e-4, 1, 50, 1e4, 2])[:, None, None]
    y = F.dynamic_fake_quantize(x, 6, per_sample=True)
    for i in range(5):
        assert_identical(y[i], F.dynamic_fake_quantize(x[i], 6))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 50_000), (2, 9001), (257, 65), (4000, 3)], ids=str)
def test_any_number_of_threads_gives_the_same(shape, threads):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator)
    before = torch.get_num_threads()
    arguments = (x, integer(5), integer(7), True, True)
    expected = kernels("reference")["dynamic_fake_quantize"](*arguments)
    try:
        torch.set_num_threads(threads)
        assert_identical(kernels("cpu")["dynamic_fake_quantize"](*arguments), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moving_range_equals_reference(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    for axis, group_size in layouts(shape):
        x = torch.randn(shape, generator=generator).to(dtype)
        low, _ = F.minmax(x, axis, group_size)
        states = {name: (low * 0, low * 0, integer(0)) for name in ("cpu", "reference")}
        for bits, out_dtype in ((4, dtype), (8, torch.float32), (16, torch.bfloat16)):
            x = torch.randn(shape, generator=generator).to(dtype)
            results = [
                (*kernels(name)["moving_fake_quantize_"](
                    x, *state, integer(bits), 0.3, axis, group_size, out_dtype), *state)
                for name, state in states.items()
            ]  # fmt: skip
            for actual, expected in zip(*results, strict=True):
                assert_identical(actual, expected)
        assert states["cpu"][2] == 3


def test_moving_range_is_the_average_of_the_ranges():
    low, high, step = torch.zeros(()), torch.zeros(()), integer(0)
    batches = [torch.tensor([-1.0, 0.25, 3.0]), torch.tensor([-2.0, 0.0, 8.0])]
    F.moving_fake_quantize(batches[0], low, high, step, 8, momentum=0.25)
    assert (low.item(), high.item(), step.item()) == (-1.0, 3.0, 1)
    y = F.moving_fake_quantize(batches[1], low, high, step, 8, momentum=0.25)
    assert (low.item(), high.item(), step.item()) == (-1.25, 4.25, 2)
    quantizer = F.quantization_parameters(low, high, 8)
    assert_identical(y, F.fake_quantize(batches[1], *quantizer, 8))


def test_moving_range_of_strided_buffers():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    low, high, step = torch.zeros(3, 2)[:, 0], torch.zeros(3, 2)[:, 1], integer(0)
    F.moving_fake_quantize(x, low, high, step, 8, axis=0)
    assert_identical(low, x.amin(1))
    assert_identical(high, x.amax(1))


def test_gradients():
    """The identity over the own range; stopped outside a moving one, at the precision of the forward."""
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grad = torch.randn(4, 9)
    (passed,) = torch.autograd.grad(F.dynamic_fake_quantize(x, 3, per_sample=True), x, grad)
    assert_identical(passed, grad)
    low, high, step = torch.tensor(-0.5), torch.tensor(0.5), integer(1)
    bits = integer(4)
    y = F.moving_fake_quantize(x, low, high, step, bits, momentum=1e-6)
    quantizer = F.quantization_parameters(low, high, 4)
    bits.fill_(8)
    (passed,) = torch.autograd.grad(y, x, grad)
    again = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.fake_quantize(again, *quantizer, 4), again, grad)
    assert_identical(passed, expected)
    assert 0 < int((passed == 0).sum()) < 36


def test_quantize_gradient_is_the_identity_with_a_quantized_gradient():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4)).requires_grad_()
    grad = torch.randn(3, 5, 8)
    y = F.quantize_gradient(x, 3, seed=8)
    assert_identical(y, x)
    (actual,) = torch.autograd.grad(y, x, grad)
    assert_identical(actual, F.dynamic_fake_quantize(grad, 3, per_sample=True, stochastic=True, seed=8))


def test_an_empty_batch():
    x = torch.empty(0, 6, requires_grad=True)
    weight = torch.randn(4, 6, requires_grad=True)
    F.low_precision_linear(x, weight, None, x.detach(), weight.detach(), None, 8, 1).sum().backward()
    assert x.grad.shape == (0, 6)
    assert_identical(weight.grad, torch.zeros(4, 6))
    assert F.dynamic_fake_quantize(x, 8, per_sample=True).shape == (0, 6)


@pytest.mark.parametrize("per_sample", [True, False])
def test_registered_as_ops(per_sample):
    x = torch.randn(3, 5, requires_grad=True)
    opcheck(torch.ops.qnkernels.dynamic_fake_quantize, (x, integer(4), integer(1), per_sample, per_sample))
    moving = (x.detach(), torch.zeros(()), torch.zeros(()), integer(0), integer(4), 0.1)
    opcheck(torch.ops.qnkernels.moving_fake_quantize_, moving)


def test_compiles_without_a_graph_break():
    """One compilation for every precision, seed and state of the range."""
    count = 0

    def backend(graph, _):
        nonlocal count
        count += 1
        return graph

    x = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(3, 6, requires_grad=True)
    low, high, step = torch.zeros(()), torch.zeros(()), integer(0)

    def layer(x, bits, seed):
        quantized = F.moving_fake_quantize(x, low, high, step, bits, 0.5)
        rounded = F.dynamic_fake_quantize(weight.detach(), bits)
        y = F.low_precision_linear(quantized, weight, None, quantized.detach(), rounded, None, bits, seed)
        return F.quantize_gradient(y, bits, seed)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for bits, seed in ((3, 1), (8, 2), (5, 3)):
        state = low.clone(), high.clone(), step.clone()
        actual = compiled(x, integer(bits), integer(seed))
        after = low.clone(), high.clone(), step.clone()
        for buffer, old in zip((low, high, step), state, strict=True):
            buffer.copy_(old)
        expected = layer(x, integer(bits), integer(seed))
        assert_identical(actual, expected)
        for one, other in zip(after, (low, high, step), strict=True):
            assert_identical(one, other)
        for one, other in zip(
            *(torch.autograd.grad(y.sum(), (x, weight)) for y in (actual, expected)), strict=True
        ):
            assert_identical(one, other)
    assert count == 1


def test_bad_input():
    x, ok = torch.randn(3, 4), (torch.zeros(()), torch.zeros(()), integer(0))
    with pytest.raises(ValueError, match=r"bits: expected an integer in \[2, 16\], got 1"):
        F.dynamic_fake_quantize(x, 1)
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16"):
        F.dynamic_fake_quantize(x.double())
    with pytest.raises(ValueError, match="x: expected a dimension of samples"):
        F.dynamic_fake_quantize(torch.tensor(1.0), per_sample=True)
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16"):
        F.dynamic_fake_quantize(x, dtype=torch.int8)
    for momentum in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"momentum: expected a rate in \(0, 1\]"):
            F.moving_fake_quantize(x, *ok, momentum=momentum)
    with pytest.raises(ValueError, match=r"low: expected shape \(3,\)"):
        F.moving_fake_quantize(x, *ok, axis=0)
    with pytest.raises(ValueError, match="x: expected at least one element"):
        F.moving_fake_quantize(x[:0], *ok)
    with pytest.raises(TypeError, match="expected that of quantized_weight"):
        F.low_precision_linear(x, x, None, x, x.bfloat16())
    for name in ("cpu", "reference"):
        with qnk.backend(name), pytest.raises(ValueError, match="bits"):
            F.dynamic_fake_quantize(x, 33)
