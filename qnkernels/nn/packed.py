"""Weights in codes of 2 to 8 bits, and what the layers that hold one share."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from .. import functional
from ..ops.checks import fail
from ..ops.int_linear import BITS
from ..reference.int_linear import dequantize_weight, pack, quantize_weight, unpack
from .compressed import CompressedLayer
from .noise import check_integer

OBSERVERS = ("minmax", "histogram")
GRANULARITIES = ("channel", "tensor")
MIN_CODE_BITS, MAX_CODE_BITS = 2, 8


@dataclass(frozen=True)
class PackedWeight:
    """A weight [rows, columns] in codes of `code_bits` bits, 2 to 8: w = (q - z) * s.

    codes: uint8 [rows, columns * bits / 8], low bits first, where `bits`, 4 or 8, is what the kernels read:
    the narrowest that holds a code. scale: fp32 [rows, groups]. zero_point: uint8 [rows, groups], or None for
    z = 2^(bits - 1). dtype: that of the weight, and of what it decodes to.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    code_bits: int
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        return container_bits(self.code_bits)

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * 8 // self.bits

    def check_codes(self) -> None:
        """Raises ValueError for codes of more than `code_bits` bits, which no file could hold."""
        if self.codes.dtype != torch.uint8:
            fail("weight_packed", "torch.uint8", self.codes.dtype)
        if self.code_bits == self.bits or self.codes.numel() == 0 or self.codes.device.type == "meta":
            return
        codes = unpack(self.codes, self.bits)
        low = code_offset(self.code_bits, self.zero_point is None)
        high = low + 2**self.code_bits - 1
        for extreme in (int(codes.max()), int(codes.min())):
            if not low <= extreme <= high:
                fail("weight_packed", f"codes of {self.code_bits} bits, in [{low}, {high}]", extreme)


def container_bits(code_bits: int) -> int:
    """Bits that a code takes in memory."""
    return min(bits for bits in BITS if bits >= code_bits)


def code_offset(code_bits: int, symmetric: bool) -> int:
    """What a code in memory has been raised by.

    Without a zero point the kernels subtract half the range of `container_bits`, and codes of fewer bits lie
    in the middle of it.
    """
    return 2 ** (container_bits(code_bits) - 1) - 2 ** (code_bits - 1) if symmetric else 0


def check_packing_options(bits: int, group_size: int | None, observer: str, per: str) -> None:
    """What `pack_weight` accepts, apart from the weight; raises ValueError naming the argument."""
    check_integer("bits", bits, MIN_CODE_BITS, MAX_CODE_BITS)
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        fail("group_size", "None or an integer of at least 1", repr(group_size))
    if observer not in OBSERVERS:
        fail("observer", f"one of {OBSERVERS}", repr(observer))
    if per not in GRANULARITIES:
        fail("per", f"one of {GRANULARITIES}", repr(per))
    if per == "tensor" and group_size is not None:
        fail("group_size", "None with per='tensor'", group_size)


def check_columns(shape: tuple[int, ...], bits: int, group_size: int | None) -> None:
    """Whether a weight [rows, columns] of that shape can be packed; raises ValueError naming the argument."""
    columns = shape[1]
    if columns * container_bits(bits) % 8:
        fail("weight", f"an even number of columns to pack {bits}-bit codes", f"shape {tuple(shape)}")
    if group_size is not None and columns % group_size:
        fail("group_size", f"a divisor of the {columns} columns of weight", group_size)


@torch.no_grad()
def pack_weight(
    weight: torch.Tensor,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = False,
    observer: str = "minmax",
    per: str = "channel",
) -> PackedWeight:
    """Quantize weight [rows, columns] exactly as scalar noise does in eval, and pack the codes.

    bits: of a code, 2 to 8. One scale per row, per `group_size` consecutive columns of a row, or
    (per="tensor") for all. symmetric: no zero point is stored. observer: "minmax" or "histogram" (least
    squared error). Raises ValueError naming the argument.
    """
    check_packing_options(bits, group_size, observer, per)
    rows, columns = weight.shape
    check_columns(weight.shape, bits, group_size)
    axis = 0 if per == "channel" and group_size is None else None
    if observer == "histogram":
        low, high = functional.histogram_range(weight, bits, axis, group_size)
    else:
        low, high = functional.minmax(weight, axis, group_size)
    scale, zero_point = functional.quantization_parameters(low, high, bits, symmetric)
    groups = 1 if group_size is None else columns // group_size
    scale = scale.reshape(-1, groups).expand(rows, groups).contiguous()
    zero_point = zero_point.reshape(-1, groups).expand(rows, groups).contiguous()
    codes = quantize_weight(weight, scale, zero_point, bits) + code_offset(bits, symmetric)
    codes = pack(codes, container_bits(bits))
    return PackedWeight(codes, scale, None if symmetric else zero_point.to(torch.uint8), bits, weight.dtype)


class PackedLayer(CompressedLayer):
    """A layer over a packed weight: buffers weight_packed, scale and zero_point (see PackedWeight).

    code_bits: 2 to 8, of a code in a file; bits: 4 or 8, of a code in memory. Casting the model changes the
    dtype that the weight decodes to, never the codes or the scales.
    """

    FIXED = ("weight_packed", "scale", "zero_point")

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.bits, self.code_bits, self.weight_dtype = packed.bits, packed.code_bits, packed.dtype
        self.register_buffer("weight_packed", packed.codes)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero_point", packed.zero_point)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight [rows, columns], a new tensor in each call."""
        return self._decoded()

    def _decoded(self) -> torch.Tensor:
        """[rows, columns]. A method, since torch.compile does not follow super() to a property."""
        decoded = dequantize_weight(self.weight_packed, self.scale, self.zero_point, self.bits)
        return decoded.to(self.weight_dtype)

    @property
    def packed(self) -> PackedWeight:
        """The buffers as one value (shared, not copied)."""
        parts = (self.weight_packed, self.scale, self.zero_point)
        return PackedWeight(*parts, self.code_bits, self.weight_dtype)

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale, or None where a whole row does."""
        groups = self.scale.shape[1]
        return None if groups == 1 else self.packed.columns // groups

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        probe = torch.empty(0, dtype=self.weight_dtype, device=self.weight_packed.device)
        self.weight_dtype = fn(probe).dtype
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        codes = state_dict.get(prefix + "weight_packed")
        if codes is not None:
            try:
                replace(self.packed, codes=codes).check_codes()
            except ValueError as error:
                errors.append(f"{prefix}{error}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _packing_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"bits={self.code_bits}{groups}{', symmetric=True' if self.symmetric else ''}"
