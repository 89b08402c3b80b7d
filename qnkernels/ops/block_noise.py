"""block_noise: product-quantization noise and its proxies, with a straight-through gradient."""

import torch

from ..backends import select
from . import checks
from .kmeans import MAX_CLUSTERS, MAX_DIMENSION
from .library import autograd, op

KINDS = ("zero", "mean", "centroid")


def _check(weight, block_size, p, seed, kind, codebook):
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
    if kind != "centroid":
        if codebook is not None:
            checks.fail("codebook", f"None with kind={kind!r}", "a tensor")
        return
    expected = f"a tensor [K, {block_size}] with K from 1 to {MAX_CLUSTERS}"
    if codebook is None:
        checks.fail("codebook", expected, None)
    checks.check_dtype("codebook", codebook, torch.float32)
    checks.check_same_device("codebook", codebook, weight.device)
    if block_size > MAX_DIMENSION:
        checks.fail("block_size", f"at most {MAX_DIMENSION} with kind='centroid'", block_size)
    if codebook.dim() != 2 or codebook.shape[1] != block_size or not 1 <= len(codebook) <= MAX_CLUSTERS:
        checks.fail("codebook", expected, f"shape {tuple(codebook.shape)}")


def _fake(weight, block_size, p, seed, kind="zero", rescale=True, dtype=None, codebook=None):
    _check(weight, block_size, p, seed, kind, codebook)
    return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)


@op(
    "block_noise(Tensor weight, int block_size, float p, Tensor seed, str kind='zero', bool rescale=True, "
    "ScalarType? dtype=None, Tensor? codebook=None) -> Tensor",
    _fake,
)
def block_noise(weight, block_size, p, seed, kind="zero", rescale=True, dtype=None, codebook=None):
    _check(weight, block_size, p, seed, kind, codebook)
    if dtype is not None and dtype not in checks.FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    kernel = select("block_noise", checks.device_type(weight))
    arguments = (weight.contiguous(), block_size, p, seed, kind, rescale, dtype or weight.dtype)
    return kernel(*arguments) if codebook is None else kernel(*arguments, codebook=codebook.contiguous())


def _setup_context(ctx, inputs, output):
    ctx.weight_dtype = inputs[0].dtype


def _backward(ctx, grad):
    return (grad.to(ctx.weight_dtype), *[None] * 7)


autograd(block_noise, _backward, _setup_context)
