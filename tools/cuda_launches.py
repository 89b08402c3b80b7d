"""How the kernels of csrc/cuda are launched, without a GPU: threads and dynamic shared memory of a block.

The library is linked with cuda_runtime.cpp in place of the CUDA runtime, which notes launches and runs
nothing; the bindings are those of the package, called with CPU tensors that nobody reads.
"""

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import kernel_calls
import torch
from kernel_calls import BITS, FLOATS, SEED, misaligned

from qnkernels.backends.cuda import CudaKernels
from qnkernels.backends.native import CUDA_ARGTYPES, CUDA_QUERIES, CUDA_STEPS, declare

# architecture -> (compute capability, multiprocessors, shared memory that a block may ask for): A100, H100,
# and A6000, which runs code of sm_80 and has less of both
DEVICES = {
    "sm_80": ((8, 0), 108, 163 << 10),
    "sm_90a": ((9, 0), 132, 227 << 10),
    "sm_86": ((8, 6), 84, 99 << 10),
}
CODE = ("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a")
Launches = dict[str, set[tuple[int, int]]]  # mangled name -> (threads, bytes of dynamic shared memory)


def build(folder: Path, sources: list[Path], nvcc: str, flags: tuple[str, ...]) -> Path:
    """The library with noted launches."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        options = ("-c", "-Xcompiler=-fPIC", *CODE, "-o", str(target), str(source))
        subprocess.run([nvcc, *flags, *options], check=True)
        return target

    # the longest first
    ordered = sorted(sources, key=lambda path: (path.name != "int_linear.cu", path.name))
    runtime = Path(__file__).with_name("cuda_runtime.cpp")
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, (*ordered, runtime)))
    library = folder / "libnoted.so"
    command = ["g++", "-shared", "-Wl,-Bsymbolic,-z,defs", "-o", str(library), *map(str, objects)]
    subprocess.run(command, check=True)
    return library


class NotedKernels(CudaKernels):
    """The bindings of the CUDA library on CPU tensors; products are left to its kernels, however large."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.qnk_cuda_last_error.restype = ctypes.c_char_p
        functions = CUDA_ARGTYPES | CUDA_STEPS | CUDA_QUERIES
        super().__init__(declare(library, "cuda", functions), library.qnk_cuda_last_error)

    def _launch(self, name: str, device: torch.device, *arguments) -> None:
        self._call(name, *arguments, None)

    def _query(self, name: str, device: torch.device, *arguments) -> int:
        return self._c[name](*arguments)

    def is_dense(self, op: str, x: torch.Tensor) -> bool:
        return False


def cuda_calls() -> Iterator[tuple[str, tuple]]:
    """Calls that reach every instantiation of every kernel, with as much to do as fills a GPU."""
    yield from (call for call in kernel_calls.all_calls() if not call[0].startswith("kmeans"))
    yield from _product_layers()
    yield from _int_layers()
    for d, k in product((4, 8, 16, 32, 64), (16, 256, 4096)):
        points, centroids = torch.empty(1 << 20, d), torch.empty(k, d)
        yield "kmeans_assign", (points, centroids)
        yield "kmeans_step", (points, centroids, 40, 30, 35, None)
        yield "kmeans_update", (points, torch.empty(1 << 20, dtype=torch.int32), k, 40, 30, None)
    for dtype, other, columns in product(FLOATS, FLOATS, (64, 65)):
        scale = torch.empty(64)
        for x in (torch.empty(64, columns, dtype=dtype), misaligned((64, columns), dtype)):
            yield "fake_quantize", (x, scale, scale, BITS, 0.5, SEED, 0, None, other)


def _product_layers() -> Iterator[tuple[str, tuple]]:
    """Outputs enough for every multiprocessor, and odd; codebooks in shared memory and too large for it."""
    codebooks = ((torch.uint8, 256), (torch.uint16, 512), (torch.uint16, 1 << 16))
    for dtype, d, (kind, k), n in product(FLOATS, (4, 8, 16), codebooks, (8192, 64, 63)):
        codes, codebook = torch.empty(n, 64, dtype=kind), torch.empty(k, d, dtype=dtype)
        for m in (1, 2, 4, 8, 16, 64, 128):
            x, grad = torch.empty(m, 64 * d, dtype=dtype), torch.empty(m, n, dtype=dtype)
            yield "pq_linear", (x, codes, codebook, None)
            if m in (1, 128):
                yield "pq_linear_backward", (grad, x, codes, codebook, True, True, True)
        yield "pq_decode", (codes, codebook)


def _int_layers() -> Iterator[tuple[str, tuple]]:
    """One group and two; outputs of few blocks and of many; rows of whole pieces, and not."""
    for dtype, bits, groups, n, k in product(FLOATS, (4, 8), (1, 2), (64, 1 << 14), (1024, 36)):
        weight, scale = torch.empty(n, k * bits // 8, dtype=torch.uint8), torch.empty(n, groups)
        for m in (1, 2, 4, 8, 16, 64, 128):
            yield "int_linear", (torch.empty(m, k, dtype=dtype), weight, scale, None, None, bits)
        yield "int_decode", (weight, scale, None, bits, dtype)


@contextlib.contextmanager
def device(path: Path, arch: str) -> Iterator[ctypes.CDLL]:
    """The library, as on a GPU of an architecture, with no launches noted."""
    library = ctypes.CDLL(str(path))
    library.launches_noted.restype = ctypes.c_char_p
    (major, minor), processors, shared = DEVICES[arch]
    library.launches_device(major, minor, processors, shared)
    yield library
    library.launches_device(0, 0, 0, 0)


def noted(library: ctypes.CDLL) -> Launches:
    launches: Launches = {}
    for line in library.launches_noted().decode().splitlines():
        name, threads, dynamic = line.split()
        launches.setdefault(name, set()).add((int(threads), int(dynamic)))
    return launches


def launches_of(path: Path) -> dict[str, Launches]:
    """By architecture, the launches that the calls come to, with and without wgmma."""
    found = {}
    for arch in DEVICES:
        with device(path, arch) as library:
            kernels = NotedKernels(library)
            for use in (0, 1, 2):
                library.qnk_cuda_use_wgmma(use)
                for op, arguments in cuda_calls():
                    if hasattr(kernels, op):
                        getattr(kernels, op)(*arguments)
            found[arch] = noted(library)
    return found
