"""fake_quantize: scalar quantization noise with a straight-through gradient."""

import torch

from ..backends import select
from . import checks
from .library import autograd, op


def _check(x, scale, zero_point, bits, p, seed, axis, group_size):
    checks.check_float("x", x)
    checks.check_parameter("scale", scale, x, axis, group_size)
    checks.check_parameter("zero_point", zero_point, x, axis, group_size)
    checks.check_counter("bits", bits, x.device)
    checks.check_counter("seed", seed, x.device)
    checks.check_rate(p)


def _fake(x, scale, zero_point, bits, p, seed, axis=None, group_size=None, dtype=None):
    _check(x, scale, zero_point, bits, p, seed, axis, group_size)
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


@op(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor bits, float p, Tensor seed, "
    "int? axis=None, int? group_size=None, ScalarType? dtype=None) -> Tensor",
    _fake,
)
def fake_quantize(x, scale, zero_point, bits, p, seed, axis=None, group_size=None, dtype=None):
    _check(x, scale, zero_point, bits, p, seed, axis, group_size)
    if dtype is not None and dtype not in checks.FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    kernel = select("fake_quantize", checks.device_type(x))
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    return kernel(x.contiguous(), scale, zero_point, bits, p, seed, axis, group_size, dtype or x.dtype)


def _check_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size):
    _check(x, scale, zero_point, bits, p, seed, axis, group_size)
    checks.check_float("grad", grad)
    checks.check_same_device("grad", grad, x.device)
    if grad.shape != x.shape:
        checks.fail("grad", f"shape {tuple(x.shape)}", tuple(grad.shape))


def _fake_backward(grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None):
    _check_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@op(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, Tensor bits, float p, "
    "Tensor seed, int? axis=None, int? group_size=None) -> Tensor",
    _fake_backward,
)
def fake_quantize_backward(grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None):
    _check_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size)
    kernel = select("fake_quantize_backward", checks.device_type(x))
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    return kernel(grad.contiguous(), x.contiguous(), scale, zero_point, bits, p, seed, axis, group_size)


def _check_in_place(grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None):
    _check_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size)
    checks.check_dtype("grad", grad, x.dtype)
    if not grad.is_contiguous():
        checks.fail("grad", "a contiguous tensor", f"strides {grad.stride()}")


@op(
    "fake_quantize_backward_(Tensor(a!) grad, Tensor x, Tensor scale, Tensor zero_point, Tensor bits, "
    "float p, Tensor seed, int? axis=None, int? group_size=None) -> ()",
    _check_in_place,
)
def fake_quantize_backward_(grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None):
    _check_in_place(grad, x, scale, zero_point, bits, p, seed, axis, group_size)
    kernel = select("fake_quantize_backward", checks.device_type(x))
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    kernel(grad, x.contiguous(), scale, zero_point, bits, p, seed, axis, group_size, out=grad)


def _setup_context(ctx, inputs, output):
    x, scale, zero_point, bits, p, seed, axis, group_size, _dtype = inputs
    ctx.save_for_backward(x, scale, zero_point, bits, seed)
    ctx.arguments = (p, axis, group_size)


def _backward(ctx, grad):
    x, scale, zero_point, bits, seed = ctx.saved_tensors
    p, axis, group_size = ctx.arguments
    grad_x = fake_quantize_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size)
    return (grad_x, *[None] * 8)


autograd(fake_quantize, _backward, _setup_context)


def _setup_double(ctx, inputs, output):
    grad, x, scale, zero_point, bits, p, seed, axis, group_size = inputs
    ctx.save_for_backward(x, scale, zero_point, bits, seed)
    ctx.arguments = (p, axis, group_size)
    ctx.grad_dtype = grad.dtype


def _double_backward(ctx, grad_grad):
    """The gradient is linear in grad, with a 0/1 diagonal: its own transpose."""
    x, scale, zero_point, bits, seed = ctx.saved_tensors
    p, axis, group_size = ctx.arguments
    passed = fake_quantize_backward(grad_grad, x, scale, zero_point, bits, p, seed, axis, group_size)
    return (passed.to(ctx.grad_dtype), *[None] * 8)


autograd(fake_quantize_backward, _double_backward, _setup_double)
