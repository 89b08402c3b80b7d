"""noisy_linear: a linear layer over a noised weight, whose weight gradient is masked where it was computed.

The same as F.linear(x, fake_quantize(weight, ...), bias), with one pass over memory less in the backward: the
gradient of the weight is a fresh matrix product, so the straight-through mask is applied to it in place.
"""

import torch
import torch.nn.functional as F

from ..backends import select
from . import checks
from .direct import watched
from .fake_quantize import fake_quantize, fake_quantize_backward, fake_quantize_backward_


class _NoisyLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, zero_point, bits, p, seed, axis, group_size):
        quantizer = (scale, zero_point, bits, p, seed, axis, group_size)
        mark = ctx.needs_input_grad[1]
        noised, outside = fake_quantize(weight, *quantizer, None, mark)
        ctx.save_for_backward(x, weight, noised, scale, zero_point, bits, seed, outside)
        ctx.arguments = (p, axis, group_size)
        ctx.has_bias = bias is not None
        return checks.own(F.linear(x, noised, bias))

    @staticmethod
    def backward(ctx, grad):
        x, weight, noised, scale, zero_point, bits, seed, outside = ctx.saved_tensors
        p, axis, group_size = ctx.arguments
        quantizer = (scale, zero_point, bits, p, seed, axis, group_size)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ noised
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
            if torch.is_grad_enabled():  # a second derivative is wanted: nothing may be overwritten
                grad_weight = fake_quantize_backward(grad_weight, weight, *quantizer, outside)
            elif watched(grad_weight, weight) or not grad_weight.is_contiguous():
                fake_quantize_backward_(grad_weight, weight, *quantizer, outside)
            else:  # the forward has checked all of it
                kernel = select("fake_quantize_backward", checks.device_type(weight))
                parameters = (scale.contiguous(), zero_point.contiguous(), *quantizer[2:])
                kernel(grad_weight, weight.contiguous(), *parameters, outside, out=grad_weight)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, *[None] * 7


def noisy_linear(x, weight, bias, scale, zero_point, bits, p, seed, axis, group_size):
    """x [..., in] and weight [out, in] of one dtype, bias [out] or None -> [..., out]."""
    return _NoisyLinear.apply(x, weight, bias, scale, zero_point, bits, p, seed, axis, group_size)
