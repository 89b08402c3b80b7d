"""int_linear's gradient in x, against float64."""

import pytest
import torch
from helpers_int_linear import (
    UNIT,
    Packed,
    assert_within,
    output_rounding,
    possible,
    random_packed,
    seeded,
)
from numeric import DTYPES, assert_identical
from pairs import covering, name

from qnkernels import functional as F
from qnkernels.reference.int_linear import dequantize_weight

BACKWARD_SIZES = {
    "m": (0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 100, 600),
    "n": (1, 5, 8, 15, 16, 64, 131),
    "k": (2, 30, 64, 66, 200, 258, 1000),
    "group": (None, None, 2, 3, 5, 25, 32, 33, 129),
    "bits": (8, 4),
    "zero_point": (True, False),
    "dtype": DTYPES,
}


def check_backward(grad, packed: Packed) -> None:
    """Each element: |grad_x - exact| <= n + 1 roundings of the sum of absolute terms, then one to the dtype.

    In bf16 the weight may be rounded to bf16, too, as that of a dense layer is: 2^-8 of each term.
    """
    grad_x = torch.ops.qnkernels.int_linear_backward(grad, *packed.arguments, packed.bits)
    weight, n = packed.decoded(), grad.shape[1]
    exact, terms = grad.double() @ weight, grad.double().abs() @ weight.abs()
    rounding = (n + 1) * UNIT + (2.0**-8 if grad.dtype == torch.bfloat16 else 0.0)
    assert grad_x.dtype == grad.dtype
    bound = rounding * terms
    assert_within(grad_x, exact, bound + output_rounding(exact.abs() + bound, grad.dtype))


@pytest.mark.parametrize("case", list(covering(BACKWARD_SIZES, possible)), ids=name)
def test_backward_is_within_the_bound(case):
    m, n, k, group, bits, zero_point, dtype = case.values()
    generator = seeded(hash((m, n, k)) % 2**31)
    weight = random_packed(n, k, bits, k // (group or k), generator, zero_point, unit=2**-8)
    check_backward(torch.randn(m, n, generator=generator).to(dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "n", "groups"), [(8, 2100, 1), (4, 2100, 10), (8, 5, 1), (4, 31, 10)])
def test_backward_of_unit_rows_is_the_decoded_weight(dtype, bits, n, groups):
    """Every element of the weight, of one that is decoded in several pieces, too."""
    weight = random_packed(n, 1030, bits, groups, seeded(36), unit=2**-8)
    expected = dequantize_weight(*weight.arguments, bits).to(dtype)
    first = torch.randperm(n, generator=seeded(37))[:40]
    for rows in (first[:3], first):
        grad = torch.zeros(len(rows), n, dtype=dtype)
        grad[range(len(rows)), rows] = 1
        grad_x = torch.ops.qnkernels.int_linear_backward(grad, *weight.arguments, bits)
        assert_identical(grad_x, expected[rows])


def test_backward_keeps_rows_that_are_not_finite_apart():
    weight = random_packed(33, 128, 8, 2, seeded(38))
    for dtype in DTYPES:
        for m in (3, 50):
            grad = torch.randn(m, 33, generator=seeded(m)).to(dtype)
            clean = torch.ops.qnkernels.int_linear_backward(grad, *weight.arguments, 8)
            grad[1, 4], grad[2, 5] = float("nan"), float("inf")
            grad_x = torch.ops.qnkernels.int_linear_backward(grad, *weight.arguments, 8)
            assert_identical(grad_x[3:], clean[3:])
            assert grad_x[1].isnan().all() and not grad_x[2].isfinite().any()


def test_gradcheck_in_x():
    """The gradient is linear in x, so differences of fp32 outputs at unit steps check it."""
    weight, scale, zero_point = random_packed(5, 8, 4, 2, seeded(1)).arguments
    x = torch.randn(2, 8, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: F.int_linear(x, weight, scale, zero_point, bits=4), x
    )
    decoded = dequantize_weight(weight, scale, zero_point, 4)
    for i in range(2):
        torch.testing.assert_close(jacobian[i, :, i], decoded, rtol=1e-6, atol=1e-6)
        assert (jacobian[i, :, 1 - i] == 0).all()
