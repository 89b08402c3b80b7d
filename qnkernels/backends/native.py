"""Loading of the compiled libraries and the types of their C functions (csrc/qnkernels.h)."""

import ctypes
import json
from pathlib import Path

import torch  # first, so that its OpenMP runtime is the one the kernels find

from . import BackendUnavailable

FOLDER = Path(__file__).resolve().parent.parent / "lib"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NOISE_KINDS = {"zero": 0, "mean": 1}

POINTER, SIZE, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_FAKE_QUANTIZE = [
    POINTER,
    INT,
    POINTER,
    INT,
    SIZE,
    POINTER,
    POINTER,
    SIZE,
    SIZE,
    POINTER,
    ctypes.c_int32,
    POINTER,
    POINTER,
]

CPU_ARGTYPES = {
    "minmax": [POINTER, INT, SIZE, SIZE, SIZE, POINTER, POINTER],
    "histogram_range": [POINTER, INT, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER],
    "quantization_parameters": [POINTER, POINTER, SIZE, POINTER, INT, POINTER, POINTER],
    "fake_quantize": _FAKE_QUANTIZE,
    "fake_quantize_backward": [
        *(POINTER, INT, POINTER, POINTER, INT, SIZE, POINTER, POINTER, SIZE, SIZE, POINTER),
        *(ctypes.c_int32, POINTER, POINTER),
    ],
    "dynamic_fake_quantize": [*(POINTER, INT, POINTER, INT, SIZE, SIZE, POINTER, INT, POINTER)],
    "moving_fake_quantize": [
        *(POINTER, INT, POINTER, INT, SIZE, SIZE, SIZE, POINTER, FLOAT),
        *[POINTER] * 5,
    ],
    "low_precision_operands": [
        *(POINTER, INT, SIZE, POINTER, INT, SIZE, SIZE, POINTER, FLOAT, INT),
        *[POINTER] * 6,
    ],
    "stop_gradient": [POINTER, INT, SIZE, POINTER],
    "block_noise": [POINTER, INT, POINTER, INT, SIZE, SIZE, INT, FLOAT, ctypes.c_int32, POINTER],
    "block_noise_centroid": [
        *(POINTER, INT, POINTER, INT, SIZE, SIZE),
        *(POINTER, SIZE, ctypes.c_int32, POINTER),
    ],
    "int_linear": [*(POINTER, INT, POINTER, POINTER, POINTER, POINTER, POINTER), SIZE, SIZE, SIZE, SIZE, INT],
    "int_linear_quantized": [POINTER, INT, *[POINTER] * 7, SIZE, SIZE, SIZE, SIZE, INT],
    "int_linear_backward": [*(POINTER, INT, POINTER, POINTER, POINTER, POINTER), SIZE, SIZE, SIZE, SIZE, INT],
    "int_embedding": [POINTER, SIZE, POINTER, POINTER, POINTER, POINTER, INT, SIZE, SIZE, SIZE, INT],
    "int_decode": [*(POINTER, POINTER, POINTER, POINTER, INT), SIZE, SIZE, SIZE, INT, SIZE, SIZE],
    "kmeans_assign": [POINTER, SIZE, SIZE, POINTER, SIZE, POINTER, POINTER],
    "kmeans_update": [POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, INT, INT, POINTER, POINTER],
    "kmeans_step": [POINTER, POINTER, SIZE, SIZE, POINTER, SIZE, INT, INT, INT, *[POINTER] * 4],
    "kmeans_bounded_step": [
        *(POINTER, POINTER, SIZE, SIZE, POINTER, SIZE, POINTER, SIZE, POINTER, FLOAT),
        *(INT, INT, INT, *[POINTER] * 6),
    ],
    "pq_linear": [POINTER, INT, POINTER, INT, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, SIZE],
    "pq_linear_backward": [
        *(POINTER, POINTER, INT, POINTER, INT, POINTER, INT),
        *(POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, SIZE),
    ],
    "pq_embedding": [
        *(POINTER, SIZE, POINTER, INT, SIZE, SIZE),
        *(POINTER, POINTER, INT, SIZE, SIZE, SIZE),
    ],
}
CUDA_ARGTYPES = {
    "fake_quantize": [*_FAKE_QUANTIZE, POINTER],
    "int_linear": [
        *(POINTER, INT, POINTER, POINTER, POINTER, POINTER, INT, POINTER, POINTER),
        *(SIZE, SIZE, SIZE, SIZE, INT, POINTER),
    ],
    "pq_linear": [
        *(POINTER, INT, POINTER, INT, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, SIZE),
        *(POINTER, POINTER),
    ],
    "pq_linear_backward": [
        *(POINTER, POINTER, INT, POINTER, INT, POINTER, POINTER, POINTER, POINTER, POINTER),
        *(SIZE, SIZE, SIZE, SIZE, SIZE, POINTER),
    ],
    "pq_decode": [
        *(POINTER, INT, POINTER, INT, POINTER),
        *(SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, POINTER),
    ],
    "kmeans_assign": [POINTER, SIZE, SIZE, POINTER, SIZE, POINTER, POINTER, POINTER, POINTER],
    "kmeans_update": [*CPU_ARGTYPES["kmeans_update"], POINTER],
    "kmeans_step": [POINTER, POINTER, SIZE, SIZE, POINTER, SIZE, INT, INT, INT, *[POINTER] * 6],
}
# Steps of ops, which are no ops themselves.
CUDA_STEPS = {
    "int_decode": [*(POINTER, POINTER, POINTER, POINTER, INT), *(SIZE, SIZE, SIZE, INT, POINTER)],
}
# Functions that launch nothing and return a number, not a status.
CUDA_QUERIES = {
    "int_linear_parts": [INT, SIZE, SIZE, SIZE, SIZE, INT],
    "pq_linear_parts": [INT, INT, SIZE, SIZE, SIZE, SIZE, SIZE],
    "kmeans_work_bytes": [SIZE, SIZE],
    "use_wgmma": [INT],
}

STATUS = {
    1: "bits: expected 2 to 16 (4 or 8 where packed)",
    2: "dtype: expected float32, bfloat16 or float16",
    3: "indices, codes: expected values inside the table",
    4: "out of memory for a work buffer",
}


def build_info() -> dict:
    """What the build wrote about itself (compiler, instruction sets, CUDA), or {} without a build."""
    path = FOLDER / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def library_path(name: str) -> Path:
    return FOLDER / f"libqnkernels_{name}.so"


def open_library(name: str) -> ctypes.CDLL:
    """libqnkernels_<name>.so; raises BackendUnavailable with what to do."""
    path = library_path(name)
    if not path.exists():
        hint = "pip install ." if name == "cpu" else "QNKERNELS_CUDA=on pip install . (needs nvcc)"
        raise BackendUnavailable(f"the {name} library was not built; run `{hint}` in the source tree")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(
            f"{path.name} does not load ({error}); rebuild it with `pip install .`"
        ) from error


def declare(library: ctypes.CDLL, prefix: str, argtypes: dict[str, list]) -> dict:
    """Set the argument types once; returns the functions by op name."""
    functions = {}
    for name, types in argtypes.items():
        try:
            function = getattr(library, f"qnk_{prefix}_{name}")
        except AttributeError as error:
            raise BackendUnavailable(
                f"the {prefix} library is older than this package ({error}); rebuild it with `pip install .`"
            ) from error
        function.argtypes, function.restype = types, INT
        functions[name] = function
    return functions


def raise_for_status(status: int) -> None:
    if status == 3:
        raise IndexError(STATUS[3])
    if status == 4:
        raise MemoryError(STATUS[4])
    if status:
        raise ValueError(STATUS.get(status, f"native kernel failed with status {status}"))


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """tensor, contiguous, where vector accesses of 16 bytes may start."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def fp32_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """tensor in fp32, contiguous; a cast that changes nothing is not free."""
    return (tensor if tensor.dtype is torch.float32 else tensor.float()).contiguous()


def layout(x: torch.Tensor, axis: int | None, group_size: int | None) -> tuple[int, int, int]:
    """(outer, channels, inner): element i has parameter (i / inner) % channels."""
    n = x.numel()
    if group_size is not None:
        return 1, n // group_size, group_size
    if axis is not None:
        inner = x.stride(axis)
        return n // max(inner * x.shape[axis], 1), x.shape[axis], inner
    return 1, 1, n
