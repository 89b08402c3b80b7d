"""pq_decode, pq_linear and pq_embedding: layers over product-quantized weights.

The layout of `codes` in memory is the caller's: canonical [rows, n_blocks], or its transpose seen as such,
which is what the CPU kernels read fastest. Float64 is served by the reference, for checks of gradients.
"""

import torch

from ..backends import kernels, select
from . import checks
from .library import autograd, op

CODES = (torch.uint8, torch.uint16)
GRADIENTS = ("mean", "sum")
MAX_DIMENSION, MAX_CENTROIDS = 64, 1 << 16


def _check_float(argument, x) -> None:
    if x.dtype != torch.float64:
        checks.check_float(argument, x)


def _kernel(name, *tensors):
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return kernels("reference")[name]
    return select(name, checks.device_type(tensors[0]))


def _check_codes(codes, codebook=None) -> None:
    if codes.dtype not in CODES:
        raise TypeError(f"codes: expected uint8 or uint16, got {codes.dtype}")
    if codes.dim() != 2:
        checks.fail("codes", "two dimensions [rows, n_blocks]", f"shape {tuple(codes.shape)}")
    if codebook is None:
        return
    _check_float("codebook", codebook)
    checks.check_same_device("codebook", codebook, codes.device)
    limit = 256 if codes.dtype == torch.uint8 else MAX_CENTROIDS
    rows_and_columns = codebook.dim() == 2 and 1 <= codebook.shape[0] <= limit
    if not rows_and_columns or not 1 <= codebook.shape[1] <= MAX_DIMENSION:
        expected = f"shape [K, d] with K up to {limit} and d up to {MAX_DIMENSION}"
        checks.fail("codebook", expected, tuple(codebook.shape))


def _check_gradient(codebook_grad) -> None:
    if codebook_grad not in GRADIENTS:
        checks.fail("codebook_grad", f"one of {GRADIENTS}", repr(codebook_grad))


def _fake_decode(codes, codebook, codebook_grad="mean"):
    _check_codes(codes, codebook)
    _check_gradient(codebook_grad)
    return codebook.new_empty(codes.shape[0], codes.shape[1] * codebook.shape[1])


@op("pq_decode(Tensor codes, Tensor codebook, str codebook_grad='mean') -> Tensor", _fake_decode)
def pq_decode(codes, codebook, codebook_grad="mean"):
    _check_codes(codes, codebook)
    _check_gradient(codebook_grad)
    return _kernel("pq_decode", codebook)(codes, codebook.contiguous())


def _check_decode_backward(grad, codes, n_centroids) -> int:
    _check_codes(codes)
    _check_float("grad", grad)
    checks.check_same_device("grad", grad, codes.device)
    rows, blocks = codes.shape
    if grad.dim() != 2 or grad.shape[0] != rows or grad.shape[1] % max(blocks, 1):
        checks.fail("grad", f"shape [{rows}, {blocks} * d]", tuple(grad.shape))
    if n_centroids < 1:
        checks.fail("n_centroids", "an integer of at least 1", n_centroids)
    return grad.shape[1] // max(blocks, 1)


def _fake_decode_backward(grad, codes, n_centroids, mean):
    return grad.new_empty(n_centroids, _check_decode_backward(grad, codes, n_centroids))


@op(
    "pq_decode_backward(Tensor grad, Tensor codes, int n_centroids, bool mean) -> Tensor",
    _fake_decode_backward,
)
def pq_decode_backward(grad, codes, n_centroids, mean):
    _check_decode_backward(grad, codes, n_centroids)
    return _kernel("pq_decode_backward", grad)(grad.contiguous(), codes, n_centroids, mean)


def _decode_context(ctx, inputs, output):
    codes, codebook, codebook_grad = inputs
    ctx.save_for_backward(codes)
    ctx.n_centroids, ctx.mean = len(codebook), codebook_grad == "mean"


def _decode_gradient(ctx, grad):
    (codes,) = ctx.saved_tensors
    return None, pq_decode_backward(grad, codes, ctx.n_centroids, ctx.mean), None


autograd(pq_decode, _decode_gradient, _decode_context)


def _check_linear(x, codes, codebook, bias) -> None:
    _check_codes(codes, codebook)
    _check_float("x", x)
    checks.check_same_device("x", x, codes.device)
    columns = codes.shape[1] * codebook.shape[1]
    if x.dim() == 0 or x.shape[-1] != columns:
        checks.fail("x", f"[..., {columns}]", f"shape {tuple(x.shape)}")
    if bias is not None:
        _check_float("bias", bias)
        checks.check_same_device("bias", bias, codes.device)
        if tuple(bias.shape) != (codes.shape[0],):
            checks.fail("bias", f"shape ({codes.shape[0]},)", tuple(bias.shape))


def _fake_linear(x, codes, codebook, bias=None, codebook_grad="mean"):
    _check_linear(x, codes, codebook, bias)
    _check_gradient(codebook_grad)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@op(
    "pq_linear(Tensor x, Tensor codes, Tensor codebook, Tensor? bias=None, str codebook_grad='mean') "
    "-> Tensor",
    _fake_linear,
)
def pq_linear(x, codes, codebook, bias=None, codebook_grad="mean"):
    _check_linear(x, codes, codebook, bias)
    _check_gradient(codebook_grad)
    y = _kernel("pq_linear", x, codebook)(checks.rows(x), codes, codebook.contiguous(), bias)
    return checks.like_rows(y, x)


def _check_linear_backward(grad, x, codes, codebook) -> None:
    _check_linear(x, codes, codebook, None)
    checks.check_dtype("grad", grad, x.dtype)
    checks.check_same_device("grad", grad, x.device)
    expected = (*x.shape[:-1], codes.shape[0])
    if tuple(grad.shape) != expected:
        checks.fail("grad", f"shape {expected}", tuple(grad.shape))


def _fake_linear_backward(grad, x, codes, codebook, mean, needs_x, needs_codebook):
    _check_linear_backward(grad, x, codes, codebook)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    return grad_x, x.new_empty(codebook.shape if needs_codebook else 0, dtype=wide)


@op(
    "pq_linear_backward(Tensor grad, Tensor x, Tensor codes, Tensor codebook, bool mean, bool needs_x, "
    "bool needs_codebook) -> (Tensor, Tensor)",
    _fake_linear_backward,
)
def pq_linear_backward(grad, x, codes, codebook, mean, needs_x, needs_codebook):
    """Both gradients of pq_linear in one pass, as fp32 sums; what is not needed comes back empty."""
    _check_linear_backward(grad, x, codes, codebook)
    kernel = _kernel("pq_linear_backward", x, codebook)
    arguments = (codes, codebook.contiguous(), mean, needs_x, needs_codebook)
    grad_x, grad_codebook = kernel(checks.rows(grad), checks.rows(x), *arguments)
    return grad_x.reshape(x.shape) if needs_x else grad_x, grad_codebook


def _linear_context(ctx, inputs, output):
    x, codes, codebook, bias, codebook_grad = inputs
    ctx.save_for_backward(x, codes, codebook)
    ctx.mean = codebook_grad == "mean"
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_gradient(ctx, grad):
    x, codes, codebook = ctx.saved_tensors
    needs_x, needs_codebook = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    grad_x = grad_codebook = grad_bias = None
    if needs_x or needs_codebook:
        arguments = (grad, x, codes, codebook, ctx.mean, needs_x, needs_codebook)
        grad_x, grad_codebook = pq_linear_backward(*arguments)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=wide).to(ctx.bias_dtype)
    grad_codebook = grad_codebook.to(codebook.dtype) if needs_codebook else None
    return grad_x if needs_x else None, None, grad_codebook, grad_bias, None


autograd(pq_linear, _linear_gradient, _linear_context)


def _check_embedding(indices, codes, codebook) -> None:
    _check_codes(codes, codebook)
    checks.check_dtype("indices", indices, torch.int64)
    checks.check_same_device("indices", indices, codes.device)


def _fake_embedding(indices, codes, codebook, codebook_grad="mean"):
    _check_embedding(indices, codes, codebook)
    _check_gradient(codebook_grad)
    return codebook.new_empty((*indices.shape, codes.shape[1] * codebook.shape[1]))


@op(
    "pq_embedding(Tensor indices, Tensor codes, Tensor codebook, str codebook_grad='mean') -> Tensor",
    _fake_embedding,
)
def pq_embedding(indices, codes, codebook, codebook_grad="mean"):
    """Indices outside [0, rows) raise IndexError on the CPU. On a GPU, where a check would wait for the
    device, they are clamped to the table.
    """
    _check_embedding(indices, codes, codebook)
    _check_gradient(codebook_grad)
    kernel = _kernel("pq_embedding", codebook)
    y = kernel(indices.reshape(-1).contiguous(), codes, codebook.contiguous())
    return y.resize_(*indices.shape, codes.shape[1] * codebook.shape[1])


def _check_embedding_backward(grad, indices, codes, n_centroids) -> int:
    _check_codes(codes)
    _check_float("grad", grad)
    checks.check_dtype("indices", indices, torch.int64)
    checks.check_same_device("grad", grad, codes.device)
    checks.check_same_device("indices", indices, codes.device)
    blocks = max(codes.shape[1], 1)
    if grad.shape[:-1] != indices.shape or grad.dim() == 0 or grad.shape[-1] % blocks:
        checks.fail("grad", f"shape {(*indices.shape, f'{codes.shape[1]} * d')}", tuple(grad.shape))
    if n_centroids < 1:
        checks.fail("n_centroids", "an integer of at least 1", n_centroids)
    return grad.shape[-1] // blocks


def _fake_embedding_backward(grad, indices, codes, n_centroids, mean):
    d = _check_embedding_backward(grad, indices, codes, n_centroids)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.new_empty(n_centroids, d, dtype=wide)


@op(
    "pq_embedding_backward(Tensor grad, Tensor indices, Tensor codes, int n_centroids, bool mean) -> Tensor",
    _fake_embedding_backward,
)
def pq_embedding_backward(grad, indices, codes, n_centroids, mean):
    _check_embedding_backward(grad, indices, codes, n_centroids)
    kernel = _kernel("pq_embedding_backward", grad)
    rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    return kernel(rows, indices.reshape(-1).contiguous(), codes, n_centroids, mean)


def _embedding_context(ctx, inputs, output):
    indices, codes, codebook, codebook_grad = inputs
    ctx.save_for_backward(indices, codes)
    ctx.n_centroids, ctx.dtype, ctx.mean = len(codebook), codebook.dtype, codebook_grad == "mean"


def _embedding_gradient(ctx, grad):
    indices, codes = ctx.saved_tensors
    arguments = (grad, indices, codes, ctx.n_centroids, ctx.mean)
    return None, None, pq_embedding_backward(*arguments).to(ctx.dtype), None


autograd(pq_embedding, _embedding_gradient, _embedding_context)
