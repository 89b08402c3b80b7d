"""fake_quantize: scalar quantization noise with a straight-through gradient."""

import torch

from ..backends import select
from ..reference.fake_quantize import OUTSIDE_TILE
from . import checks
from .library import autograd, op


def _check(x, scale, zero_point, bits, p, seed, axis, group_size):
    checks.check_float("x", x)
    checks.check_parameter("scale", scale, x, axis, group_size)
    checks.check_parameter("zero_point", zero_point, x, axis, group_size)
    checks.check_counter("bits", bits, x.device)
    checks.check_counter("seed", seed, x.device)
    checks.check_rate(p)


def _tiles(x) -> int:
    return -(-x.numel() // OUTSIDE_TILE)


def _fake(x, scale, zero_point, bits, p, seed, axis=None, group_size=None, dtype=None, mark=False):
    _check(x, scale, zero_point, bits, p, seed, axis, group_size)
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    return y, x.new_empty(_tiles(x) if mark else 0, dtype=torch.uint8)


@op(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor bits, float p, Tensor seed, "
    "int? axis=None, int? group_size=None, ScalarType? dtype=None, bool mark=False) -> (Tensor, Tensor)",
    _fake,
)
def fake_quantize(x, scale, zero_point, bits, p, seed, axis=None, group_size=None, dtype=None, mark=False):
    """y and, with `mark`, where x lies outside the range, by tiles: a hint for the gradient (else empty)."""
    _check(x, scale, zero_point, bits, p, seed, axis, group_size)
    if dtype is not None and dtype not in checks.FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    kernel = select("fake_quantize", checks.device_type(x))
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    outside = x.new_empty(_tiles(x) if mark else 0, dtype=torch.uint8)
    arguments = (x.contiguous(), scale, zero_point, bits, p, seed, axis, group_size, dtype or x.dtype)
    return kernel(*arguments, outside if mark else None), outside


def _check_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size, outside):
    _check(x, scale, zero_point, bits, p, seed, axis, group_size)
    checks.check_float("grad", grad)
    checks.check_same_device("grad", grad, x.device)
    if grad.shape != x.shape:
        checks.fail("grad", f"shape {tuple(x.shape)}", tuple(grad.shape))
    if outside is not None:
        checks.check_dtype("outside", outside, torch.uint8)
        checks.check_same_device("outside", outside, x.device)
        if outside.shape != (_tiles(x),):
            checks.fail("outside", f"shape ({_tiles(x)},)", tuple(outside.shape))


def _fake_backward(grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None, outside=None):
    _check_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size, outside)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@op(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, Tensor bits, float p, "
    "Tensor seed, int? axis=None, int? group_size=None, Tensor? outside=None) -> Tensor",
    _fake_backward,
)
def fake_quantize_backward(
    grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None, outside=None
):
    """outside: as fake_quantize of the same x and quantizer marked it; x is not read where nothing was."""
    _check_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size, outside)
    kernel = select("fake_quantize_backward", checks.device_type(x))
    quantizer = (scale.contiguous(), zero_point.contiguous(), bits, p, seed, axis, group_size)
    return kernel(grad.contiguous(), x.contiguous(), *quantizer, _contiguous(outside))


def _contiguous(outside):
    return None if outside is None else outside.contiguous()


def _check_in_place(grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None, outside=None):
    _check_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size, outside)
    checks.check_dtype("grad", grad, x.dtype)
    if not grad.is_contiguous():
        checks.fail("grad", "a contiguous tensor", f"strides {grad.stride()}")


@op(
    "fake_quantize_backward_(Tensor(a!) grad, Tensor x, Tensor scale, Tensor zero_point, Tensor bits, "
    "float p, Tensor seed, int? axis=None, int? group_size=None, Tensor? outside=None) -> ()",
    _check_in_place,
)
def fake_quantize_backward_(
    grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None, outside=None
):
    _check_in_place(grad, x, scale, zero_point, bits, p, seed, axis, group_size, outside)
    kernel = select("fake_quantize_backward", checks.device_type(x))
    quantizer = (scale.contiguous(), zero_point.contiguous(), bits, p, seed, axis, group_size)
    kernel(grad, x.contiguous(), *quantizer, _contiguous(outside), out=grad)


def _setup_context(ctx, inputs, output):
    x, scale, zero_point, bits, p, seed, axis, group_size, _dtype, mark = inputs
    ctx.save_for_backward(x, scale, zero_point, bits, seed, output[1])
    ctx.arguments = (p, axis, group_size)
    ctx.mark = mark
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 10
    x, scale, zero_point, bits, seed, outside = ctx.saved_tensors
    p, axis, group_size = ctx.arguments
    outside = outside if ctx.mark else None
    grad_x = fake_quantize_backward(grad, x, scale, zero_point, bits, p, seed, axis, group_size, outside)
    return (grad_x, *[None] * 9)


autograd(fake_quantize, _backward, _setup_context)


def _setup_double(ctx, inputs, output):
    grad, x, scale, zero_point, bits, p, seed, axis, group_size, outside = inputs
    ctx.save_for_backward(x, scale, zero_point, bits, seed, outside)
    ctx.arguments = (p, axis, group_size)
    ctx.grad_dtype = grad.dtype


def _double_backward(ctx, grad_grad):
    """The gradient is linear in grad, with a 0/1 diagonal: its own transpose."""
    x, scale, zero_point, bits, seed, outside = ctx.saved_tensors
    p, axis, group_size = ctx.arguments
    passed = fake_quantize_backward(grad_grad, x, scale, zero_point, bits, p, seed, axis, group_size, outside)
    return (passed.to(ctx.grad_dtype), *[None] * 9)


autograd(fake_quantize_backward, _double_backward, _setup_double)
