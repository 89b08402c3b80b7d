"""How elements of a tensor share a scale: per tensor, per channel along an axis, or per group of a row."""

import torch


def expand_to_elements(
    value: torch.Tensor, shape: torch.Size, axis: int | None, group_size: int | None
) -> torch.Tensor:
    """Broadcast a parameter (0-d, [channels] or [.., groups]) to a tensor of `shape`."""
    if group_size is not None:
        return value.repeat_interleave(group_size, dim=-1).reshape(shape)
    if axis is not None:
        view = [1] * len(shape)
        view[axis] = -1
        return value.reshape(view)
    return value


def split_by_parameter(x: torch.Tensor, axis: int | None, group_size: int | None) -> torch.Tensor:
    """View or copy of x as [*parameter shape, elements that share it]."""
    if group_size is not None:
        return x.reshape(*x.shape[:-1], -1, group_size)
    if axis is not None:
        return x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return x.reshape(-1)
