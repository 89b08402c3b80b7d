"""What the convolutions over compressed filters share: geometry, padding, patches, and the way back."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.checks import fail
from .noisy import to_autocast


class ConvGeometry(nn.Module):
    """The geometry of an nn.Conv2d, for a layer whose filters are rows [out, in / groups * kh * kw].

    A patch is what one output position sees: a row of in * kh * kw values, input channel by input channel.
    """

    GEOMETRY = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
        *("padding_mode", "output_padding", "transposed"),
    )

    def _take_geometry(self, conv: nn.Conv2d) -> None:
        for name in self.GEOMETRY:
            setattr(self, name, getattr(conv, name))
        # [left, right, top, bottom]: the form of F.pad, in which "same" may differ on the two sides
        self.padded_sides = list(conv._reversed_padding_repeated_twice)

    @property
    def filter_shape(self) -> tuple[int, ...]:
        """(out, in / groups, kh, kw)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in, h, w], checked, in the dtype of autocast, with its sides padded."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            expected = f"[batch, {self.in_channels}, h, w] or [{self.in_channels}, h, w]"
            fail("x", expected, f"shape {tuple(x.shape)}")
        x = to_autocast(x)
        if any(self.padded_sides):
            x = F.pad(x, self.padded_sides, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        return x

    def _output_size(self, x: torch.Tensor) -> tuple[int, int]:
        """Height and width that come of x, padded."""
        sizes = zip(x.shape[2:], self.dilation, self.kernel_size, self.stride, strict=True)
        height, width = (
            (size - dilation * (kernel - 1) - 1) // stride + 1 for size, dilation, kernel, stride in sizes
        )
        return height, width

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in, h, w], padded -> [batch, positions, in * kh * kw]."""
        if self.kernel_size == (1, 1):
            patches = x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            patches = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)
        return patches.transpose(1, 2)

    def _image(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y [batch, positions, out] -> [batch, out, h, w], laid out as the padded input x that it came of."""
        image = y.transpose(1, 2).unflatten(2, self._output_size(x))
        return image.contiguous() if x.is_contiguous() else image

    def _convolved(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """F.conv2d of x, padded, with decoded filters."""
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, self.stride, 0, self.dilation, self.groups)
