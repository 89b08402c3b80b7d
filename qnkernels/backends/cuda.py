"""Bindings of the CUDA C++ kernels: launched on torch's current stream, nothing waits."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from ..reference.philox import threshold
from . import BackendUnavailable
from .cuda_dense import DenseKernels
from .cuda_kmeans import KMeansKernels
from .cuda_pq import PqKernels
from .native import (
    CUDA_ARGTYPES,
    CUDA_QUERIES,
    CUDA_STEPS,
    DTYPES,
    declare,
    layout,
    open_library,
    pointer,
    raise_for_status,
)

CUDA_ERROR = 5


def load() -> dict[str, Callable]:
    library = open_library("cuda")
    functions = declare(library, "cuda", CUDA_ARGTYPES | CUDA_STEPS | CUDA_QUERIES)
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "torch sees no CUDA device; install a CUDA build of torch on a machine with a GPU"
        )
    if (other := unserved_capability()) is not None:
        raise BackendUnavailable(
            f"the cuda library is for GPUs of compute capability 8.x and 9.0, and there is one of {other}; "
            "the triton backend serves it"
        )
    library.qnk_cuda_last_error.restype = ctypes.c_char_p
    kernels = CudaKernels(functions, library.qnk_cuda_last_error)
    return {name: getattr(kernels, name) for name in CUDA_ARGTYPES}


def unserved_capability() -> str | None:
    """That of a GPU here which the library is not for; None if it is for all of them.

    It holds machine code of sm_80, which all of 8.x run, and of sm_90a, which 9.0 alone runs.
    """
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major != 8 and (major, minor) != (9, 0):
            return f"{major}.{minor}"
    return None


@contextlib.contextmanager
def use_wgmma(where: Literal["never", "best", "possible"]) -> Iterator[None]:
    """Where GPUs of compute capability 9.0 use wgmma ("best" otherwise): for tests and benchmarks."""
    use = declare(open_library("cuda"), "cuda", {"use_wgmma": CUDA_QUERIES["use_wgmma"]})["use_wgmma"]
    before = use(("never", "best", "possible").index(where))
    try:
        yield
    finally:
        use(before)


class CudaKernels(PqKernels, DenseKernels, KMeansKernels):
    """One method per op, with the signature of the reference; tensors are contiguous and checked."""

    def __init__(self, functions: dict, last_error: Callable) -> None:
        self._c = functions
        self._last_error = last_error

    def _launch(self, name: str, device: torch.device, *arguments) -> None:
        with torch.cuda.device(device):
            self._call(name, *arguments, torch.cuda.current_stream().cuda_stream)

    def _call(self, name: str, *arguments) -> None:
        status = self._c[name](*arguments)
        if status == CUDA_ERROR:
            raise RuntimeError(f"{name}: {self._last_error().decode()}")
        raise_for_status(status)

    def _query(self, name: str, device: torch.device, *arguments) -> int:
        with torch.cuda.device(device):
            return self._c[name](*arguments)

    def fake_quantize(
        self, x, scale, zero_point, bits, p, seed, axis=None, group_size=None, dtype=None, outside=None
    ):
        y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
        _, channels, inner = layout(x, axis, group_size)
        self._launch(
            *("fake_quantize", x.device),
            *(x.data_ptr(), DTYPES[x.dtype], y.data_ptr(), DTYPES[y.dtype], x.numel()),
            *(scale.data_ptr(), zero_point.data_ptr(), channels, inner),
            *(bits.data_ptr(), threshold(p), seed.data_ptr(), pointer(outside)),
        )
        return y

    def int_linear(self, x, weight, scale, zero_point, bias, bits):
        (m, k), (n, groups) = x.shape, scale.shape
        y = x.new_empty(m, n)
        if self.is_dense("int_linear", x) and y.numel() and k:
            return self.int_linear_dense(x, weight, scale, zero_point, bias, bits, y)
        if bias is not None:
            bias = bias.contiguous()
        parts = self._query("int_linear_parts", x.device, DTYPES[x.dtype], m, n, k, groups, bits)
        workspace = x.new_empty(parts, m, n, dtype=torch.float32) if parts > 1 else None
        self._launch(
            *("int_linear", x.device, x.data_ptr(), DTYPES[x.dtype], weight.data_ptr(), scale.data_ptr()),
            *(pointer(zero_point), pointer(bias), 0 if bias is None else DTYPES[bias.dtype]),
            *(y.data_ptr(), pointer(workspace), m, n, k, groups, bits),
        )
        return y
