"""Linear layers that train in low precision: their operands, and the gradients of those."""

import torch
import torch.nn.functional as F

from ..backends import select
from ..reference.low_precision import unpack
from . import checks
from .direct import watched
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


class _OfOperands(torch.autograd.Function):
    """F.linear of quantized x and weight; its gradient is quantized before anything is computed from it."""

    @staticmethod
    def forward(ctx, x, weight, bias, quantized_x, quantized_weight, outside, grad_bits, seed):
        ctx.save_for_backward(quantized_x, quantized_weight, outside, grad_bits, seed)
        return checks.own(F.linear(quantized_x, quantized_weight, bias))

    @staticmethod
    def backward(ctx, grad):
        quantized_x, weight, outside, grad_bits, seed = ctx.saved_tensors
        direct = not (torch.is_grad_enabled() or watched(grad)) and grad.numel() != 0
        if grad_bits is not None:
            quantize = _kernel("dynamic_fake_quantize", grad) if direct else dynamic_fake_quantize
            grad = quantize(grad.contiguous(), grad_bits, seed, True, True, None)
        needs_x, needs_weight, needs_bias, *rest = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = rows @ weight
            if outside is not None:
                if torch.is_grad_enabled():  # a second derivative is wanted: nothing may be overwritten
                    grad_x = grad_x.masked_fill(unpack(outside, grad_x.shape), 0.0)
                else:
                    (_kernel("stop_gradient_", grad) if direct else stop_gradient_)(grad_x, outside)
            grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
        if needs_weight:
            grad_weight = rows.t() @ quantized_x.reshape(-1, weight.shape[1])
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, *[None] * len(rest)


class _Direct(_OfOperands):
    """The same from x and weight as they are, where nobody looks at ops: one call for all of a layer."""

    @staticmethod
    def forward(ctx, x, weight, bias, low, high, step, bits, momentum, moves, per_channel, grad_bits, seed):
        quantized_x, outside, quantized_weight = low_precision_operands_.__wrapped__(
            x, weight, low, high, step, bits, momentum, moves, per_channel
        )
        ctx.save_for_backward(quantized_x, quantized_weight, outside, grad_bits, seed)
        rows = quantized_x.view(-1, x.shape[-1])
        return checks.like_rows(F.linear(rows, quantized_weight, bias), x)


def _kernel(name, tensor):
    return select(name, checks.device_type(tensor))


low_precision_linear = _OfOperands.apply


def moving_low_precision_linear(
    x, weight, bias, low, high, step, bits, momentum, moves, per_channel, grad_bits, seed
):
    """low_precision_linear of the operands that low_precision_operands_ gives."""
    quantizer = low, high, step, bits, momentum, moves, per_channel
    if watched(x, weight):
        operands = low_precision_operands_(x.detach(), weight.detach(), *quantizer)
        quantized_x, outside, quantized_weight = operands
        return low_precision_linear(x, weight, bias, quantized_x, quantized_weight, outside, grad_bits, seed)
    return _Direct.apply(x, weight, bias, *quantizer, grad_bits, seed)
