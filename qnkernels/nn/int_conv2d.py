"""nn.Conv2d over filters in codes of 2 to 8 bits."""

import torch
from torch import nn

from .. import functional
from .convolution import ConvGeometry
from .noisy import check_weight
from .packed import PackedWeight, pack_weight
from .packed_product import PackedProduct

# Patches are positions x columns to copy, filters out x columns to decode. On a CPU the product with codes
# was no slower up to out / 4 positions (64 to 512 channels, 1x1 and 3x3, fp32 and bf16), and mostly faster.
POSITIONS_PER_FILTER = 1 / 4
PATCH_ELEMENTS = 1 << 24  # of the patches that are in memory at once: 64 MiB in fp32


class IntConv2d(ConvGeometry, PackedProduct):
    """nn.Conv2d over filters [out, in / groups * kh * kw] in 2 to 8 bits; differentiable in x and bias.

    activations: as PackedProduct, a row being the patch that an output position sees (its part of the input
    channels, with groups). Quantized activations are multiplied patch by patch, with groups in one product
    for each. With activations="float" the filters are decoded in each forward, except for few positions.
    """

    def __init__(
        self,
        packed: PackedWeight,
        conv: nn.Conv2d,
        activations: str = "float",
        x_scale: torch.Tensor | float | None = None,
        x_zero_point: torch.Tensor | float | None = None,
    ) -> None:
        """conv: gives the geometry and the bias, which is shared."""
        super().__init__(packed, conv.bias, activations, x_scale, x_zero_point)
        self._take_geometry(conv)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = False,
        observer: str = "minmax",
        per: str = "channel",
        activations: str = "float",
        x_scale: torch.Tensor | float | None = None,
        x_zero_point: torch.Tensor | float | None = None,
    ) -> "IntConv2d":
        """A new layer from `conv`, sharing its bias; options as `pack_weight`, a filter being a row of
        in / groups * kh * kw weights, and PackedProduct. Raises ValueError naming the option.
        """
        check_weight(conv.weight)
        packed = pack_weight(conv.weight.detach().flatten(1), bits, group_size, symmetric, observer, per)
        return cls(packed, conv, activations, x_scale, x_zero_point).train(conv.training)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded filters [out, in / groups, kh, kw], a new tensor in each call."""
        return self._decoded().view(self.filter_shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in, h, w] or [in, h, w] -> the shape of nn.Conv2d."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        x = self._padded(x)
        if self.activations == "float" and not self._has_few_positions(x):
            return self._convolved(x, self._filters(x.dtype), self.bias)
        height, width = self._output_size(x)
        images = max(1, PATCH_ELEMENTS // max(1, height * width * self._columns()))
        if torch.compiler.is_compiling() or len(x) <= images:
            return self._image(self._products(x), x)
        return torch.cat([self._image(self._products(part), part) for part in x.split(images)])

    def _filters(self, dtype: torch.dtype) -> torch.Tensor:
        """The decoded filters: a table of which all rows are asked for, in one pass of its kernel."""
        rows = torch.arange(self.out_channels, device=self.weight_packed.device)
        table = (self.weight_packed, self.scale, self.zero_point, self.bits)
        return functional.int_embedding(rows, *table, dtype=dtype).view(self.filter_shape)

    def _columns(self) -> int:
        return self.in_channels * self.kernel_size[0] * self.kernel_size[1]

    def _has_few_positions(self, x: torch.Tensor) -> bool:
        """Whether to multiply by the codes rather than decode them; a compiled graph serves all sizes."""
        if self.groups > 1 or torch.compiler.is_compiling():
            return False
        height, width = self._output_size(x)
        return len(x) * height * width <= POSITIONS_PER_FILTER * self.out_channels

    def _products(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in, h, w], padded -> [batch, positions, out]."""
        patches = self._patches(x)
        if self.groups == 1:
            return self._product(patches)
        parts = (self.weight_packed, self.scale, self.zero_point, self.bias)
        chunks = [[None] * self.groups if part is None else part.chunk(self.groups) for part in parts]
        products = [
            functional.int_linear_quantized(*group, self.bits, None, self.x_scale, self.x_zero_point)
            for group in zip(patches.chunk(self.groups, -1), *chunks, strict=True)
        ]
        return torch.cat(products, -1)

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, {self._product_repr()}"
