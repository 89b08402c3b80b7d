"""The range of a layer's input, as `calibrate` records it, and the 8-bit quantizer that it defines."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from .. import functional
from ..ops.checks import fail

ATTRIBUTE = "input_range"  # of the layer; a plain attribute, so that state_dict does not know it


@dataclass(frozen=True)
class InputRange:
    """The values that a layer is given lie, but for outliers, in [low, high]."""

    low: float
    high: float


def record_(layer: nn.Module, value: InputRange | None) -> None:
    """Keep a range with the layer; None forgets the one it has."""
    layer.__dict__.pop(ATTRIBUTE, None)
    if value is not None:
        setattr(layer, ATTRIBUTE, value)


def quantizer_of(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (0-d fp32, on the device of its weight) for the input of a calibrated layer.

    Raises ValueError where no range was recorded.
    """
    value = layer.__dict__.get(ATTRIBUTE)
    if value is None:
        fail(ATTRIBUTE, "a range recorded by calibrate", "none: the layer saw no data")
    low, high = (torch.tensor(end, device=layer.weight.device) for end in (value.low, value.high))
    scale, zero_point = functional.quantization_parameters(low, high, 8)
    check_input_quantizer(scale, zero_point)
    return scale, zero_point


def check_input_quantizer(x_scale: torch.Tensor, x_zero_point: torch.Tensor) -> None:
    """What an 8-bit quantizer can be (values on the meta device are unknown); raises ValueError."""
    for name, value in (("x_scale", x_scale), ("x_zero_point", x_zero_point)):
        if value.dim() != 0:
            fail(name, "a number or a 0-d tensor", f"shape {tuple(value.shape)}")
        if value.device.type == "meta":
            return
    scale, zero_point = x_scale.item(), x_zero_point.item()
    if not (math.isfinite(scale) and scale > 0):
        fail("x_scale", "a finite positive value", scale)
    if not (0 <= zero_point <= 255 and zero_point == int(zero_point)):
        fail("x_zero_point", "an integer in [0, 255]", zero_point)
