"""noisy_linear against the composition that it replaces."""

import pytest
import torch
from numeric import DTYPES, assert_identical, integer

from qnkernels import functional as F


def inputs(dtype, shape=(3, 5), requires_grad=True):
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in ((*shape, 24), (10, 24), (10,))]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_composition(dtype, axis, with_bias):
    x, weight, bias = inputs(dtype)
    bias = bias if with_bias else None
    scale, zero_point = F.quantization_parameters(*(0.7 * v for v in F.minmax(weight.detach(), axis)), 4)
    quantizer = dict(bits=4, axis=axis, p=0.5, seed=8)
    fused = F.noisy_linear(x, weight, bias, scale, zero_point, **quantizer)
    composed = torch.nn.functional.linear(x, F.fake_quantize(weight, scale, zero_point, **quantizer), bias)
    assert_identical(fused, composed)
    upstream = torch.randn_like(fused)
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None]
    grads = [torch.autograd.grad(y, wanted, upstream) for y in (fused, composed)]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)
    stopped = grads[1][1] == 0
    assert stopped.any()
    assert_identical(grads[0][1] == 0, stopped)


def test_second_derivative():
    """Of y^2 in x and weight, where nothing is stopped: that of the plain layer."""
    x, weight, _ = inputs(torch.float32)
    fused = F.noisy_linear(x, weight, None, 0.5, 128.0, p=1.0)
    noised = F.fake_quantize(weight.detach(), 0.5, 128.0).requires_grad_()
    plain = torch.nn.functional.linear(x, noised)
    results = []
    for y, w in ((fused, weight), (plain, noised)):
        (grad,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_frozen_parts_get_no_gradient():
    x, weight, bias = inputs(torch.float32, requires_grad=False)
    F.noisy_linear(x, weight.requires_grad_(), bias, 0.1, 128.0).sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None


def test_in_place_op():
    _, weight, _ = inputs(torch.float32, requires_grad=False)
    quantizer = (torch.tensor(0.1), torch.tensor(8.0), integer(4), 0.5, integer(3))
    torch.library.opcheck(
        torch.ops.qnkernels.fake_quantize_backward_.default, (torch.randn_like(weight), weight, *quantizer)
    )
    backward_ = torch.ops.qnkernels.fake_quantize_backward_
    for outside, error, words in (
        (torch.ones(2, dtype=torch.uint8), ValueError, r"outside.*\(1,\).*\(2,\)"),
        (torch.ones(1), TypeError, "outside.*uint8.*float32"),
    ):
        with pytest.raises(error, match=words):
            backward_(torch.randn_like(weight), weight, *quantizer, None, None, outside)
    with pytest.raises(ValueError, match="contiguous"):
        torch.ops.qnkernels.fake_quantize_backward_(torch.randn(24, 10).t(), weight, *quantizer)
    with pytest.raises(TypeError, match="bfloat16"):
        torch.ops.qnkernels.fake_quantize_backward_(torch.randn(10, 24).bfloat16(), weight, *quantizer)


def test_dtypes_must_agree():
    x, weight, bias = inputs(torch.float32)
    with pytest.raises(TypeError, match="bfloat16"):
        F.noisy_linear(x.bfloat16(), weight, bias, 0.1, 8.0)


def test_an_activation_may_work_in_place():
    """F.linear of three dimensions gives a view, of which autograd would allow no in-place use."""
    x, weight, bias = inputs(torch.float32)
    y = F.noisy_linear(x.reshape(1, *x.shape), weight, bias, 0.1, 8.0)
    torch.relu_(y).sum().backward()
    assert weight.grad is not None
