"""Fake quantization over the range of the data itself, or a moving average of it; of gradients, too."""

import torch

from ..backends import select
from . import checks
from .fake_quantize import fake_quantize, fake_quantize_backward
from .library import autograd, op
from .range import quantization_parameters


def _check(x, bits, seed, per_sample, dtype) -> torch.dtype:
    checks.check_float("x", x)
    checks.check_counter("bits", bits, x.device)
    checks.check_counter("seed", seed, x.device)
    if per_sample and x.dim() == 0:
        checks.fail("x", "a dimension of samples", "a tensor without dimensions")
    return _output_dtype(x, dtype)


def _output_dtype(x, dtype) -> torch.dtype:
    if dtype is not None and dtype not in checks.FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    return dtype or x.dtype


def _fake(x, bits, seed, per_sample, stochastic, dtype=None):
    dtype = _check(x, bits, seed, per_sample, dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@op(
    "dynamic_fake_quantize(Tensor x, Tensor bits, Tensor seed, bool per_sample, bool stochastic, "
    "ScalarType? dtype=None) -> Tensor",
    _fake,
)
def dynamic_fake_quantize(x, bits, seed, per_sample, stochastic, dtype=None):
    dtype = _check(x, bits, seed, per_sample, dtype)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    kernel = select("dynamic_fake_quantize", checks.device_type(x))
    return kernel(x.contiguous(), bits, seed, per_sample, stochastic, dtype)


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype


autograd(dynamic_fake_quantize, lambda ctx, grad: (grad.to(ctx.dtype), *[None] * 5), _setup_context)


def _check_moving(x, low, high, step, bits, momentum, axis, group_size, dtype) -> torch.dtype:
    checks.check_float("x", x)
    checks.check_parameter("low", low, x, axis, group_size)
    checks.check_parameter("high", high, x, axis, group_size)
    checks.check_not_empty("x", x)
    checks.check_counter("step", step, x.device)
    checks.check_counter("bits", bits, x.device)
    if not 0.0 < momentum <= 1.0:
        checks.fail("momentum", "a rate in (0, 1]", momentum)
    return _output_dtype(x, dtype)


def _fake_moving(x, low, high, step, bits, momentum, axis=None, group_size=None, dtype=None):
    dtype = _check_moving(x, low, high, step, bits, momentum, axis, group_size, dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return y, low.new_empty(low.shape), low.new_empty(low.shape)


@op(
    "moving_fake_quantize_(Tensor x, Tensor(a!) low, Tensor(b!) high, Tensor(c!) step, Tensor bits, "
    "float momentum, int? axis=None, int? group_size=None, ScalarType? dtype=None) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_moving,
)
def moving_fake_quantize_(x, low, high, step, bits, momentum, axis=None, group_size=None, dtype=None):
    dtype = _check_moving(x, low, high, step, bits, momentum, axis, group_size, dtype)
    kernel = select("moving_fake_quantize_", checks.device_type(x))
    return kernel(x.contiguous(), low, high, step, bits, momentum, axis, group_size, dtype)


class _StraightThrough(torch.autograd.Function):
    """y, the quantized x, as a function of x: the gradient passes where x lies in the range."""

    @staticmethod
    def forward(ctx, x, y, scale, zero_point, bits, axis, group_size):
        ctx.save_for_backward(x, scale, zero_point, bits)
        ctx.layout = axis, group_size
        return checks.own(y)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point, bits = ctx.saved_tensors
        quantizer = scale, zero_point, bits, 1.0, bits  # every element is quantized: the seed is not read
        return fake_quantize_backward(grad, x, *quantizer, *ctx.layout, None), *[None] * 6


def moving_fake_quantize(x, low, high, step, bits, momentum, axis, group_size, dtype, moves):
    """moving_fake_quantize_ with a straight-through gradient; unless `moves`, over the range as it stands."""
    layout = axis, group_size, dtype
    if moves:
        y, *quantizer = moving_fake_quantize_(x.detach(), low, high, step, bits, momentum, *layout)
    else:
        quantizer = quantization_parameters(low, high, bits, False)
        y, _ = fake_quantize(x.detach(), *quantizer, bits, 1.0, bits, *layout, False)  # the seed is not read
    if not (torch.is_grad_enabled() and x.requires_grad):
        return y
    # a copy, so that the precision may change between this forward and its backward
    return _StraightThrough.apply(x, y, *quantizer, bits.clone(), axis, group_size)


class _GradientQuantizer(torch.autograd.Function):
    """The identity, whose gradient is quantized."""

    @staticmethod
    def forward(ctx, x, bits, seed):
        ctx.save_for_backward(bits, seed)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        bits, seed = ctx.saved_tensors
        return dynamic_fake_quantize(grad, bits, seed, True, True, None), None, None


def quantize_gradient(x, bits, seed):
    return _GradientQuantizer.apply(x, bits, seed)
