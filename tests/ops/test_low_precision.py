"""Linear layers in low precision: operands, gradients, and the same bits as the ops one by one."""

import contextlib
import itertools

import pytest
import torch
from numeric import DTYPES, SHAPES, assert_identical, integer
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.backends import kernels
from qnkernels.reference.low_precision import pack, unpack

INPUTS = (*SHAPES, (1, 5000), (2, 9001), (3, 4096), (70, 64), (9, 2, 33), (2, 40_001))


def state(low: float, high: float, step: int) -> tuple[torch.Tensor, ...]:
    return torch.tensor(low), torch.tensor(high), integer(step)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5, 3), (0,), (4, 16)], ids=str)
def test_packed_masks(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack(mask)
    assert packed.shape == ((mask.numel() + 7) // 8,) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, mask.shape), mask)
    for i, bit in enumerate(mask.flatten().tolist()):
        assert (packed[i // 8].item() >> (i % 8)) & 1 == bit


@pytest.mark.parametrize("shape", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_equals_reference(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(7, 13, generator=generator)
    for (bits, moves, step), weight_dtype in itertools.product(
        ((2, True, 0), (5, True, 3), (8, False, 2), (16, True, 1), (4, False, 0)), (dtype, torch.float32)
    ):
        x = (torch.randn(shape, generator=generator) * 2 + 0.5).to(dtype)
        states = {name: state(-1.0, 2.0, step) for name in ("cpu", "reference")}
        results = [
            (*kernels(name)["low_precision_operands_"](
                x, weight.to(weight_dtype), *each, integer(bits), 0.3, moves, bits != 8), *each)
            for name, each in states.items()
        ]  # fmt: skip
        for actual, expected in zip(*results, strict=True):
            assert_identical(actual, expected)
        assert states["cpu"][2] == step + moves
        grads = [torch.randn(shape, generator=generator).to(dtype)]
        grads.append(grads[0].clone())
        for grad, name in zip(grads, states, strict=True):
            kernels(name)["stop_gradient_"](grad, results[0][1])
        assert_identical(*grads)


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_operands_are_those_of_the_ops(moves, threads):
    """Of any number of threads, with values outside the range, as fake_quantize and its gradient see them."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 50, 129, generator=generator) * 2
    weight = torch.randn(300, 129, generator=generator)
    low, high, step = state(-1.5, 2.0, 5)
    before, threads_before = (low.clone(), high.clone(), step.clone()), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y, outside, quantized = F.low_precision_operands_(x, weight, low, high, step, 6, 0.1, moves)
    finally:
        torch.set_num_threads(threads_before)
    if moves:
        F.update_range_(x, *before, 6, "ema_minmax", 1, 0.1)
    for actual, expected in zip((low, high, step), before, strict=True):
        assert_identical(actual, expected)
    leaf = x.clone().requires_grad_()
    expected = F.fake_quantize(leaf, *F.quantization_parameters(low, high, 6), 6)
    assert_identical(y, expected.detach())
    (passed,) = torch.autograd.grad(expected, leaf, torch.ones_like(x))
    assert torch.equal(unpack(outside, x.shape), passed == 0)
    assert 0 < int((passed == 0).sum()) < x.numel() // 2
    assert_identical(quantized, F.dynamic_fake_quantize(weight, 6, per_sample=True))


def test_values_that_are_not_finite():
    x = torch.tensor([[float("nan"), 1.0, float("inf")], [-float("inf"), -3.0, 0.5]])
    for moves, step in ((False, 1), (True, 1), (True, 0)):
        results = []
        for name in ("cpu", "reference"):
            each = state(-1.0, 0.75, step)
            arguments = (x, torch.ones(2, 3), *each, integer(4), 0.5, moves, True)
            results.append((*kernels(name)["low_precision_operands_"](*arguments), *each))
        for actual, expected in zip(*results, strict=True):
            assert_identical(actual, expected)
        if not moves:
            assert results[0][0][0, 0].isnan() and results[0][0][0, 1:].isfinite().all()
            assert unpack(results[0][1], x.shape).tolist() == [[False, True, True], [True, True, False]]


def test_extreme_ranges():
    """Scales that are too small or too large for a product with the reciprocal."""
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(3))
    for scale, bits in itertools.product((1e-45, 1e-38, 1e-31, 1.0, 1e31, 1e37), (2, 8, 16)):
        results = []
        for name in ("cpu", "reference"):
            each = state(-1.5 * scale, 2 * scale, 3)
            arguments = (x * scale, x * scale, *each, integer(bits), 0.1, True, True)
            results.append((*kernels(name)["low_precision_operands_"](*arguments), *each))
        for actual, expected in zip(*results, strict=True):
            assert_identical(actual, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad_bits", [4, None])
def test_low_precision_linear_is_the_composition(bias, grad_bits):
    """Quantized x and weight, straight-through gradients, and a gradient that was quantized before."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 7, 12, generator=generator).requires_grad_()
    weight = torch.randn(5, 12, generator=generator).requires_grad_()
    offset = torch.randn(5, generator=generator).requires_grad_() if bias else None
    wanted = [tensor for tensor in (x, weight, offset) if tensor is not None]
    grad = torch.randn(2, 7, 5, generator=generator)
    scale, zero_point = torch.tensor(0.1), torch.tensor(8.0)  # not for all of x
    outside = pack((x.detach() < -8 * scale) | (x.detach() > 7 * scale))
    quantized = F.fake_quantize(x, scale, zero_point, 4), F.dynamic_fake_quantize(weight, 4)
    composed = torch.nn.functional.linear(*quantized, offset)
    detached = (tensor.detach() for tensor in quantized)
    y = F.low_precision_linear(x, weight, offset, *detached, outside, grad_bits, 3)
    assert_identical(y, composed)
    coarse = grad
    if grad_bits is not None:
        coarse = F.dynamic_fake_quantize(grad, grad_bits, per_sample=True, stochastic=True, seed=3)
        assert not torch.equal(coarse, grad)
    expected = torch.autograd.grad(composed, wanted, coarse)
    assert 0 < int((expected[0] == 0).sum()) < x.numel()
    actual = torch.autograd.grad(y, wanted, grad, create_graph=True)  # out of place
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(torch.autograd.grad(y, wanted, grad, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(one, other)
    y.relu_()  # not a view: activations may work in place


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Straight(torch.autograd.Function):
    """y as a function of x with the gradient of fake_quantize: one op after another, none in place."""

    @staticmethod
    def forward(ctx, x, y, *quantizer):
        ctx.save_for_backward(x, *quantizer)
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point, bits = ctx.saved_tensors
        arguments = scale, zero_point, bits, 1.0, bits, None, None
        grad_x = qnk.ops.fake_quantize.fake_quantize_backward(grad, x, *arguments)
        return grad_x, None, None, None, None


def one_by_one(x, weight, bias, low, high, step, bits, momentum, moves, per_channel, grad_bits, seed):
    """moving_low_precision_linear of the ops that it is said to be."""
    if moves:
        F.update_range_(x.detach(), low, high, step, bits, "ema_minmax", 1, momentum)
    quantizer = F.quantization_parameters(low, high, bits)
    quantized = Straight.apply(x, F.fake_quantize(x.detach(), *quantizer, bits), *quantizer, bits.clone())
    y = torch.nn.functional.linear(quantized, F.dynamic_fake_quantize(weight, bits, per_channel), bias)
    return y if grad_bits is None else F.quantize_gradient(y, grad_bits, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "grad_bits"), [(True, 5), (False, 8), (True, None)])
@pytest.mark.parametrize("shape", [(13,), (5, 13), (3, 7, 13), (2, 1, 3, 13), (4, 700, 13)], ids=str)
def test_one_call_has_the_bits_of_many(shape, bias, grad_bits, dtype):
    """Result, state of the range and every gradient, whether ops are looked at or not."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(9, 13, generator=generator).to(dtype)
    offset = torch.randn(9, generator=generator).to(dtype) if bias else None
    each = {name: state(-1.0, 1.5, 2) for name in ("direct", "watched", "many")}
    for moves, bits in ((True, 3), (True, 8), (False, 4)):
        x = torch.randn(shape, generator=generator).to(dtype) * 1.5
        grad = torch.randn(*shape[:-1], 9, generator=generator).to(dtype)
        results = []
        for name, ranges in each.items():
            leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, offset)]
            width = None if grad_bits is None else integer(grad_bits)
            precision = integer(bits)
            arguments = *leaves, *ranges, precision, 0.1, moves, True, width, integer(7)
            with Watching() if name == "watched" else contextlib.nullcontext():
                y = (one_by_one if name == "many" else F.moving_low_precision_linear)(*arguments)
            assert name == "many" or ("_Direct" in y.grad_fn.name()) == (name == "direct")
            precision.fill_(2)  # of the next forward: this backward must not see it
            wanted = [leaf for leaf in leaves if leaf is not None]
            grads = torch.autograd.grad(y, wanted, grad, retain_graph=True)
            again = torch.autograd.grad(y, wanted, grad, create_graph=True)  # out of place
            for first, second in zip(grads, again, strict=True):
                assert_identical(first, second.detach())
            results.append((y.detach(), *grads, *(tensor.clone() for tensor in ranges)))
            y.relu_()  # not a view: activations may work in place
        assert 0 < int((results[0][1] == 0).sum()) < x.numel() or x.numel() == 13
        for result in results[:2]:
            for actual, expected in zip(result, results[2], strict=True):
                assert_identical(actual, expected)


def test_frozen_parts_get_no_gradient():
    x, weight, offset = torch.randn(4, 6), torch.randn(3, 6), torch.randn(3)
    for wanted in itertools.product((True, False), repeat=3):
        leaves = [t.clone().requires_grad_(flag) for t, flag in zip((x, weight, offset), wanted, strict=True)]
        y = F.moving_low_precision_linear(*leaves, *state(-1.0, 1.0, 1))
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)


@pytest.mark.parametrize("moves", [True, False])
def test_registered_as_ops(moves):
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    arguments = x, weight, *state(-1.0, 1.0, 1), integer(4), 0.1, moves, True
    opcheck(torch.ops.qnkernels.low_precision_operands_, arguments)
    opcheck(torch.ops.qnkernels.stop_gradient_, (x, torch.tensor([5, 7], dtype=torch.uint8)))


def test_bad_input():
    x, weight, ok = torch.randn(3, 4), torch.randn(2, 4), state(0.0, 0.0, 0)
    call = F.low_precision_operands_
    with pytest.raises(ValueError, match=r"bits: expected an integer in \[2, 16\], got 1"):
        call(x, weight, *ok, 1)
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16"):
        call(x.double(), weight, *ok)
    with pytest.raises(TypeError, match="weight: expected float32, bfloat16 or float16"):
        call(x, weight.double(), *ok)
    with pytest.raises(ValueError, match=r"momentum: expected a rate in \(0, 1\]"):
        call(x, weight, *ok, momentum=0.0)
    with pytest.raises(ValueError, match=r"low: expected shape \(\)"):
        call(x, weight, torch.zeros(3), *ok[1:])
    with pytest.raises(TypeError, match=r"high: expected torch\.float32"):
        call(x, weight, ok[0], ok[1].double(), ok[2])
    with pytest.raises(ValueError, match="step: expected a 0-d int64 tensor"):
        call(x, weight, *ok[:2], torch.zeros(1))
    with pytest.raises(ValueError, match="x: expected at least one element"):
        call(x[:0], weight, *ok)
    stop = torch.ops.qnkernels.stop_gradient_
    with pytest.raises(ValueError, match="outside: expected a bit for each of 12 elements"):
        stop(x, torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="grad: expected a contiguous tensor"):
        stop(x.t(), torch.zeros(2, dtype=torch.uint8))
    with qnk.backend("cpu"), pytest.raises(ValueError, match="bits"):
        call(x, weight, *ok, integer(33))
