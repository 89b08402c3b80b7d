"""Weights packed into 8 or 4 bits, and what the layers that hold one share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .. import functional
from ..ops.checks import fail
from ..ops.int_linear import BITS
from ..reference.int_linear import dequantize_weight, pack, quantize_weight
from .compressed import CompressedLayer

OBSERVERS = ("minmax", "histogram")
GRANULARITIES = ("channel", "tensor")


@dataclass(frozen=True)
class PackedWeight:
    """A weight [rows, columns] in codes of `bits` bits: w = (q - z) * s, with z = 2^(bits - 1) where absent.

    codes: uint8 [rows, columns * bits / 8], low bits first. scale: fp32 [rows, groups].
    zero_point: uint8 [rows, groups] or None. dtype: that of the weight, and of what it decodes to.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * 8 // self.bits


def check_packing_options(bits: int, group_size: int | None, observer: str, per: str) -> None:
    """What `pack_weight` accepts, apart from the weight; raises ValueError naming the argument."""
    if bits not in BITS:
        fail("bits", f"one of {BITS}", repr(bits))
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        fail("group_size", "None or an integer of at least 1", repr(group_size))
    if observer not in OBSERVERS:
        fail("observer", f"one of {OBSERVERS}", repr(observer))
    if per not in GRANULARITIES:
        fail("per", f"one of {GRANULARITIES}", repr(per))
    if per == "tensor" and group_size is not None:
        fail("group_size", "None with per='tensor'", group_size)


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

    One scale per row, per `group_size` consecutive columns of a row, or (per="tensor") for all.
    symmetric: no zero point is stored. observer: "minmax" or "histogram" (least squared error).
    Raises ValueError naming the argument.
    """
    check_packing_options(bits, group_size, observer, per)
    rows, columns = weight.shape
    if columns * bits % 8:
        fail("weight", f"an even number of columns to pack {bits}-bit codes", f"shape {tuple(weight.shape)}")
    if group_size is not None and columns % group_size:
        fail("group_size", f"a divisor of the {columns} columns of weight", group_size)
    axis = 0 if per == "channel" and group_size is None else None
    if observer == "histogram":
        low, high = functional.histogram_range(weight, bits, axis, group_size)
    else:
        low, high = functional.minmax(weight, axis, group_size)
    scale, zero_point = functional.quantization_parameters(low, high, bits, symmetric)
    groups = 1 if group_size is None else columns // group_size
    scale = scale.reshape(-1, groups).expand(rows, groups).contiguous()
    zero_point = zero_point.reshape(-1, groups).expand(rows, groups).contiguous()
    codes = pack(quantize_weight(weight, scale, zero_point, bits), bits)
    return PackedWeight(codes, scale, None if symmetric else zero_point.to(torch.uint8), bits, weight.dtype)


class PackedLayer(CompressedLayer):
    """A layer over a packed weight: buffers weight_packed, scale and zero_point (see PackedWeight).

    Casting the model changes the dtype that the weight decodes to, never the codes or the scales.
    """

    FIXED = ("weight_packed", "scale", "zero_point")

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.bits, self.weight_dtype = packed.bits, packed.dtype
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
        return PackedWeight(self.weight_packed, self.scale, self.zero_point, self.bits, self.weight_dtype)

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

    def _packing_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"bits={self.bits}{groups}{', symmetric=True' if self.symmetric else ''}"
