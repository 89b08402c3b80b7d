"""Layers over weights in codes of 2 to 8 bits."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..bitstream import pack_bits, unpack_bits
from ..nn.input_range import check_input_quantizer
from ..nn.int_conv2d import IntConv2d
from ..nn.int_embedding import IntEmbedding, check_embedding
from ..nn.int_linear import linear_class
from ..nn.noisy import NoisyConv2d, NoisyEmbedding, NoisyLinear
from ..nn.packed import (
    MAX_CODE_BITS,
    MIN_CODE_BITS,
    PackedLayer,
    PackedWeight,
    code_offset,
    container_bits,
)
from ..nn.packed_product import ACTIVATIONS
from ..ops.checks import fail
from ..ops.int_linear import BITS
from ..reference.int_linear import pack, unpack
from .base import DTYPES, LayerSpec, Tensors, dtype_name, is_integer


@dataclass(frozen=True)
class PackedSpec(LayerSpec):
    """IntLinear, IntEmbedding or IntConv2d.

    bits: of a code in the file. 8-bit and 4-bit codes are stored as the kernels read them, row by row; codes
    of other widths, which take more bits in memory, as one stream, low bits first. activations: of
    PackedProduct; files without it have "float".
    """

    bits: int
    group_size: int | None
    symmetric: bool
    activations: str = "float"

    PLAIN: ClassVar = {
        "IntLinear": (nn.Linear, NoisyLinear),
        "IntEmbedding": (nn.Embedding, NoisyEmbedding),
        "IntConv2d": (nn.Conv2d, NoisyConv2d),
    }

    @classmethod
    def of(cls, layer: PackedLayer) -> "PackedSpec":
        embedding, conv = isinstance(layer, IntEmbedding), isinstance(layer, IntConv2d)
        shape = layer.filter_shape if conv else (layer.weight_packed.shape[0], layer.packed.columns)
        return cls(
            type="IntEmbedding" if embedding else "IntConv2d" if conv else "IntLinear",
            bits=layer.code_bits,
            shape=list(shape),
            group_size=layer.group_size,
            symmetric=layer.symmetric,
            dtype=dtype_name(layer.weight_dtype),
            bias=not embedding and layer.bias is not None,
            padding_idx=layer.padding_idx if embedding else None,
            activations="float" if embedding else layer.activations,
        )

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def is_stream(self) -> bool:
        return self.bits not in BITS

    def _check_fields(self) -> None:
        if not is_integer(self.bits, MIN_CODE_BITS, MAX_CODE_BITS):
            fail("bits", f"an integer in [{MIN_CODE_BITS}, {MAX_CODE_BITS}]", repr(self.bits))
        columns, size = self.columns, self.group_size
        if columns * container_bits(self.bits) % 8:
            fail("shape", f"an even number of columns for {self.bits}-bit codes", self.shape)
        if size is not None and (type(size) is not int or size < 1 or columns % size):
            fail("group_size", f"null or a divisor of {columns}", repr(size))
        if type(self.symmetric) is not bool:
            fail("symmetric", "true or false", repr(self.symmetric))
        known = ("float",) if self.type == "IntEmbedding" else ACTIVATIONS
        if self.activations not in known:
            fail("activations", f"one of {known}", repr(self.activations))

    def _check_embedding(self, embedding: nn.Embedding) -> None:
        check_embedding(embedding)

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, columns = self.shape[0], self.columns
        groups = 1 if self.group_size is None else columns // self.group_size
        parts = {
            "weight_packed": (torch.uint8, (rows, columns * self.bits // 8)),
            "scale": (torch.float32, (rows, groups)),
        }
        if self.is_stream:
            parts["weight_packed"] = (torch.uint8, (-(-rows * columns * self.bits // 8),))
        if not self.symmetric:
            parts["zero_point"] = (torch.uint8, (rows, groups))
        if self.activations == "static":
            parts |= {"x_scale": (torch.float32, ()), "x_zero_point": (torch.float32, ())}
        return parts

    def form(self, part: str) -> tuple:
        if part != "weight_packed" or not self.is_stream:
            return ()
        return (self.shape[0], self.columns, self.bits, self.symmetric)

    def encode(self, part: str, layer: PackedLayer) -> torch.Tensor:
        if part != "weight_packed" or not self.is_stream:
            return layer.get_buffer(part)
        layer.packed.check_codes()
        codes = unpack(layer.weight_packed.cpu(), layer.bits) - code_offset(self.bits, self.symmetric)
        return pack_bits(codes.view(-1), self.bits)

    def decode(self, part: str, tensors: Tensors) -> torch.Tensor:
        if part != "weight_packed" or not self.is_stream:
            return tensors[part]
        rows, columns = self.shape[0], self.columns
        codes = unpack_bits(tensors[part], rows * columns, self.bits, torch.uint8).view(rows, columns)
        return pack(codes + code_offset(self.bits, self.symmetric), container_bits(self.bits))

    def check_values(self, tensors: Tensors) -> None:
        scale, zero_point = tensors["scale"], tensors.get("zero_point")
        if not bool((scale.isfinite() & (scale > 0)).all()):
            fail("scale", "finite positive values", scale[~(scale.isfinite() & (scale > 0))][0].item())
        if zero_point is not None and int(zero_point.max()) >= 2**self.bits:
            fail("zero_point", f"values below {2**self.bits}", int(zero_point.max()))
        if self.activations == "static":
            check_input_quantizer(tensors["x_scale"], tensors["x_zero_point"])

    def build(self, tensors: Tensors, layer: nn.Module) -> PackedLayer:
        parts = (tensors["weight_packed"], tensors["scale"], tensors.get("zero_point"))
        packed = PackedWeight(*parts, self.bits, DTYPES[self.dtype])
        if self.type == "IntEmbedding":
            return IntEmbedding(packed, self.padding_idx)
        activations = (self.activations, tensors.get("x_scale"), tensors.get("x_zero_point"))
        if self.type == "IntConv2d":
            return IntConv2d(packed, layer, *activations)
        return linear_class(self.bits)(packed, layer.bias, *activations)
