"""How a kernel is started: on the device of its tensors, on torch's current stream."""

import contextlib

import torch
import triton

# Triton decides when a kernel is decorated, that is, when its module is imported.
INTERPRETED = triton.knobs.runtime.interpret


def run(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch `kernel` over `grid`; the first argument is a tensor, on the device of all others.

    fp contraction is off: a * b + c rounds twice, as in the reference. A grid without programs is no launch.
    """
    if 0 in grid:
        return
    with _guard(arguments[0]):
        kernel[grid](*arguments, enable_fp_fusion=False, **constants)


def _guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if INTERPRETED:
        return contextlib.nullcontext()
    raise ValueError(
        f"x: expected a tensor on a CUDA device for the triton backend, got one on {tensor.device}"
    )


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few under the interpreter, so that work is split there too."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
