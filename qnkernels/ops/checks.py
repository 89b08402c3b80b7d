"""Argument checks shared by the ops. Each error names the argument, what was expected, what came."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fail(argument: str, expected: str, received: object) -> None:
    raise ValueError(f"{argument}: expected {expected}, got {received}")


def check_float(argument: str, x: torch.Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{argument}: expected float32, bfloat16 or float16, got {x.dtype}")


def check_dtype(argument: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{argument}: expected {dtype}, got {x.dtype}")


def check_rate(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        fail("p", "a rate in [0, 1]", p)


def check_same_device(argument: str, tensor: torch.Tensor | None, device: torch.device) -> None:
    if tensor is not None and tensor.device != device:
        fail(argument, f"a tensor on {device}", f"one on {tensor.device}")


def check_counter(argument: str, tensor: torch.Tensor, device: torch.device) -> None:
    """A 0-d int64 tensor that the kernel reads on its own device (seed, bits, step)."""
    if tensor.dim() != 0 or tensor.dtype != torch.int64:
        fail(argument, "a 0-d int64 tensor", f"{tensor.dtype} of shape {tuple(tensor.shape)}")
    check_same_device(argument, tensor, device)


def parameter_shape(shape: torch.Size, axis: int | None, group_size: int | None) -> tuple[int, ...]:
    """Shape of the scale of a tensor of `shape`: (), (channels,) or (.., groups)."""
    if axis is not None and group_size is not None:
        fail("axis", "None when group_size is given", axis)
    if axis is not None:
        if not -len(shape) <= axis < len(shape):
            fail("axis", f"an axis of a tensor of shape {tuple(shape)}", axis)
        return (shape[axis],)
    if group_size is not None:
        if group_size < 1 or not shape or shape[-1] % group_size:
            fail("group_size", f"a divisor of the last dimension of {tuple(shape)}", group_size)
        return (*shape[:-1], shape[-1] // group_size)
    return ()


def check_parameter(
    argument: str, value: torch.Tensor, x: torch.Tensor, axis: int | None, group_size: int | None
):
    """A scale, zero point or bound of x: fp32, on its device, of the right shape."""
    check_dtype(argument, value, torch.float32)
    check_same_device(argument, value, x.device)
    expected = parameter_shape(x.shape, axis, group_size)
    if tuple(value.shape) != expected:
        fail(argument, f"shape {expected} for x of shape {tuple(x.shape)}", tuple(value.shape))


def device_type(tensor: torch.Tensor) -> str:
    """tensor.device.type, whose string torch makes anew in each call."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., n] as contiguous rows [-1, n]."""
    return x.contiguous() if x.dim() == 2 else x.reshape(-1, x.shape[-1]).contiguous()


def like_rows(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A kernel's new y [rows of x, n] in the shape of x but for the last dimension.

    Not by a view: of one that an op returns, autograd allows no in-place use (an activation's, for one).
    """
    return y if x.dim() == 2 else y.resize_(*x.shape[:-1], y.shape[-1])


def own(y: torch.Tensor) -> torch.Tensor:
    """y as a tensor of its own over the same memory, for an autograd function to return.

    F.linear gives a view where x has other than two dimensions, and of a view that an autograd function
    returns autograd allows no in-place use. Compilers keep no such account.
    """
    return y if torch.compiler.is_compiling() else y.data


def check_not_empty(argument: str, x: torch.Tensor) -> None:
    if x.numel() == 0:
        fail(argument, "at least one element", f"shape {tuple(x.shape)}")
