"""Scalar quantization noise: train with intN weights at rate p (Quant-Noise, arXiv 2004.07320)."""

import functools
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import nn

from .layers import Layers, Steps, naming
from .nn.noise import check_number, check_scalar_options
from .nn.noisy import NOISY, add_noise_, make_noise
from .ops.checks import fail


@dataclass(frozen=True)
class ScalarNoiseConfig:
    """nn.Linear, nn.Embedding and nn.Conv2d become noisy: training quantizes each weight at rate p, eval all.

    bits: 2 to 16. p: rate in training; 1 is quantization-aware training. observer: "minmax",
    "ema_minmax" (moved by `momentum`) or "histogram" (least squared error). per: "tensor", "channel"
    (output channel or embedding row) or "group" (of `group_size` weights of a row). update_every:
    training forwards between two observations, 0 for the first one only. activations: the output of
    each layer is fake-quantized too, per tensor: always in eval, at rate `p_activations` in training.
    Raises ValueError naming the field.
    """

    bits: int = 8
    p: float = 0.5
    observer: str = "minmax"
    per: str = "tensor"
    group_size: int | None = None
    update_every: int = 100
    momentum: float = 0.1
    activations: bool = False
    p_activations: float = 0.0

    CONVERTS: ClassVar[tuple[type[nn.Module], ...]] = (*NOISY, *NOISY.values())

    def __post_init__(self) -> None:
        check_scalar_options(
            self.bits, self.p, self.observer, self.per, self.group_size, self.update_every, self.momentum
        )
        check_number("p_activations", self.p_activations)
        if not 0.0 <= self.p_activations <= 1.0:
            fail("p_activations", "a rate in [0, 1]", self.p_activations)

    def plan(self, layers: Layers) -> Steps:
        """One step per layer, made after every layer was checked; a step cannot fail."""
        steps = []
        for name, layer in layers:
            with naming(name):
                noise = make_noise(layer, "scalar", **asdict(self))
                steps.append(functools.partial(add_noise_, layer, *noise))
        return steps
