"""Weight-only integer quantization after training."""

import functools
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .layers import Layers, Steps, check_owns_weight, naming
from .nn.compressed import become_
from .nn.int_embedding import IntEmbedding, check_embedding
from .nn.int_linear import LINEAR
from .nn.noisy import NoisyEmbedding, NoisyLinear, check_weight
from .nn.packed import PackedLayer, PackedWeight, check_packing_options, pack_weight


@dataclass(frozen=True)
class Int8WeightOnlyConfig:
    """nn.Linear and nn.Embedding, noisy or not, become IntLinear and IntEmbedding over 8-bit codes.

    One scale per output channel (embedding row), per `group_size` weights of one, or per="tensor" for
    all, which is what a model trained with per-tensor noise was trained for. symmetric: no zero point.
    observer: "minmax" or "histogram" (least squared error). Layers that share a weight share its codes.
    nn.Conv2d layers stay as they are. Raises ValueError naming the field.
    """

    group_size: int | None = None
    symmetric: bool = False
    observer: str = "minmax"
    per: str = "channel"

    BITS: ClassVar[int] = 8
    CONVERTS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Embedding, NoisyLinear, NoisyEmbedding)

    def __post_init__(self) -> None:
        check_packing_options(self.BITS, self.group_size, self.observer, self.per)

    def plan(self, layers: Layers) -> Steps:
        """One step per layer, made after every layer was checked and packed; a step cannot fail."""
        packed: dict[int, PackedWeight] = {}
        steps = []
        for name, layer in layers:
            with naming(name):
                steps.append(functools.partial(become_, layer, self._convert(layer, packed)))
        return steps

    def _convert(self, layer: nn.Module, packed: dict[int, PackedWeight]) -> PackedLayer:
        check_owns_weight(layer)
        if isinstance(layer, nn.Embedding):
            check_embedding(layer)
        key = id(layer.weight)
        if key not in packed:
            check_weight(layer.weight)
            packed[key] = pack_weight(
                layer.weight.detach(), self.BITS, self.group_size, self.symmetric, self.observer, self.per
            )
        if isinstance(layer, nn.Embedding):
            return IntEmbedding(packed[key], layer.padding_idx)
        return LINEAR[self.BITS](packed[key], layer.bias)


@dataclass(frozen=True)
class Int4WeightOnlyConfig(Int8WeightOnlyConfig):
    """As Int8WeightOnlyConfig, over 4-bit codes. group_size=None: one scale per output channel."""

    group_size: int | None = 128

    BITS: ClassVar[int] = 4
