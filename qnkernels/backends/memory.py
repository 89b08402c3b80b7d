"""Memory for large results."""

import ctypes
import functools
import mmap

import torch

# From here on glibc maps memory anew for each allocation, and gives it back.
LARGE = 32 * 2**20  # bytes


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """torch.empty on the CPU; where memory is new each time, in pages of 2 MiB if the system has them.

    The first write to a page asks the system for it, which with pages of 4 KiB takes several times as long as
    all else that an elementwise kernel does.
    """
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.nbytes >= LARGE:
        _advise_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


@functools.cache
def _madvise():
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def _advise_large_pages(address: int, size: int) -> None:
    """Advice that a system may not know or follow."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise()(first, length, mmap.MADV_HUGEPAGE)
