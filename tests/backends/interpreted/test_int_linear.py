"""int_linear, its gradient and int_embedding under the interpreter, against float64."""

import itertools

import pytest
import torch
from numeric import DTYPES, assert_identical

from qnkernels.backends import kernels
from qnkernels.reference.int_linear import dequantize_weight

EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# m, n, k, groups: one of each; odd tails; one past the tiles; tiny groups; odd groups; aligned groups; many
# columns, split; groups of several tiles, few rows and many; groups of a tile, many rows
SIZES = (
    (1, 1, 2, 1),
    (3, 5, 12, 4),
    (17, 65, 130, 1),
    (65, 33, 66, 2),
    (2, 7, 30, 10),
    (5, 3, 30, 6),
    (1, 40, 256, 2),
    (16, 64, 96, 3),
    (1, 3, 800, 1),
    (65, 5, 160, 2),
    (1, 3, 132, 2),
    (66, 3, 256, 2),
)


def packed(n, k, groups, bits, has_zero, generator):
    """(weight, scale, zero_point) and the decoded weight in float64."""
    weight = torch.randint(0, 256, (n, k * bits // 8), generator=generator).to(torch.uint8)
    scale = torch.rand(n, groups, generator=generator) * 0.1 + 0.01
    zero_point = torch.randint(0, 2**bits, (n, groups), generator=generator).to(torch.uint8)
    arguments = (weight, scale, zero_point if has_zero else None)
    return arguments, dequantize_weight(*arguments, bits).double()


def assert_near(actual, exact, magnitude, terms, dtype, operand=0.0):
    """|error| <= fp32 roundings of `terms` products and sums, those of an operand, and one to dtype."""
    bound = ((terms + 4) * 2**-24 + operand) * magnitude + exact.abs() * EPSILON[dtype]
    bound += 2**-25 if dtype == torch.float16 else 0.0  # half a step of its subnormal numbers
    assert actual.dtype == dtype
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), SIZES)
def test_forward_and_backward_against_float64(m, n, k, groups, dtype, bits):
    generator = torch.Generator().manual_seed(m * n + k)
    # with zero points and without for each size in each dtype, by turns
    has_zero = (SIZES.index((m, n, k, groups)) + DTYPES.index(dtype) + bits // 8) % 2 == 0
    arguments, decoded = packed(n, k, groups, bits, has_zero, generator)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if has_zero else None
    y = kernels("triton")["int_linear"](x, *arguments, bias, bits)
    shift = torch.zeros(n).double() if bias is None else bias.double()
    exact, magnitude = x.double() @ decoded.T + shift, x.double().abs() @ decoded.abs().T + shift.abs()
    assert_near(y, exact, magnitude, k, dtype)
    grad = torch.randn(m, n, generator=generator).to(dtype)
    grad_x = kernels("triton")["int_linear_backward"](grad, *arguments, bits)
    # gradients of 16 bits are multiplied by the scale and taken to 2^-16
    operand = 0.0 if dtype == torch.float32 else 2**-16
    exact, magnitude = grad.double() @ decoded, grad.double().abs() @ decoded.abs()
    assert_near(grad_x, exact, magnitude, n, dtype, operand)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_equals_reference(dtype, bits):
    generator = torch.Generator().manual_seed(bits)
    sizes = ((1, 2, 1), (9, 30, 6), (7, 1026, 2))
    for (rows, k, groups), has_zero in itertools.product(sizes, (False, True)):
        arguments, _ = packed(rows, k, groups, bits, has_zero, generator)
        indices = torch.randint(0, rows, (2, 5), generator=generator)
        call = (indices, *arguments, bits, dtype)
        actual, expected = (kernels(name)["int_embedding"](*call) for name in ("triton", "reference"))
        assert_identical(actual, expected)


def test_embedding_clamps_indices_to_the_table():
    arguments, _ = packed(6, 8, 1, 8, True, torch.Generator().manual_seed(0))
    embedding = kernels("triton")["int_embedding"]
    for index, row in ((-1, 0), (6, 5), (2**40, 5), (-(2**40), 0)):
        found = embedding(torch.tensor([index]), *arguments, 8, torch.float32)
        assert_identical(found, embedding(torch.tensor([row]), *arguments, 8, torch.float32))


def test_empty():
    arguments, _ = packed(4, 8, 1, 4, True, torch.Generator().manual_seed(0))
    ours = kernels("triton")
    assert ours["int_linear"](torch.empty(0, 8), *arguments, None, 4).shape == (0, 4)
    assert ours["int_linear_backward"](torch.empty(0, 4), *arguments, 4).shape == (0, 8)
    none = torch.empty(0, dtype=torch.int64)
    assert ours["int_embedding"](none, *arguments, 4, torch.float16).shape == (0, 8)
    with pytest.raises(IndexError, match="indices"):
        nothing = (arguments[0][:0], arguments[1][:0], None)
        ours["int_embedding"](torch.zeros(1, dtype=torch.int64), *nothing, 4, torch.float32)


def test_not_finite_inputs_reach_the_output():
    arguments, _ = packed(5, 16, 1, 8, True, torch.Generator().manual_seed(1))
    x = torch.randn(3, 16)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    y = kernels("triton")["int_linear"](x, *arguments, None, 8)
    assert y[0].isnan().all() and not y[1].isfinite().any() and y[2].isfinite().all()


def test_fp32_loses_no_bit():
    """A single product is rounded once, not taken in the 11 bits of tf32 or the 16 of two pieces."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.tensor([[1, 255]], dtype=torch.uint8)
    arguments = (weight, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    value = torch.randn(40, generator=generator) * 2.0 ** torch.randint(-30, 30, (40,), generator=generator)
    for column, code in ((0, 1.0), (1, 255.0)):
        x = torch.zeros(40, 2)
        x[:, column] = value
        y = kernels("triton")["int_linear"](x, *arguments, None, 8)[:, 0]
        assert ((y.double() - value.double() * code).abs() <= 2**-22 * (value * code).abs()).all()
        assert code != 1.0 or torch.equal(y, value)
    grad_x = kernels("triton")["int_linear_backward"](value[:, None], *arguments, 8)
    assert torch.equal(grad_x[:, 0], value)
