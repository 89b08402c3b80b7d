"""Ops of the C++ library as Python functions that take tensors whole, with arguments that nobody has checked.

To check shapes and hand over pointers one by one takes Python longer than a small layer takes to compute.
These look at the tensors in C++, through the table of functions that newer versions of torch offer to other
libraries (DLPack's exchange interface), and return None for what is not in the plainest form, and while
anybody looks at ops.
"""

import ctypes
from collections.abc import Callable

import torch
from torch.autograd import forward_ad, profiler

from .native import library_path
from .watchers import WATCHERS

TABLE = "__dlpack_c_exchange_api__"
OPS = ("int_linear", "int_linear_quantized")


def load() -> dict[str, Callable]:
    """By op name, with the op's signature; empty where torch or the library lacks what it takes."""
    table = _table()
    library = ctypes.PyDLL(str(library_path("cpu")))  # which keeps the interpreter's lock
    made = all(hasattr(library, name) for name in ("qnk_cpu_tensors", *map(_maker, OPS)))
    if table is None or WATCHERS is None or not made:
        return {}
    *modes, is_wrapped = WATCHERS
    known = (
        *(None, int, torch.Tensor, torch.nn.Parameter),
        *(torch.Tensor.new_empty, torch.Tensor.is_neg, is_wrapped, torch.is_grad_enabled),
        *(profiler, "_is_profiler_enabled", forward_ad, "_current_level", "is_cpu", "requires_grad"),
        *modes,
    )
    library.qnk_cpu_tensors.argtypes = (ctypes.c_void_p, ctypes.py_object)
    if not library.qnk_cpu_tensors(table, known):
        return {}
    return {op: _function(library, op) for op in OPS}


def _table() -> int | None:
    """The address of the table; None where torch has none."""
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    try:
        return pointer_of(("PyCapsule_GetPointer", ctypes.pythonapi))(
            getattr(torch.Tensor, TABLE), b"dlpack_exchange_api"
        )
    except (AttributeError, ValueError):
        return None


def _maker(op: str) -> str:
    return f"qnk_cpu_{op}_function"


def _function(library: ctypes.PyDLL, op: str) -> Callable:
    make = getattr(library, _maker(op))
    make.restype = ctypes.py_object
    return make()
