"""minmax, histogram_range and update_range_: ranges taken and kept up to date on the device."""

import torch

from .histogram import search
from .minmax import refresh


def minmax(x, axis=None, group_size=None):
    """Signature of reference.range.minmax; x contiguous."""
    low, high = _empty_range(x, axis, group_size)
    refresh(x, low, high, axis, group_size)
    return low, high


def histogram_range(x, bits, axis=None, group_size=None):
    """Signature of reference.range.histogram_range; x contiguous."""
    low, high = minmax(x, axis, group_size)
    out_low, out_high = torch.empty_like(low), torch.empty_like(high)
    search(x, low, high, out_low, out_high, bits, axis, group_size)
    return out_low, out_high


def update_range_(x, low, high, step, bits, observer, every, momentum, axis=None, group_size=None):
    """Signature of reference.range.update_range_; x contiguous.

    Every kernel reads `step` and stops at once in a forward that is not due, so the host never waits; step
    grows after all of them have read it.
    """
    if not (low.is_contiguous() and high.is_contiguous()):
        packed = low.contiguous(), high.contiguous()
        update_range_(x, *packed, step, bits, observer, every, momentum, axis, group_size)
        low.copy_(packed[0])
        high.copy_(packed[1])
        return
    if observer == "histogram":
        whole_low, whole_high = _empty_range(x, axis, group_size)
        refresh(x, whole_low, whole_high, axis, group_size, step, every)
        search(x, whole_low, whole_high, low, high, bits, axis, group_size, step, every)
    else:
        refresh(x, low, high, axis, group_size, step, every, momentum, moving=observer == "ema_minmax")
    step.add_(1)


def _empty_range(x, axis, group_size) -> tuple[torch.Tensor, torch.Tensor]:
    """Two fp32 tensors of the shape of x's parameters."""
    if group_size is not None:
        shape = (*x.shape[:-1], x.shape[-1] // group_size)
    else:
        shape = () if axis is None else (x.shape[axis],)
    options = dict(dtype=torch.float32, device=x.device)
    return torch.empty(shape, **options), torch.empty(shape, **options)
