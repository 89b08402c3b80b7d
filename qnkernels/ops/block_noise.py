"""block_noise: product-quantization noise by proxy, with a straight-through gradient."""

import torch

from ..backends import select
from . import checks
from .library import autograd, op

KINDS = ("zero", "mean")


def _check(weight, block_size, p, seed, kind):
    checks.check_float("weight", weight)
    if weight.dim() != 2:
        checks.fail("weight", "two dimensions [out, in]", f"shape {tuple(weight.shape)}")
    checks.check_not_empty("weight", weight)
    if block_size < 1 or weight.shape[1] % block_size:
        checks.fail("block_size", f"a divisor of the {weight.shape[1]} inputs of weight", block_size)
    checks.check_rate(p)
    checks.check_counter("seed", seed, weight.device)
    if kind not in KINDS:
        checks.fail("kind", f"one of {KINDS}", repr(kind))


def _fake(weight, block_size, p, seed, kind="zero", rescale=True, dtype=None):
    _check(weight, block_size, p, seed, kind)
    return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)


@op(
    "block_noise(Tensor weight, int block_size, float p, Tensor seed, str kind='zero', bool rescale=True, "
    "ScalarType? dtype=None) -> Tensor",
    _fake,
)
def block_noise(weight, block_size, p, seed, kind="zero", rescale=True, dtype=None):
    _check(weight, block_size, p, seed, kind)
    if dtype is not None and dtype not in checks.FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    kernel = select("block_noise", weight.device.type)
    return kernel(weight.contiguous(), block_size, p, seed, kind, rescale, dtype or weight.dtype)


def _setup_context(ctx, inputs, output):
    ctx.weight_dtype = inputs[0].dtype


def _backward(ctx, grad):
    return (grad.to(ctx.weight_dtype), *[None] * 6)


autograd("block_noise", _backward, _setup_context)
