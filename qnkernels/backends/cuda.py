"""Bindings of the CUDA C++ kernels: launched on torch's current stream, nothing waits."""

import ctypes
from collections.abc import Callable

import torch

from ..reference.philox import threshold
from . import BackendUnavailable
from .cuda_kmeans import KMeansKernels
from .native import CUDA_ARGTYPES, DTYPES, declare, layout, open_library, raise_for_status

CUDA_ERROR = 5
PARTS = ("kmeans_work_bytes",)  # functions that are no ops


def load() -> dict[str, Callable]:
    library = open_library("cuda")
    functions = declare(library, "cuda", CUDA_ARGTYPES)
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "torch sees no CUDA device; install a CUDA build of torch on a machine with a GPU"
        )
    library.qnk_cuda_last_error.restype = ctypes.c_char_p
    kernels = CudaKernels(functions, library.qnk_cuda_last_error)
    return {name: getattr(kernels, name) for name in CUDA_ARGTYPES if name not in PARTS}


class CudaKernels(KMeansKernels):
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

    def fake_quantize(self, x, scale, zero_point, bits, p, seed, axis=None, group_size=None, dtype=None):
        y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
        _, channels, inner = layout(x, axis, group_size)
        self._launch(
            *("fake_quantize", x.device),
            *(x.data_ptr(), DTYPES[x.dtype], y.data_ptr(), DTYPES[y.dtype], x.numel()),
            *(scale.data_ptr(), zero_point.data_ptr(), channels, inner),
            *(bits.data_ptr(), threshold(p), seed.data_ptr()),
        )
        return y
