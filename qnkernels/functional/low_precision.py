"""Training in low precision: weights, inputs and gradients over ranges that follow the data."""

import torch

from .. import ops
from .arguments import bits_tensor, seed_tensor


def dynamic_fake_quantize(
    x: torch.Tensor,
    bits: int | torch.Tensor = 8,
    per_sample: bool = False,
    stochastic: bool = False,
    seed: int | torch.Tensor = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Fake quantization of x over its own range, or with `per_sample` of each x[i] over its own.

    x: fp32, bf16 or fp16. The range runs from the smallest to the largest value, widened to hold 0, which is
    a level; bits: 2 to 16. stochastic: values are rounded up or down at random, so that the mean is right;
    the same seed gives the same result on every backend. Returns the shape of x, in `dtype` (that of x by
    default). Gradient: straight-through (identity, since the range holds every value).
    Raises ValueError (shapes, bits, device) and TypeError (dtypes).
    """
    seed = seed_tensor(seed, x.device)
    return ops.dynamic.dynamic_fake_quantize(
        x, bits_tensor(bits, x.device), seed, per_sample, stochastic, dtype
    )


def moving_fake_quantize(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    momentum: float = 0.1,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
    moves: bool = True,
) -> torch.Tensor:
    """Fake quantization of x over a moving average of its range, which x itself moves first, in one op.

    low, high (fp32) and step (0-d int64) are updated in place, as by `update_range_` with "ema_minmax";
    unless `moves`, x is quantized over the range as it stands, as activation checkpointing repeats it.
    Returns the shape of x, in `dtype` (that of x by default). Gradient: straight-through, stopped where x
    lies outside the range. Raises ValueError (shapes, bits, momentum, device) and TypeError (dtypes).
    """
    arguments = x, low, high, step, bits_tensor(bits, x.device), momentum, axis, group_size, dtype
    return ops.dynamic.moving_fake_quantize(*arguments, moves)


def moving_fake_quantize_(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    momentum: float = 0.1,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same without a gradient; returns the quantized x with its scale and zero point."""
    arguments = x.detach(), low, high, step, bits_tensor(bits, x.device), momentum, axis, group_size, dtype
    return ops.dynamic.moving_fake_quantize_(*arguments)


def quantize_gradient(
    x: torch.Tensor, bits: int | torch.Tensor = 8, seed: int | torch.Tensor = 0
) -> torch.Tensor:
    """A copy of x whose gradient is quantized: over the range of each sample, with stochastic rounding.

    Raises ValueError (bits) and TypeError (dtypes).
    """
    return ops.dynamic.quantize_gradient(x, bits_tensor(bits, x.device), seed_tensor(seed, x.device))


def low_precision_operands_(
    x: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    momentum: float = 0.1,
    moves: bool = True,
    per_channel: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first three arguments of low_precision_linear's forward: quantized x, `outside`, quantized weight.

    x as by `moving_fake_quantize`; unless `moves`, over the range as it stands (that of x where step is 0),
    and nothing is changed. weight [out, in] as by `dynamic_fake_quantize`, with per_sample=per_channel, in
    the dtype of x. outside: which elements of x lie outside the levels, a bit for each, uint8 [(n + 7) // 8].
    Neither has a gradient. Raises ValueError (shapes, bits, momentum, device) and TypeError (dtypes).
    """
    state = low, high, step, bits_tensor(bits, x.device)
    return ops.low_precision.low_precision_operands_(
        x.detach(), weight.detach(), *state, momentum, moves, per_channel
    )


def low_precision_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    quantized_x: torch.Tensor,
    quantized_weight: torch.Tensor,
    outside: torch.Tensor | None = None,
    grad_bits: int | torch.Tensor | None = 8,
    seed: int | torch.Tensor = 0,
) -> torch.Tensor:
    """F.linear(quantized_x, quantized_weight, bias) with straight-through gradients to x and weight.

    x [..., in]; the quantized x, weight [out, in] and bias [out] have one dtype, which the result has.
    outside: the elements of x that get no gradient, as from `low_precision_operands_`. grad_bits: the
    gradient of the result is quantized as by `quantize_gradient`, first of all; None leaves it as it is, and
    no seed is needed. Raises ValueError (bits) and TypeError (dtypes).
    """
    if not x.dtype == quantized_x.dtype == quantized_weight.dtype:
        expected = f"that of quantized_weight, {quantized_weight.dtype}"
        raise TypeError(f"x and quantized_x: expected {expected}, got {x.dtype} and {quantized_x.dtype}")
    width, drawn = None, None
    if grad_bits is not None:
        width, drawn = bits_tensor(grad_bits, x.device), seed_tensor(seed, x.device)
    quantized = quantized_x, quantized_weight, outside
    return ops.low_precision.low_precision_linear(x, weight, bias, *quantized, width, drawn)


def moving_low_precision_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    momentum: float = 0.1,
    moves: bool = True,
    per_channel: bool = True,
    grad_bits: int | torch.Tensor | None = 8,
    seed: int | torch.Tensor = 0,
) -> torch.Tensor:
    """low_precision_linear of x, weight and bias, all in one dtype, over what low_precision_operands_ gives.

    Where nothing looks at ops it is one call, with the same bits as the two.
    """
    if grad_bits is None:
        seed = None
    else:
        grad_bits, seed = bits_tensor(grad_bits, x.device), seed_tensor(seed, x.device)
    quantizer = low, high, step, bits_tensor(bits, x.device), momentum, moves, per_channel
    return ops.low_precision.moving_low_precision_linear(x, weight, bias, *quantizer, grad_bits, seed)
