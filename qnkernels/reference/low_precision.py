"""Weight and input of a linear layer that trains in low precision, and the gradient of that input."""

import torch

from .dynamic import dynamic_fake_quantize
from .range import level_count, nearest_code, quantization_parameters, update_range_


def low_precision_operands_(
    x: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: torch.Tensor,
    momentum: float,
    moves: bool,
    per_channel: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x as by `moving_fake_quantize_`, weight as by `dynamic_fake_quantize`, both in the dtype of x.

    Between them which elements of x lie outside the levels, x < -z s or x > (2^bits - 1 - z) s, as `pack`
    keeps it. Unless `moves`, the range is used as it stands, where step is 0 that of x, and nothing changes.
    """
    if not moves:
        low, high, step = low.clone(), high.clone(), step.clone()
    update_range_(x, low, high, step, bits, "ema_minmax", int(moves), momentum)
    scale, zero_point = quantization_parameters(low, high, bits)
    values, top = x.float(), level_count(bits) - 1
    codes = nearest_code(values / scale + zero_point, top)
    outside = (values < (0.0 - zero_point) * scale) | (values > (top - zero_point) * scale)
    quantized_weight = dynamic_fake_quantize(weight, bits, bits, per_channel, False, x.dtype)
    return ((codes - zero_point) * scale).to(x.dtype), pack(outside), quantized_weight


def stop_gradient_(grad: torch.Tensor, outside: torch.Tensor) -> None:
    """Set grad to 0 where the bit of `outside` is set."""
    grad.masked_fill_(unpack(outside, grad.shape), 0.0)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """bool of any shape, n elements -> uint8 [(n + 7) // 8]: element i is bit i % 8 of byte i // 8."""
    bits = torch.nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=mask.device)).sum(1).to(torch.uint8)


def unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The mask that was packed."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()
