"""Linear layers over packed 8-bit and 4-bit weights."""

import torch
from torch import nn

from .. import functional
from .noisy import autocast_dtype, check_weight
from .packed import PackedLayer, PackedWeight, pack_weight


class IntLinear(PackedLayer):
    """y = x @ W^T + bias over W [out, in] in 8 or 4 bits; differentiable in x and bias.

    bias: a parameter as in nn.Linear, in its own dtype, or None.
    """

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(packed)
        self.in_features, self.out_features = packed.columns, packed.codes.shape[0]
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = False,
        observer: str = "minmax",
        per: str = "channel",
    ) -> "IntLinear":
        """A new layer from `linear`, sharing its bias; options as `pack_weight`. Int8Linear and Int4Linear
        are the same with their own bits. Raises ValueError naming the option.
        """
        check_weight(linear.weight)
        packed = pack_weight(linear.weight.detach(), bits, group_size, symmetric, observer, per)
        return LINEAR[bits](packed, linear.bias).train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of x (under autocast, in its dtype)."""
        x = x.to(autocast_dtype(x.device.type) or x.dtype)
        return functional.int_linear(x, self.weight_packed, self.scale, self.zero_point, self.bias, self.bits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._packing_repr()}"
        )


class Int8Linear(IntLinear):
    """IntLinear with 8-bit codes."""

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int | None = None,
        symmetric: bool = False,
        observer: str = "minmax",
        per: str = "channel",
    ) -> "IntLinear":
        """IntLinear.from_linear with bits=8."""
        return IntLinear.from_linear(linear, 8, group_size, symmetric, observer, per)


class Int4Linear(IntLinear):
    """IntLinear with 4-bit codes."""

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int | None = 128,
        symmetric: bool = False,
        observer: str = "minmax",
        per: str = "channel",
    ) -> "IntLinear":
        """IntLinear.from_linear with bits=4."""
        return IntLinear.from_linear(linear, 4, group_size, symmetric, observer, per)


LINEAR: dict[int, type[IntLinear]] = {8: Int8Linear, 4: Int4Linear}
