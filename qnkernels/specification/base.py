"""What every compressed layer's description has in common."""

from abc import ABC, abstractmethod
from dataclasses import MISSING, asdict, dataclass, fields
from typing import ClassVar

import torch
from torch import nn

from ..nn.compressed import CompressedLayer
from ..ops.checks import FLOATS, fail

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
Tensors = dict[str, torch.Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_integer(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


@dataclass(frozen=True)
class LayerSpec(ABC):
    """A compressed layer without its tensors. shape: of the weight; dtype: what it decodes to.

    The layer keeps `parts` in the file, by name; each may be stored in another form than it has in memory.
    """

    type: str
    shape: list[int]
    dtype: str
    bias: bool
    padding_idx: int | None

    # by `type`: the plain and the noisy class of a layer that may become one
    PLAIN: ClassVar[dict[str, tuple[type[nn.Module], ...]]]

    @classmethod
    @abstractmethod
    def of(cls, layer: CompressedLayer) -> "LayerSpec":
        """The description of a layer."""

    @classmethod
    def parse(cls, value: dict) -> "LayerSpec":
        """From what JSON gave, whose `type` is known; raises ValueError naming the field."""
        names = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if not required <= value.keys() <= names:
            fail("specification", f"an object with the fields {sorted(names)}", repr(value))
        spec = cls(**value)
        shape = spec.shape
        dimensions = 4 if nn.Conv2d in cls.PLAIN[spec.type] else 2
        if (
            not isinstance(shape, list)
            or len(shape) != dimensions
            or not all(is_integer(size, 1, 1 << 40) for size in shape)
        ):
            fail("shape", f"{dimensions} positive integers", repr(shape))
        if type(spec.bias) is not bool:
            fail("bias", "true or false", repr(spec.bias))
        if not isinstance(spec.dtype, str) or spec.dtype not in DTYPES:
            fail("dtype", f"one of {tuple(DTYPES)}", repr(spec.dtype))
        if spec.padding_idx is not None and type(spec.padding_idx) is not int:
            fail("padding_idx", "null or an integer", repr(spec.padding_idx))
        spec._check_fields()
        return spec

    @abstractmethod
    def _check_fields(self) -> None:
        """Raises ValueError naming a field of the class's own that cannot be."""

    def to_json(self) -> dict:
        return asdict(self)

    def check_layer(self, layer: nn.Module | None) -> None:
        """Raises ValueError where `layer`, of the model, is not the plain layer that this one came from."""
        if type(layer) not in self.PLAIN[self.type]:
            received = "no layer of that name" if layer is None else type(layer).__name__
            fail("model", f"an unquantized {self.PLAIN[self.type][0].__name__}", received)
        if list(layer.weight.shape) != self.shape:
            fail("weight", f"the shape in the file, {self.shape}", list(layer.weight.shape))
        if layer.weight.dtype != DTYPES[self.dtype]:
            fail("weight", f"the dtype in the file, {self.dtype}", layer.weight.dtype)
        if isinstance(layer, nn.Embedding):
            self._check_embedding(layer)
            if layer.padding_idx != self.padding_idx:
                fail("padding_idx", f"that in the file, {self.padding_idx}", layer.padding_idx)
        elif (layer.bias is not None) != self.bias:
            fail("bias", f"that in the file, {self.bias}", layer.bias is not None)

    @abstractmethod
    def _check_embedding(self, embedding: nn.Embedding) -> None:
        """Raises ValueError for an option that the compressed embedding does not have."""

    @abstractmethod
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape in the file of each tensor that stands for the weight, by its name in the layer."""

    def needs(self, part: str) -> tuple[str, ...]:
        """The parts in the file that `decode` needs for one in memory."""
        return (part,)

    def form(self, part: str) -> tuple:
        """What `decode` reads beside the tensors; layers share a part where they agree on this, too."""
        return ()

    def encode(self, part: str, layer: CompressedLayer) -> torch.Tensor:
        """A part as it is in the file."""
        return layer.get_buffer(part)

    def decode(self, part: str, tensors: Tensors) -> torch.Tensor:
        """A part as it is in memory, from those that it needs."""
        return tensors[part]

    @abstractmethod
    def check_values(self, tensors: Tensors) -> None:
        """Raises ValueError where the parts, as in memory, hold values that no layer has."""

    @abstractmethod
    def build(self, tensors: Tensors, layer: nn.Module) -> CompressedLayer:
        """The compressed layer over the parts, as in memory, for the plain `layer`, whose bias it shares."""
