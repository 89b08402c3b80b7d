"""C++ kernels that take tensors whole, with arguments that nobody has checked.

To check shapes and hand over pointers one by one takes Python longer than a small layer takes to compute.
These look at the tensors in C++, through the table of functions that newer versions of torch offer to other
libraries (DLPack's exchange interface), and return None for what is not in the plainest form.
"""

import ctypes
from collections.abc import Callable

import torch

from .native import NOT_SERVED, library_path, raise_for_status

TABLE = "__dlpack_c_exchange_api__"


def load() -> dict[str, Callable]:
    """By op name, with the op's signature; empty where torch or the library lacks what it takes."""
    capsule = getattr(torch.Tensor, TABLE, None)
    if capsule is None:
        return {}
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.argtypes, pointer_of.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    library = ctypes.PyDLL(str(library_path("cpu")))  # which keeps the interpreter's lock
    library.qnk_cpu_tensors.argtypes = (ctypes.c_void_p, ctypes.py_object)
    if not library.qnk_cpu_tensors(pointer_of(capsule, b"dlpack_exchange_api"), None):
        return {}
    tensors = (ctypes.py_object,) * 6
    library.qnk_cpu_int_linear_tensors.argtypes = (*tensors, ctypes.c_int)
    library.qnk_cpu_int_linear_quantized_tensors.argtypes = (*tensors, ctypes.c_int, *tensors[:2])
    return {
        "int_linear": _layer(library.qnk_cpu_int_linear_tensors),
        "int_linear_quantized": _layer(library.qnk_cpu_int_linear_quantized_tensors),
    }


def _layer(function: Callable) -> Callable:
    def call(x, weight, scale, zero_point, bias, bits, *rest):
        if weight.dim() != 2:
            return None
        if x.dim() == 2:
            y = x.new_empty(x.shape[0], weight.shape[0])
        else:
            y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        status = function(x, weight, scale, zero_point, bias, y, bits, *rest)
        if status == NOT_SERVED:
            return None
        if status:
            raise_for_status(status)
        return y

    return call
