"""Division by way of the reciprocal: the quotient rounded once, with fma computed exactly.

The interpreter rounds twice in tl.fma, so kernels divide there; these tests give it an exact one and make the
kernels take it, as they do when compiled.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numeric import assert_identical, integer
from triton.runtime import interpreter

from qnkernels.backends import kernels
from qnkernels.backends.triton import numeric


def fma(a, b, c):
    """a * b + c of fp32 arrays, rounded once: the sum in float64 is rounded to odd, then to fp32."""
    with np.errstate(all="ignore"):
        product, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)  # exact
        total = product + c
        rest = total - product
        lost = (product - (total - rest)) + (c - rest)
        nudged = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        inexact = np.isfinite(lost) & (lost != 0) & (total.view(np.int64) % 2 == 0)
        return np.where(inexact, nudged, total).astype(np.float32)


@pytest.fixture(autouse=True)
def exact_fma(monkeypatch):
    def create_fma(self, a, b, c):
        return interpreter.TensorHandle(fma(a.data, b.data, c.data), c.dtype.scalar)

    kernels("triton")  # all modules are imported, so that numeric alone sees the change
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(numeric, "SOFT", tl.constexpr(False))


def bits(sign, exponent, mantissa):
    """fp32 (-1)^sign 2^exponent (1 + mantissa / 2^23); exponent -127: denormals."""
    words = (sign << 31) | ((exponent + 127) << 23) | mantissa
    return words.astype(np.uint32).view(np.float32)


def random_floats(generator, n, low, high):
    """Any sign and mantissa, exponents from low to high."""
    draw = generator.integers
    return bits(draw(0, 2, n), draw(low, high + 1, n), draw(0, 2**23, n))


def scales(generator):
    """Of all sizes that are divided by: powers of two, mantissas next to them, others."""
    mantissas = np.array([0, 1, 2, 2**22, 2**23 - 2, 2**23 - 1, *generator.integers(0, 2**23, 30)])
    exponents = np.resize([0, -9, -60, 39, 17, -31, 2], len(mantissas))
    return np.append(bits(0, exponents, mantissas), np.float32(2.0**40))


@triton.jit
def quotients_kernel(x_ptr, scale_ptr, y_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = numeric.quotient_by_one(tl.load(x_ptr + index), tl.load(scale_ptr + tl.program_id(0)))
    tl.store(y_ptr + index, y)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_fma_of_these_tests_rounds_once():
    generator = np.random.default_rng(0)
    for low, high in ((-127, 127), (-3, 3), (-70, -60)):
        a, b, c = (random_floats(generator, 300, low, high) for _ in range(3))
        c[::2] = -(a * b)[::2]
        for one, two, three, found in zip(a, b, c, fma(a, b, c), strict=True):
            if not np.isfinite(three):
                continue
            exact = Fraction(float(one)) * Fraction(float(two)) + Fraction(float(three))
            if not np.isfinite(found):
                assert abs(exact) > 2**127
                continue
            error = abs(exact - Fraction(float(found)))
            for neighbour in (np.nextafter(found, np.float32(s)) for s in (-np.inf, np.inf)):
                assert not np.isfinite(neighbour) or error <= abs(exact - Fraction(float(neighbour)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_quotients_are_rounded_once():
    """Values of all exponents, and next to those whose quotients lie between two numbers."""
    generator = np.random.default_rng(1)
    s = scales(generator)
    block = 1 << 15
    x = np.empty((len(s), block), np.float32)
    for i, scale in enumerate(s):
        exponent = int(np.floor(np.log2(scale)))
        x[i, ::2] = random_floats(generator, block // 2, max(exponent - 30, -100), exponent + 18)
        half_steps = 2 * generator.integers(2**23, 2**24, block // 6 + 1) + 1
        near = (half_steps * np.float64(scale) * 2.0**-24).astype(np.float32)
        around = np.stack((np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(1e38))))
        x[i, 1::2] = around.flatten()[: block // 2]
    y = torch.empty(x.shape)
    quotients_kernel[(len(s),)](torch.from_numpy(x), torch.from_numpy(s), y, block)
    assert np.array_equal(y.numpy(), x / s[:, None])


def extreme_values(generator, scale, zero_point):
    """Levels and what is half-way between them, values of every exponent, and those that are no numbers."""
    steps = np.arange(-3, 37, dtype=np.float32) * 0.5
    with np.errstate(all="ignore"):
        levels = (steps - np.float32(zero_point)) * np.float32(scale)
        around = [np.nextafter(levels, np.float32(end)) for end in (-np.inf, np.inf)]
        every = random_floats(generator, 512, -127, 127)
        odd = [0.0, -0.0, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 2.0**-100, -(2.0**-100)]
        return np.concatenate([levels, *around, every, np.array(odd)]).astype(np.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("zero_point", [0.0, 1.0, 7.0, 15.0, -3.0, 65536.0, 2.0**30, 0.3])
def test_fake_quantize_equals_reference(zero_point):
    generator = np.random.default_rng(2)
    for scale in (*scales(generator)[:12], 2.0**-61, 2.0**41, 1e-45, 3e38, np.nan, np.inf, -0.3):
        x = torch.from_numpy(extreme_values(generator, scale, zero_point))
        rest = torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point), integer(4), 1.0, integer(0)
        actual, expected = (kernels(name)["fake_quantize"](x, *rest) for name in ("triton", "reference"))
        assert_identical(actual, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("columns", [72, 77])
def test_samples_equal_reference(columns):
    """Samples of every size, from one side of 0 and from both, with values that vanish beside their range."""
    generator = np.random.default_rng(3)
    x = np.stack([random_floats(generator, columns, e - 40, e) for e in range(-87, 127, 5)])
    x = np.maximum(x, np.float32(-1e38))
    x = torch.from_numpy(np.concatenate((x, np.abs(x), -np.abs(x))))
    for stochastic in (False, True):
        arguments = x, integer(5), integer(8), True, stochastic
        actual, expected = (
            kernels(name)["dynamic_fake_quantize"](*arguments) for name in ("triton", "reference")
        )
        assert_identical(actual, expected)
