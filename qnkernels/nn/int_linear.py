"""Linear layers over weights in codes of 2 to 8 bits."""

import torch
from torch import nn

from .noisy import check_weight, to_autocast
from .packed import PackedWeight, pack_weight
from .packed_product import PackedProduct


class IntLinear(PackedProduct):
    """y = x @ W^T + bias over W [out, in] in 2 to 8 bits; differentiable in x and bias.

    Arguments as PackedProduct, a row being the last dimension of x (a token).
    """

    def __init__(
        self,
        packed: PackedWeight,
        bias: nn.Parameter | None = None,
        activations: str = "float",
        x_scale: torch.Tensor | float | None = None,
        x_zero_point: torch.Tensor | float | None = None,
    ) -> None:
        super().__init__(packed, bias, activations, x_scale, x_zero_point)
        self.in_features, self.out_features = packed.columns, packed.codes.shape[0]

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = False,
        observer: str = "minmax",
        per: str = "channel",
        activations: str = "float",
        x_scale: torch.Tensor | float | None = None,
        x_zero_point: torch.Tensor | float | None = None,
    ) -> "IntLinear":
        """A new layer from `linear`, sharing its bias; options as `pack_weight` and PackedProduct.

        The layer is an Int8Linear or Int4Linear with those bits. Raises ValueError naming the option.
        """
        check_weight(linear.weight)
        packed = pack_weight(linear.weight.detach(), bits, group_size, symmetric, observer, per)
        layer = linear_class(bits)(packed, linear.bias, activations, x_scale, x_zero_point)
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of x (under autocast, in its dtype)."""
        return self._product(to_autocast(x))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._product_repr()}"
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
        activations: str = "float",
        x_scale: torch.Tensor | float | None = None,
        x_zero_point: torch.Tensor | float | None = None,
    ) -> "IntLinear":
        """IntLinear.from_linear with bits=8."""
        options = (group_size, symmetric, observer, per, activations, x_scale, x_zero_point)
        return IntLinear.from_linear(linear, 8, *options)


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
        activations: str = "float",
        x_scale: torch.Tensor | float | None = None,
        x_zero_point: torch.Tensor | float | None = None,
    ) -> "IntLinear":
        """IntLinear.from_linear with bits=4."""
        options = (group_size, symmetric, observer, per, activations, x_scale, x_zero_point)
        return IntLinear.from_linear(linear, 4, *options)


def linear_class(code_bits: int) -> type[IntLinear]:
    return {8: Int8Linear, 4: Int4Linear}.get(code_bits, IntLinear)
