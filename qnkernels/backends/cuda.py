"""Bindings of the CUDA C++ kernels: launched on torch's current stream, nothing waits."""

import ctypes
from collections.abc import Callable

import torch

from ..reference.philox import threshold
from . import BackendUnavailable
from .native import CUDA_ARGTYPES, DTYPES, declare, layout, open_library, raise_for_status

CUDA_ERROR = 5
PARTS = ("kmeans_work_bytes",)  # of other functions


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


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CudaKernels:
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

    def kmeans_assign(self, points, centroids):
        n, d = points.shape
        codes = torch.empty(n, dtype=torch.int32, device=points.device)
        distances = torch.empty(n, dtype=torch.float32, device=points.device)
        self._launch(
            *("kmeans_assign", points.device),
            *(points.data_ptr(), n, d, centroids.data_ptr(), len(centroids), self._work(centroids).data_ptr()),
            *(codes.data_ptr(), distances.data_ptr()),
        )
        return codes, distances

    def kmeans_update(self, points, codes, n_clusters, exponent, weight_exponent, weights):
        """Codes out of range are left out."""
        n, d = points.shape
        sums = torch.empty(n_clusters, d, dtype=torch.int64, device=points.device)
        mass = torch.empty(n_clusters, dtype=torch.int64, device=points.device)
        self._launch(
            *("kmeans_update", points.device),
            *(points.data_ptr(), codes.data_ptr(), _pointer(weights), n, d, n_clusters),
            *(exponent, weight_exponent, sums.data_ptr(), mass.data_ptr()),
        )
        return sums, mass

    def kmeans_step(self, points, centroids, exponent, weight_exponent, objective_exponent, weights):
        (n, d), k = points.shape, len(centroids)
        codes = torch.empty(n, dtype=torch.int32, device=points.device)
        sums = torch.empty(k, d, dtype=torch.int64, device=points.device)
        mass = torch.empty(k, dtype=torch.int64, device=points.device)
        objective = torch.empty((), dtype=torch.int64, device=points.device)
        self._launch(
            *("kmeans_step", points.device),
            *(points.data_ptr(), _pointer(weights), n, d, centroids.data_ptr(), k),
            *(exponent, weight_exponent, objective_exponent, self._work(centroids).data_ptr()),
            *(t.data_ptr() for t in (codes, sums, mass, objective)),
        )
        return codes, sums, mass, objective

    def _work(self, centroids):
        """Memory for the codebook as the kernels read it."""
        k, d = centroids.shape
        size = self._c["kmeans_work_bytes"](d, k)
        return torch.empty(size, dtype=torch.uint8, device=centroids.device)
