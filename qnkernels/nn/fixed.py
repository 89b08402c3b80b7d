"""Buffers that keep their dtype, and stay shared, when a model is moved or cast."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn


class FixedBuffers(nn.Module):
    """A module whose buffers named in `FIXED` follow `.to(device)` but not `.half()` and its like.

    Ranges and scales are fp32 in every model. The buffers are moved as parameters are, in place, so
    that two layers which share one still share it afterwards.
    """

    FIXED: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        fixed = {name: self._buffers[name] for name in self.FIXED if self._buffers.get(name) is not None}
        try:
            self._buffers.update(dict.fromkeys(fixed))
            super()._apply(fn, recurse)
            fixed = {name: _move(buffer, fn) for name, buffer in fixed.items()}
        finally:
            self._buffers.update(fixed)
        return self


def _move(buffer: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    moved = fn(buffer)
    if moved.dtype != buffer.dtype:
        moved = buffer.to(moved.device)
    if moved is buffer or not torch._has_compatible_shallow_copy_type(buffer, moved):
        return moved
    buffer.data = moved
    return buffer
