"""Linear layers that train in low precision: their operands, and the gradients of those."""

import torch
import torch.nn.functional as F

from ..backends import select
from ..reference.low_precision import unpack
from . import checks
from .dynamic import dynamic_fake_quantize
from .library import op


def _check(x, weight, low, high, step, bits, momentum):
    checks.check_float("x", x)
    checks.check_float("weight", weight)
    checks.check_not_empty("x", x)
    checks.check_not_empty("weight", weight)
    checks.check_same_device("weight", weight, x.device)
    checks.check_parameter("low", low, x, None, None)
    checks.check_parameter("high", high, x, None, None)
    checks.check_counter("step", step, x.device)
    checks.check_counter("bits", bits, x.device)
    if not 0.0 < momentum <= 1.0:
        checks.fail("momentum", "a rate in (0, 1]", momentum)


def _fake(x, weight, low, high, step, bits, momentum, moves, per_channel):
    _check(x, weight, low, high, step, bits, momentum)
    outside = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    quantized, quantized_weight = (
        torch.empty(one.shape, dtype=x.dtype, device=x.device) for one in (x, weight)
    )
    return quantized, outside, quantized_weight


@op(
    "low_precision_operands_(Tensor x, Tensor weight, Tensor(a!) low, Tensor(b!) high, Tensor(c!) step, "
    "Tensor bits, float momentum, bool moves, bool per_channel) -> (Tensor, Tensor, Tensor)",
    _fake,
)
def low_precision_operands_(x, weight, low, high, step, bits, momentum, moves, per_channel):
    _check(x, weight, low, high, step, bits, momentum)
    kernel = select("low_precision_operands_", checks.device_type(x))
    x, weight = x.contiguous(), weight.contiguous()
    return kernel(x, weight, low, high, step, bits, momentum, moves, per_channel)


def _check_stop(grad, outside):
    checks.check_float("grad", grad)
    checks.check_dtype("outside", outside, torch.uint8)
    checks.check_same_device("outside", outside, grad.device)
    if tuple(outside.shape) != ((grad.numel() + 7) // 8,):
        checks.fail("outside", f"a bit for each of {grad.numel()} elements", f"shape {tuple(outside.shape)}")
    if not grad.is_contiguous():
        checks.fail("grad", "a contiguous tensor", f"strides {grad.stride()}")


@op("stop_gradient_(Tensor(a!) grad, Tensor outside) -> ()", _check_stop)
def stop_gradient_(grad, outside):
    _check_stop(grad, outside)
    if grad.numel():
        select("stop_gradient_", checks.device_type(grad))(grad, outside)


class _LowPrecisionLinear(torch.autograd.Function):
    """F.linear of quantized x and weight; its gradient is quantized before anything is computed from it."""

    @staticmethod
    def forward(ctx, x, weight, bias, quantized_x, quantized_weight, outside, grad_bits, seed):
        ctx.save_for_backward(quantized_x, quantized_weight, outside, grad_bits, seed)
        return checks.own(F.linear(quantized_x, quantized_weight, bias))

    @staticmethod
    def backward(ctx, grad):
        x, weight, outside, grad_bits, seed = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if grad_bits is not None:
            grad = dynamic_fake_quantize(grad, grad_bits, seed, True, True, None)
        if needs_x:
            grad_x = grad @ weight
            if outside is not None:
                grad_x = _stopped(grad_x, outside)
        if needs_weight or needs_bias:
            rows = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
            if needs_weight:
                grad_weight = rows.t() @ (x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
            if needs_bias:
                grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _stopped(grad, outside):
    if torch.is_grad_enabled():  # a second derivative is wanted: nothing may be overwritten
        return grad.masked_fill(unpack(outside, grad.shape), 0.0)
    grad = grad.contiguous()
    stop_gradient_(grad, outside)
    return grad


low_precision_linear = _LowPrecisionLinear.apply
