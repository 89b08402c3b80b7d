"""Low-precision training of layers, the precision of which a schedule may change (arXiv 2101.09868)."""

import functools
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import nn

from .layers import Layers, Steps, naming
from .nn.noisy import NOISY, add_noise_, make_noise
from .nn.precision import check_precision_options


@dataclass(frozen=True)
class CyclicPrecisionConfig:
    """nn.Linear, nn.Embedding and nn.Conv2d train with quantized weights, inputs and gradients.

    bits: of weights and inputs, 2 to 16, until a CyclicPrecision changes it. grad_bits: of gradients, 2 to
    16, or 32 for gradients as they are. input_range: "moving" average, each "sample" by itself, or None for
    inputs as they are. per: a range of the weight for each output "channel", or "tensor". momentum: of the
    average.
    Raises ValueError naming the field.
    """

    bits: int = 8
    grad_bits: int = 8
    input_range: str | None = "moving"
    per: str = "channel"
    momentum: float = 0.1

    CONVERTS: ClassVar[tuple[type[nn.Module], ...]] = (*NOISY, *NOISY.values())

    def __post_init__(self) -> None:
        check_precision_options(self.bits, self.grad_bits, self.input_range, self.per, self.momentum)

    def plan(self, layers: Layers) -> Steps:
        """One step per layer, made after every layer was checked; a step cannot fail."""
        steps = []
        for name, layer in layers:
            with naming(name):
                noise = make_noise(layer, "precision", **asdict(self))
                steps.append(functools.partial(add_noise_, layer, *noise))
        return steps
