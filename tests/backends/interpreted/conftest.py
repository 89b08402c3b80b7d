"""Collected only by tests/backends/test_triton.py, which sets TRITON_INTERPRET=1.

What takes most of the interpreter's time is done otherwise here, with the same results.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def patch_once(patch):
    """The interpreter's `_patch_lang`, once for the functions of a module, not at each call of one.

    It replaces what triton.language does by what numpy does, which may stay: nothing is compiled here.
    """
    patched = set()

    def patch_lang(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
        return interpreter._LangPatchScope()  # with nothing to restore

    return patch_lang


def reduce_by_halves(operation, inputs):
    """The interpreter's `generic_reduce` of one tensor, one half of it with the other, not value by value."""
    (x,), axis = operation.unravel(inputs, operation.axis)
    assert not operation.keep_dims
    data = x.handle.data
    while data.shape[axis] > 1:
        halves = (operation.to_tensor(half, x.dtype) for half in np.split(data, 2, axis))
        data = operation.combine_fn.fn(*halves).handle.data
    data = data.squeeze(axis)
    return [operation.to_tensor(data if data.shape else data.item(), x.dtype)]


def by_name(function):
    """A function of a type of Triton, called once for each."""
    known = {}

    def call(dtype):
        if dtype.name not in known:
            known[dtype.name] = function(dtype)
        return known[dtype.name]

    return call


if not collect_ignore_glob:
    import numpy as np
    from triton.runtime import interpreter

    interpreter._patch_lang = patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    interpreter.ReduceOps.generic_reduce = reduce_by_halves
