"""round_to: rounding that compilers keep, with a straight-through gradient."""

import pytest
import torch
from numeric import assert_identical

from qnkernels import functional as F


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradient(dtype, narrow):
    x = (torch.randn(3, 17, dtype=torch.float64) * torch.logspace(-9, 3, 17)).to(dtype).requires_grad_()
    y = F.round_to(x, narrow)
    assert_identical(y, x.detach().to(narrow).to(dtype))
    upstream = torch.randn(3, 17, dtype=dtype)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert_identical(grad, upstream)
    assert y.data_ptr() != x.data_ptr()
    torch.library.opcheck(torch.ops.qnkernels.round_to.default, (x, narrow))


def test_compiled():
    x = torch.randn(1000)
    y = torch.compile(lambda x: F.round_to(x * 1, torch.float16) * 2, fullgraph=True)(x)
    assert_identical(y, x.half().float() * 2)
    torch.compiler.reset()


def test_bad_input():
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int64"):
        F.round_to(torch.ones(2).long(), torch.float16)
    with pytest.raises(TypeError, match=r"dtype: expected float32, bfloat16 or float16, got torch.int8"):
        F.round_to(torch.ones(2), torch.int8)
