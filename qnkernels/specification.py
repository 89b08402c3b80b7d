"""How a checkpoint describes a packed layer, and what must hold before a model's layer becomes it."""

from dataclasses import asdict, dataclass, fields

import torch
from torch import nn

from .nn.int_embedding import IntEmbedding, check_embedding
from .nn.int_linear import LINEAR
from .nn.noisy import NoisyEmbedding, NoisyLinear
from .nn.packed import PackedLayer, PackedWeight
from .ops.checks import FLOATS, fail
from .ops.int_linear import BITS

PLAIN = {"IntLinear": (nn.Linear, NoisyLinear), "IntEmbedding": (nn.Embedding, NoisyEmbedding)}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


@dataclass(frozen=True)
class LayerSpec:
    """A packed layer without its tensors. shape: [rows, columns] of the weight; dtype: what it decodes to."""

    type: str
    bits: int
    shape: list[int]
    group_size: int | None
    symmetric: bool
    dtype: str
    bias: bool
    padding_idx: int | None

    @classmethod
    def of(cls, layer: PackedLayer) -> "LayerSpec":
        embedding = isinstance(layer, IntEmbedding)
        return cls(
            type="IntEmbedding" if embedding else "IntLinear",
            bits=layer.bits,
            shape=[layer.weight_packed.shape[0], layer.packed.columns],
            group_size=layer.group_size,
            symmetric=layer.symmetric,
            dtype=str(layer.weight_dtype).removeprefix("torch."),
            bias=not embedding and layer.bias is not None,
            padding_idx=layer.padding_idx if embedding else None,
        )

    @classmethod
    def parse(cls, value: object) -> "LayerSpec":
        """From what JSON gave, which may be anything; raises ValueError naming the field."""
        names = {field.name for field in fields(cls)}
        if not isinstance(value, dict) or value.keys() != names:
            fail("specification", f"an object with the fields {sorted(names)}", repr(value))
        spec = cls(**value)
        if not isinstance(spec.type, str) or spec.type not in PLAIN:
            fail("type", f"one of {tuple(PLAIN)}", repr(spec.type))
        if type(spec.bits) is not int or spec.bits not in BITS:
            fail("bits", f"one of {BITS}", repr(spec.bits))
        shape = spec.shape
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            fail("shape", "two positive integers", repr(shape))
        if shape[1] * spec.bits % 8:
            fail("shape", f"an even number of columns for {spec.bits}-bit codes", shape)
        size = spec.group_size
        if size is not None and (type(size) is not int or size < 1 or shape[1] % size):
            fail("group_size", f"null or a divisor of {shape[1]}", repr(size))
        for name in ("symmetric", "bias"):
            if type(getattr(spec, name)) is not bool:
                fail(name, "true or false", repr(getattr(spec, name)))
        if not isinstance(spec.dtype, str) or spec.dtype not in DTYPES:
            fail("dtype", f"one of {tuple(DTYPES)}", repr(spec.dtype))
        if spec.padding_idx is not None and type(spec.padding_idx) is not int:
            fail("padding_idx", "null or an integer", repr(spec.padding_idx))
        return spec

    def to_json(self) -> dict:
        return asdict(self)

    def check_layer(self, layer: nn.Module | None) -> None:
        """Raises ValueError where `layer`, of the model, is not the plain layer that this one came from."""
        if type(layer) not in PLAIN[self.type]:
            received = "no layer of that name" if layer is None else type(layer).__name__
            fail("model", f"an unquantized {PLAIN[self.type][0].__name__}", received)
        if list(layer.weight.shape) != self.shape:
            fail("weight", f"the shape in the file, {self.shape}", list(layer.weight.shape))
        if layer.weight.dtype != DTYPES[self.dtype]:
            fail("weight", f"the dtype in the file, {self.dtype}", layer.weight.dtype)
        if isinstance(layer, nn.Embedding):
            check_embedding(layer)
            if layer.padding_idx != self.padding_idx:
                fail("padding_idx", f"that in the file, {self.padding_idx}", layer.padding_idx)
        elif (layer.bias is not None) != self.bias:
            fail("bias", f"that in the file, {self.bias}", layer.bias is not None)

    def buffers(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each buffer that the layer keeps in a file, by name."""
        rows, columns = self.shape
        groups = 1 if self.group_size is None else columns // self.group_size
        buffers = {
            "weight_packed": (torch.uint8, (rows, columns * self.bits // 8)),
            "scale": (torch.float32, (rows, groups)),
        }
        if not self.symmetric:
            buffers["zero_point"] = (torch.uint8, (rows, groups))
        return buffers

    def check_values(self, buffers: dict[str, torch.Tensor]) -> None:
        """Raises ValueError where scales or zero points are such as no quantizer has."""
        scale, zero_point = buffers["scale"], buffers.get("zero_point")
        if not bool((scale.isfinite() & (scale > 0)).all()):
            fail("scale", "finite positive values", scale[~(scale.isfinite() & (scale > 0))][0].item())
        if zero_point is not None and int(zero_point.max()) >= 2**self.bits:
            fail("zero_point", f"values below {2**self.bits}", int(zero_point.max()))

    def build(self, buffers: dict[str, torch.Tensor], layer: nn.Module) -> PackedLayer:
        """The packed layer over `buffers`, with the bias of `layer`."""
        parts = (buffers["weight_packed"], buffers["scale"], buffers.get("zero_point"))
        packed = PackedWeight(*parts, self.bits, DTYPES[self.dtype])
        if self.type == "IntEmbedding":
            return IntEmbedding(packed, self.padding_idx)
        return LINEAR[self.bits](packed, layer.bias)
