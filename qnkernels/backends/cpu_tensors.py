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
CODE_BITS = (4, 8)


def load() -> dict[str, Callable]:
    """By op name, with the op's signature; empty where torch or the library lacks what it takes."""
    table = _table()
    library = ctypes.PyDLL(str(library_path("cpu")))  # which keeps the interpreter's lock
    if table is None or not hasattr(library, "qnk_cpu_tensors"):
        return {}
    library.qnk_cpu_tensors.argtypes = (ctypes.c_void_p, ctypes.py_object)
    if not library.qnk_cpu_tensors(table, None):
        return {}
    tensors = (ctypes.py_object,) * 6
    library.qnk_cpu_int_linear_tensors.argtypes = (*tensors, ctypes.c_int)
    library.qnk_cpu_int_linear_quantized_tensors.argtypes = (*tensors, ctypes.c_int, *tensors[:2])
    return {
        "int_linear": _layer(library.qnk_cpu_int_linear_tensors),
        "int_linear_quantized": _layer(library.qnk_cpu_int_linear_quantized_tensors),
    }


def _table() -> int | None:
    """The address of the table; None where torch has none."""
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    try:
        return pointer_of(("PyCapsule_GetPointer", ctypes.pythonapi))(
            getattr(torch.Tensor, TABLE), b"dlpack_exchange_api"
        )
    except (AttributeError, ValueError):
        return None


def _layer(function: Callable) -> Callable:
    def call(x, weight, scale, zero_point, bias, bits, *rest):
        shape, packed = x.shape, weight.shape
        # what the size of y depends on; C would take some bits of a larger number
        if not shape or len(packed) != 2 or bits not in CODE_BITS or shape[-1] * bits != packed[1] * 8:
            return None
        if len(shape) == 2:
            y = x.new_empty(shape[0], packed[0])
        else:
            y = x.new_empty((*shape[:-1], packed[0]))
        status = function(x, weight, scale, zero_point, bias, y, bits, *rest)
        if status == NOT_SERVED:
            return None
        if status:
            raise_for_status(status)
        return y

    return call
