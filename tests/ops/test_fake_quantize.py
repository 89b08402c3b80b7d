"""fake_quantize: formula, exactness of every backend, gradient, registration, bad input."""

import itertools
import math

import pytest
import torch
from numeric import DTYPES, SHAPES, assert_identical, few_outside, integer, layouts, random_seed

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.backends import kernels
from qnkernels.reference.philox import noise_mask


def case(shape, dtype, axis, group_size, bits, generator):
    """x with values outside the range, and the scale and zero point of most of it."""
    x = torch.randn(shape, generator=generator) * 3
    low, high = F.minmax(x, axis, group_size)
    scale, zero_point = F.quantization_parameters(low * 0.7, high * 0.7, bits)
    return x.to(dtype), scale, zero_point


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_equals_reference(shape, dtype):
    generator = torch.Generator().manual_seed(hash((shape, str(dtype))) % 2**31)
    cpu, reference = kernels("cpu"), kernels("reference")
    for axis, group_size in layouts(shape):
        for bits, p, out_dtype in (
            (2, 0.5, dtype),
            (8, 0.05, torch.bfloat16),
            (16, 1.0, dtype),
            (4, 0.0, dtype),
        ):
            x, scale, zero_point = case(shape, dtype, axis, group_size, bits, generator)
            arguments = (x, scale, zero_point, integer(bits), p, random_seed(generator), axis, group_size)
            forward = "fake_quantize"
            assert_identical(cpu[forward](*arguments, out_dtype), reference[forward](*arguments, out_dtype))
            grad = torch.randn(shape, generator=generator).to(out_dtype)
            backward = "fake_quantize_backward"
            expected = reference[backward](grad, *arguments)
            assert_identical(cpu[backward](grad, *arguments), expected)
            if out_dtype == dtype:  # in place
                assert_identical(cpu[backward](grad, *arguments, out=grad), expected)
                assert_identical(grad, expected)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_with_values_outside_are_marked(dtype, axis):
    """The marks, which do not depend on the noise; the gradient is the same with them, in place too."""
    x, quantizer, expected = few_outside(dtype, axis)
    for name, p in itertools.product(("cpu", "reference"), (0.0, 0.1, 0.5, 1.0)):
        run, rest = kernels(name), (*quantizer, p, integer(5), axis, None)
        outside = torch.full_like(expected, 9)
        assert_identical(run["fake_quantize"](x, *rest, dtype, outside), run["fake_quantize"](x, *rest))
        assert_identical(outside, expected)
        for grad_dtype in DTYPES:
            grad = torch.randn(x.shape).to(grad_dtype)
            passed = run["fake_quantize_backward"](grad, x, *rest)
            assert_identical(run["fake_quantize_backward"](grad, x, *rest, outside), passed)
            if p == 1.0:
                stopped = (passed != grad.to(dtype)).flatten().nonzero().flatten()
                assert stopped.tolist() == [0, 4095, x.numel() - 1]
            if grad_dtype == dtype:
                run["fake_quantize_backward"](grad, x, *rest, outside, out=grad)
                assert_identical(grad, passed)


def test_where_nothing_is_marked_x_is_not_read():
    x, quantizer, outside = few_outside(torch.float32, None)
    grad = torch.randn(x.shape)
    nowhere = torch.zeros_like(outside)
    passed = kernels("cpu")["fake_quantize_backward"](
        grad, x, *quantizer, 1.0, integer(5), None, None, nowhere
    )
    assert_identical(passed, grad)


def test_marks_are_made_for_a_gradient_alone():
    x, (scale, zero_point, bits), expected = few_outside(torch.float32, None)
    arguments = (scale, zero_point, bits, 0.5, integer(5), None, None, None)
    y, outside = torch.ops.qnkernels.fake_quantize(x, *arguments, True)
    assert_identical(outside, expected)
    again, none = torch.ops.qnkernels.fake_quantize(x, *arguments)
    assert none.shape == (0,)
    assert_identical(again, y)
    leaf = x.clone().requires_grad_()
    for mark in (False, True):
        y, outside = torch.ops.qnkernels.fake_quantize(leaf, *arguments, mark)
        assert not outside.requires_grad
        (grad,) = torch.autograd.grad(y.nan_to_num().sum(), leaf)
        assert 1 <= (grad == 0).sum() <= 5


@pytest.mark.parametrize("bits", range(2, 17))
def test_formula_in_float64(bits):
    """Values half a step or more from a rounding boundary must agree with float64 arithmetic."""
    generator = torch.Generator().manual_seed(bits)
    scale, zero_point = 0.0371, float(2**bits // 3)
    codes = torch.randint(-3, 2**bits + 3, (1000,), generator=generator).double() - zero_point
    x = (codes + (torch.rand(1000, generator=generator).double() - 0.5) * 0.9) * scale
    expected = ((x / scale + zero_point).round().clamp(0, 2**bits - 1) - zero_point) * scale
    actual = F.fake_quantize(x.float(), scale, zero_point, bits)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7 * 2**bits * scale)


def test_ties_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5])
    assert F.fake_quantize(x, 1.0, 4.0, bits=4).tolist() == [0, 2, 2, 4, 0]


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 3e-7, 0.1, 1e30])
def test_extreme_scales_divide_exactly(scale):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4096, generator=generator) * scale * 100
    arguments = (x, torch.tensor(scale), torch.tensor(128.0), integer(8), 1.0, integer(0))
    actual = kernels("cpu")["fake_quantize"](*arguments)
    assert_identical(actual, kernels("reference")["fake_quantize"](*arguments))


@pytest.mark.parametrize("zero_point", [0.0, -0.0, 0.5, 127.3, 255.0, -5.0, 300.0, 1e6, 1e30, math.nan])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 3e-4, 1e20, 1e35, math.inf])
def test_any_parameters_give_the_same_bits(scale, zero_point):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(333, generator=generator) * 100 * min(scale, 1e30)
    x[:5] = torch.tensor([-0.3, -0.0, 0.0, 0.5, 1.5]) * scale
    x[50:53] = torch.tensor([math.inf, -math.inf, math.nan])
    arguments = (x, torch.tensor(scale), torch.tensor(zero_point), integer(8), 0.8, integer(3))
    actual, expected = (kernels(name)["fake_quantize"](*arguments) for name in ("cpu", "reference"))
    same = (actual.view(torch.int32) == expected.view(torch.int32)) | (actual.isnan() & expected.isnan())
    assert same.all(), (actual[~same], expected[~same])


def test_nan_and_infinity():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0] * 9)
    for name in ("cpu", "reference"):
        with qnk.backend(name):
            y = F.fake_quantize(x, 0.5, 8.0, bits=4)
        assert y[:4].isnan().tolist() == [True, False, False, False]
        assert y[1:4].tolist() == [3.5, -4.0, 0.0]
        assert_identical(y, y[:4].repeat(9))


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_noise_does_not_depend_on_threads_dtype_or_shape(p):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(129, 1037, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(F.fake_quantize(x, 0.1, 128.0, p=p, seed=99))
    finally:
        torch.set_num_threads(threads)
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])
    assert_identical(F.fake_quantize(x.flatten(), 0.1, 128.0, p=p, seed=99), results[0].flatten())
    coarse = x.bfloat16()
    noised = F.fake_quantize(coarse.float(), 0.1, 128.0, p=p, seed=99)
    assert_identical(F.fake_quantize(coarse, 0.1, 128.0, p=p, seed=99), noised.bfloat16())


def test_large_tensor_uses_counters_past_one_chunk():
    x = torch.ones(300_001)
    noised = F.fake_quantize(x, 2.0, 0.0, bits=2, p=0.5, seed=5) != 1
    assert_identical(noised, noise_mask(len(x), 0.5, integer(5)))


def test_non_contiguous_and_empty():
    x = torch.randn(40, 24)
    expected = F.fake_quantize(x.t().contiguous(), 0.1, 8.0, bits=4, p=0.5, seed=3)
    assert_identical(F.fake_quantize(x.t(), 0.1, 8.0, bits=4, p=0.5, seed=3), expected)
    assert F.fake_quantize(torch.empty(0, 8), 0.1, 8.0).shape == (0, 8)


def test_straight_through_gradient():
    """1 where the value is kept or inside the range, 0 where it is noised and outside."""
    x = torch.tensor([-3.0, -1.0, -0.99, 0.4, 6.5, 6.51, 9.0] * 11).requires_grad_()
    for p in (0.0, 0.4, 1.0):
        y = F.fake_quantize(x, 0.5, 2.0, bits=4, p=p, seed=17)
        weight = torch.randn_like(x)
        (grad,) = torch.autograd.grad(y, x, weight)
        outside = (x.detach() < -1.0) | (x.detach() > 6.5)
        stopped = outside & noise_mask(len(x), p, integer(17))
        assert_identical(grad, torch.where(stopped, torch.zeros_like(weight), weight))
        if p:
            assert stopped.any()


def test_gradient_dtype_and_double_backward():
    x = torch.randn(50, requires_grad=True)
    y = F.fake_quantize(x, 0.02, 8.0, bits=4, p=0.5, seed=1, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    assert grad.dtype == torch.float32
    (second,) = torch.autograd.grad(grad.sum(), x)
    passed = torch.autograd.grad(F.fake_quantize(x, 0.02, 8.0, bits=4, p=0.5, seed=1).sum(), x)[0]
    assert_identical(second, 2 * passed)


def test_opcheck():
    x, seed, bits = torch.randn(6, 16, requires_grad=True), integer(3), integer(4)
    for axis, group_size in ((None, None), (0, None), (None, 8)):
        scale, zero_point = F.quantization_parameters(*F.minmax(x.detach(), axis, group_size), 4)
        arguments = (x, scale, zero_point, bits, 0.5, seed, axis, group_size)
        for mark in (False, True):
            torch.library.opcheck(torch.ops.qnkernels.fake_quantize.default, (*arguments, None, mark))
        grad = torch.randn(6, 16, requires_grad=True)
        for outside in (None, torch.ones(1, dtype=torch.uint8)):
            torch.library.opcheck(
                torch.ops.qnkernels.fake_quantize_backward.default,
                (grad, x.detach(), *arguments[1:], outside),
            )


def test_compiled_draws_follow_the_seed_and_bits_without_recompiling():
    compiled = torch.compile(
        lambda x, bits, seed: F.fake_quantize(x, 0.05, 8.0, bits, p=0.5, seed=seed), fullgraph=True
    )
    x = torch.randn(33, 7)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bits, seed in ((4, 1), (8, 2), (3, 3)):
            arguments = (x, integer(bits), integer(seed))
            expected = F.fake_quantize(x, 0.05, 8.0, integer(bits), p=0.5, seed=integer(seed))
            assert_identical(compiled(*arguments), expected)


X = torch.randn(4, 8)
ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.fake_quantize(X.double(), ONE, ONE), TypeError, ("x", "float32", "float64")),
        (lambda: F.fake_quantize(X.int(), ONE, ONE), TypeError, ("x", "int32")),
        (lambda: F.fake_quantize(X, ONE, ONE, bits=1), ValueError, ("bits", "[2, 16]", "1")),
        (lambda: F.fake_quantize(X, ONE, ONE, bits=17), ValueError, ("bits", "17")),
        (lambda: F.fake_quantize(X, ONE, ONE, bits=integer(40)), ValueError, ("bits", "2 to 16")),
        (lambda: F.fake_quantize(X, ONE, ONE, bits=4.0), TypeError, ("bits", "4.0")),
        (lambda: F.fake_quantize(X, ONE, ONE, p=1.5), ValueError, ("p", "[0, 1]", "1.5")),
        (lambda: F.fake_quantize(X, ONE, ONE, p=float("nan")), ValueError, ("p", "nan")),
        (lambda: F.fake_quantize(X, ONE, ONE, seed=-1), ValueError, ("seed", "-1")),
        (lambda: F.fake_quantize(X, ONE, ONE, seed=torch.tensor([1])), ValueError, ("seed", "0-d")),
        (lambda: F.fake_quantize(X, ONE, ONE, axis=0), ValueError, ("scale", "(4,)", "()")),
        (lambda: F.fake_quantize(X, ONE, ONE, axis=2), ValueError, ("axis", "2")),
        (lambda: F.fake_quantize(X, ONE, ONE, group_size=3), ValueError, ("group_size", "3")),
        (lambda: F.fake_quantize(X, ONE, ONE, axis=0, group_size=4), ValueError, ("axis", "None")),
        (lambda: F.fake_quantize(X, torch.ones(8), ONE, axis=1), ValueError, ("zero_point", "(8,)")),
        (lambda: F.fake_quantize(X, ONE.to("meta"), ONE), ValueError, ("scale", "cpu", "meta")),
        (lambda: F.fake_quantize(X, ONE, ONE, dtype=torch.float64), TypeError, ("dtype", "float64")),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_results_are_rounded_as_torch_does(dtype):
    """All that a value which is left alone can be down to its last 15 bits, of which some are ties."""
    upper = torch.arange(2**17) << 15
    for lower in (0, 1, 0x1000, 0x3FFF, 0x4000, 0x7FFF):
        x = (upper | lower).to(torch.uint32).view(torch.float32)
        y = F.fake_quantize(x, 1.0, 0.0, p=0.0, dtype=dtype)
        numbers = ~x.isnan()
        assert_identical(y[numbers], x[numbers].to(dtype))
        assert y[~numbers].isnan().all()
