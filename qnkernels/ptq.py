"""Integer quantization after training: weights only, or weights and activations."""

import functools
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from .layers import Layers, Steps, check_owns_weight, naming
from .nn.compressed import become_
from .nn.input_range import quantizer_of
from .nn.int_conv2d import IntConv2d
from .nn.int_embedding import IntEmbedding, check_embedding
from .nn.int_linear import linear_class
from .nn.noisy import NOISY, check_weight
from .nn.packed import PackedLayer, PackedWeight, check_columns, check_packing_options, pack_weight


@dataclass(frozen=True)
class IntWeightOnlyConfig:
    """nn.Linear, nn.Embedding and nn.Conv2d, noisy or not, become IntLinear, IntEmbedding and IntConv2d over
    codes of `bits` bits, 2 to 8.

    In a file a code takes just these bits. In memory it takes 4 or 8, and with up to 4 rows must have an even
    number of weights; `filter_fn` leaves out layers, filters of 3 x 3 x 3 say, that have not. One scale per
    output channel (embedding row, filter), per `group_size` weights of one, or per="tensor" for all, which is
    what a model trained with per-tensor noise was trained for. symmetric: no zero point. observer: of the
    weights, "minmax" or "histogram" (least squared error). Layers that share a weight share its codes. Raises
    ValueError naming the field.
    """

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = False
    observer: str = "minmax"
    per: str = "channel"

    ACTIVATIONS: ClassVar[str] = "float"
    CONVERTS: ClassVar[tuple[type[nn.Module], ...]] = (*NOISY, *NOISY.values())

    def __post_init__(self) -> None:
        check_packing_options(self.bits, self.group_size, self.observer, self.per)

    def plan(self, layers: Layers) -> Steps:
        """One step per layer, made after every layer was checked and packed; a step cannot fail."""
        packed: dict[int, PackedWeight] = {}
        steps = []
        for name, layer in layers:
            with naming(name):
                self.check(layer)
                steps.append(functools.partial(become_, layer, self.convert(layer, packed)))
        return steps

    def check(self, layer: nn.Module) -> None:
        """Raises ValueError or TypeError for a weight that cannot be packed."""
        check_owns_weight(layer)
        if isinstance(layer, nn.Embedding):
            check_embedding(layer)
        check_weight(layer.weight)
        check_columns(layer.weight.flatten(1).shape, self.bits, self.group_size)

    def convert(self, layer: nn.Module, packed: dict[int, PackedWeight]) -> PackedLayer:
        """The layer that `layer` is to become; `packed` holds, and gets, the weights that are done, by id."""
        key = id(layer.weight)
        if key not in packed:
            rows = layer.weight.detach().flatten(1)
            options = (self.group_size, self.symmetric, self.observer, self.per)
            packed[key] = pack_weight(rows, self.bits, *options)
        if isinstance(layer, nn.Embedding):
            return IntEmbedding(packed[key], layer.padding_idx)
        activations = (self.ACTIVATIONS, *(quantizer_of(layer) if self.ACTIVATIONS == "static" else ()))
        if isinstance(layer, nn.Conv2d):
            return IntConv2d(packed[key], layer, *activations)
        return linear_class(self.bits)(packed[key], layer.bias, *activations)


@dataclass(frozen=True)
class Int8WeightOnlyConfig(IntWeightOnlyConfig):
    """IntWeightOnlyConfig with 8-bit codes."""

    bits: int = field(default=8, init=False, repr=False)


@dataclass(frozen=True)
class Int4WeightOnlyConfig(IntWeightOnlyConfig):
    """IntWeightOnlyConfig with 4-bit codes. Rows must have a multiple of group_size weights.

    group_size=None: one scale per output channel.
    """

    bits: int = field(default=4, init=False, repr=False)
    group_size: int | None = 128


@dataclass(frozen=True)
class Int8DynamicConfig(Int8WeightOnlyConfig):
    """As Int8WeightOnlyConfig, and IntLinear and IntConv2d quantize their input to 8 bits, too, over a range
    of each token's (of each position's patch) own.
    """

    ACTIVATIONS: ClassVar[str] = "dynamic"


@dataclass(frozen=True)
class Int8StaticConfig(Int8WeightOnlyConfig):
    """As Int8DynamicConfig, over the one range that `calibrate` recorded for each layer's input.

    A layer without one is a ValueError; nn.Embedding needs none.
    """

    ACTIVATIONS: ClassVar[str] = "static"
