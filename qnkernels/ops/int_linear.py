"""int_linear, int_linear_quantized and int_embedding: layers over packed integer weights."""

import torch

from ..backends import select
from . import checks
from .library import autograd, op

BITS = (4, 8)
UINT8, FLOAT32 = torch.uint8, torch.float32


def _check_weight(weight, scale, zero_point, bits) -> int:
    """Check a packed weight and its parameters; returns the number of inputs.

    Like `_check` it is part of every call: attributes are read once, and helpers called for errors only.
    """
    if bits not in BITS:
        checks.fail("bits", f"one of {BITS}", bits)
    if weight.dtype is not UINT8:
        checks.check_dtype("weight", weight, UINT8)
    packed = weight.shape
    if len(packed) != 2:
        checks.fail("weight", "two dimensions [out, in * bits / 8]", f"shape {tuple(packed)}")
    in_features, groups, device = packed[1] * 8 // bits, scale.shape, weight.device
    if scale.dtype is not FLOAT32:
        checks.check_dtype("scale", scale, FLOAT32)
    if scale.device != device:
        checks.check_same_device("scale", scale, device)
    if len(groups) != 2 or groups[0] != packed[0] or groups[1] < 1 or in_features % groups[1]:
        checks.fail("scale", f"[{packed[0]}, groups], groups a divisor of {in_features}", tuple(groups))
    if zero_point is not None:
        if zero_point.dtype is not UINT8:
            checks.check_dtype("zero_point", zero_point, UINT8)
        if zero_point.device != device:
            checks.check_same_device("zero_point", zero_point, device)
        if zero_point.shape != groups:
            checks.fail("zero_point", f"the shape of scale, {tuple(groups)}", tuple(zero_point.shape))
    return in_features


def _check(x, weight, scale, zero_point, bias, bits) -> None:
    in_features = _check_weight(weight, scale, zero_point, bits)
    if x.dtype not in checks.FLOATS:
        checks.check_float("x", x)
    shape, device = x.shape, x.device
    if device != weight.device:
        checks.check_same_device("x", x, weight.device)
    if not shape or shape[-1] != in_features:
        checks.fail("x", f"[..., {in_features}]", f"shape {tuple(shape)}")
    if bias is not None:
        if bias.dtype not in checks.FLOATS:
            checks.check_float("bias", bias)
        if bias.device != device:
            checks.check_same_device("bias", bias, device)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            checks.fail("bias", f"shape ({weight.shape[0]},)", tuple(bias.shape))


def _fake(x, weight, scale, zero_point, bias, bits):
    _check(x, weight, scale, zero_point, bias, bits)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op(
    "int_linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int bits) -> Tensor",
    _fake,
    whole=True,
)
def int_linear(x, weight, scale, zero_point, bias, bits):
    _check(x, weight, scale, zero_point, bias, bits)
    rows = x.contiguous() if x.dim() == 2 else checks.rows(x)
    if zero_point is not None:
        zero_point = zero_point.contiguous()
    kernel = select("int_linear", "cpu" if x.is_cpu else x.device.type)
    y = kernel(rows, weight.contiguous(), scale.contiguous(), zero_point, bias, bits)
    return y if x.dim() == 2 else checks.like_rows(y, x)


def _check_backward(grad, weight, scale, zero_point, bits) -> int:
    in_features = _check_weight(weight, scale, zero_point, bits)
    checks.check_float("grad", grad)
    checks.check_same_device("grad", grad, weight.device)
    if grad.dim() == 0 or grad.shape[-1] != weight.shape[0]:
        checks.fail("grad", f"[..., {weight.shape[0]}]", f"shape {tuple(grad.shape)}")
    return in_features


def _fake_backward(grad, weight, scale, zero_point, bits):
    return grad.new_empty((*grad.shape[:-1], _check_backward(grad, weight, scale, zero_point, bits)))


@op(
    "int_linear_backward(Tensor grad, Tensor weight, Tensor scale, Tensor? zero_point, int bits) -> Tensor",
    _fake_backward,
)
def int_linear_backward(grad, weight, scale, zero_point, bits):
    _check_backward(grad, weight, scale, zero_point, bits)
    zero_point = None if zero_point is None else zero_point.contiguous()
    kernel = select("int_linear_backward", checks.device_type(grad))
    grad_x = kernel(checks.rows(grad), weight.contiguous(), scale.contiguous(), zero_point, bits)
    return checks.like_rows(grad_x, grad)


def _setup_context(ctx, inputs, output):
    _x, weight, scale, zero_point, bias, bits = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.bits = bits
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx, grad, weight, scale, zero_point):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = int_linear_backward(grad, weight, scale, zero_point, ctx.bits)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        rows = grad.reshape(-1, grad.shape[-1])
        grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None


def _backward(ctx, grad):
    return _gradients(ctx, grad, *ctx.saved_tensors)


autograd(int_linear, _backward, _setup_context)


def _check_quantized(x, weight, scale, zero_point, bias, bits, x_scale, x_zero_point):
    _check(x, weight, scale, zero_point, bias, bits)
    if (x_scale is None) != (x_zero_point is None):
        checks.fail("x_zero_point", "given with x_scale, and only with it", x_zero_point)
    if x_scale is not None:
        checks.check_parameter("x_scale", x_scale, x, None, None)
        checks.check_parameter("x_zero_point", x_zero_point, x, None, None)


def _fake_quantized(x, weight, scale, zero_point, bias, bits, x_scale, x_zero_point):
    _check_quantized(x, weight, scale, zero_point, bias, bits, x_scale, x_zero_point)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op(
    "int_linear_quantized(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, "
    "Tensor? x_scale, Tensor? x_zero_point) -> Tensor",
    _fake_quantized,
    whole=True,
)
def int_linear_quantized(x, weight, scale, zero_point, bias, bits, x_scale, x_zero_point):
    _check_quantized(x, weight, scale, zero_point, bias, bits, x_scale, x_zero_point)
    rows = x.contiguous() if x.dim() == 2 else checks.rows(x)
    if zero_point is not None:
        zero_point = zero_point.contiguous()
    kernel = select("int_linear_quantized", "cpu" if x.is_cpu else x.device.type)
    weight, scale = weight.contiguous(), scale.contiguous()
    y = kernel(rows, weight, scale, zero_point, bias, bits, x_scale, x_zero_point)
    return y if x.dim() == 2 else checks.like_rows(y, x)


def _setup_quantized(ctx, inputs, output):
    x, *packed, x_scale, x_zero_point = inputs
    _setup_context(ctx, (x, *packed), output)
    # a range of each row holds the whole row; only a fixed one cuts
    ctx.save_for_backward(*ctx.to_save, x if x_scale is not None else None, x_scale, x_zero_point)


def _backward_quantized(ctx, grad):
    """Straight-through: the gradient of int_linear, 0 where x lies outside a given range."""
    *packed, x, x_scale, x_zero_point = ctx.saved_tensors
    grads = _gradients(ctx, grad, *packed)
    if x is not None and grads[0] is not None:
        outside = (x.float() < (0.0 - x_zero_point) * x_scale) | (x.float() > (255 - x_zero_point) * x_scale)
        grads = (grads[0].masked_fill(outside, 0.0), *grads[1:])
    return (*grads, None, None)


autograd(int_linear_quantized, _backward_quantized, _setup_quantized)


def _check_embedding(indices, weight, scale, zero_point, bits, dtype) -> int:
    in_features = _check_weight(weight, scale, zero_point, bits)
    checks.check_dtype("indices", indices, torch.int64)
    checks.check_same_device("indices", indices, weight.device)
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    return in_features


def _fake_embedding(indices, weight, scale, zero_point, bits, dtype):
    in_features = _check_embedding(indices, weight, scale, zero_point, bits, dtype)
    return indices.new_empty((*indices.shape, in_features), dtype=dtype)


@op(
    "int_embedding(Tensor indices, Tensor weight, Tensor scale, Tensor? zero_point, int bits, "
    "ScalarType dtype) -> Tensor",
    _fake_embedding,
)
def int_embedding(indices, weight, scale, zero_point, bits, dtype):
    """Indices outside [0, rows) raise IndexError on the CPU. On a GPU, where a check would wait for the
    device, they are clamped to the table.
    """
    _check_embedding(indices, weight, scale, zero_point, bits, dtype)
    zero_point = None if zero_point is None else zero_point.contiguous()
    kernel = select("int_embedding", checks.device_type(indices))
    return kernel(indices.contiguous(), weight.contiguous(), scale.contiguous(), zero_point, bits, dtype)
