"""Collected only by tests/backends/test_triton.py, which sets TRITON_INTERPRET=1.

What takes most of the interpreter's time is done otherwise here, with the same results. And its memory is
checked:
  - what torch.empty and its kin give is poison: NaN, or the largest integer;
  - no kernel reads or writes outside a tensor, or that of another argument: its number among them goes with
    each pointer, in the 16 bits above the 48 of an address;
  - no element is written twice in one launch, by stores.
"""

import os

import torch

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


ADDRESS_BITS = 48


class Argument:
    """A tensor of a launch: the bytes that it spans, and which of them were written."""

    def __init__(self, tensor):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.first, self.description = tensor.data_ptr(), f"{tensor.dtype} {list(tensor.shape)}"
        self.size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        self.written = None

    def count_writes(self, offsets):
        """Each element once: `offsets` of their first bytes."""
        if self.written is None:
            self.written = np.zeros(self.size, dtype=bool)
        if self.written[offsets].any() or np.unique(offsets).size != offsets.size:
            raise IndexError(f"stored twice in one launch: an element of {self.description}")
        self.written[offsets] = True


class Memory:
    """The tensors of the launch that runs; pointers to them carry their number, from 1, above the address."""

    arguments = ()

    def start(self, call):
        def launch(executor, *arguments, **keywords):
            self.arguments = []
            return call(executor, *arguments, **keywords)

        return launch

    def number(self, convert):
        def numbered(value):
            converted = convert(value)
            if hasattr(value, "data_ptr"):
                self.arguments.append(Argument(value))
                converted.handle.data += np.uint64(len(self.arguments) << ADDRESS_BITS)
            return converted

        return numbered

    def addresses(self, pointers, mask=None, store=False):
        """The addresses in a handle of pointers; raises unless those of the mask lie in one argument."""
        data = pointers.data
        used = data.reshape(-1) if mask is None else data[np.broadcast_to(mask.data, data.shape)]
        if used.size:
            lowest, highest = int(used.min()), int(used.max())
            number, size = lowest >> ADDRESS_BITS, pointers.get_element_ty().primitive_bitwidth // 8
            if not 1 <= number <= len(self.arguments):
                raise IndexError("an address before the first argument or past the last")
            argument = self.arguments[number - 1]
            start = (number << ADDRESS_BITS) + argument.first
            if lowest < start or highest + size > start + argument.size:
                raise IndexError(
                    f"bytes {lowest - start} to {highest + size - start} of {argument.description}, "
                    f"which has {argument.size}"
                )
            if store:
                argument.count_writes((used - np.uint64(start)).astype(np.int64))
        return interpreter.TensorHandle(data & np.uint64((1 << ADDRESS_BITS) - 1), pointers.dtype)

    def checked(self, load, store, add, compare):
        """The interpreter's ways to memory, as methods of its builder."""

        def checked_load(builder, pointers, mask, *arguments):
            return load(builder, self.addresses(pointers, mask), mask, *arguments)

        def checked_store(builder, pointers, value, mask, *arguments):
            return store(builder, self.addresses(pointers, mask, store=True), value, mask, *arguments)

        def checked_add(builder, operation, pointers, value, mask, *arguments):
            return add(builder, operation, self.addresses(pointers, mask), value, mask, *arguments)

        def checked_compare(builder, pointers, *arguments):
            return compare(builder, self.addresses(pointers), *arguments)

        return checked_load, checked_store, checked_add, checked_compare


def check_memory(memory):
    """Puts the checks into the interpreter."""
    builder = interpreter.InterpreterBuilder
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    checked = memory.checked(*(getattr(builder, name) for name in names))
    for name, function in zip(names, checked, strict=True):
        setattr(builder, name, function)
    interpreter.GridExecutor.__call__ = memory.start(interpreter.GridExecutor.__call__)
    interpreter._implicit_cvt = memory.number(interpreter._implicit_cvt)


if not collect_ignore_glob:
    import numpy as np
    from triton.runtime import interpreter

    torch.use_deterministic_algorithms(True)  # fills what has no values
    check_memory(Memory())

    interpreter._patch_lang = patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    interpreter.ReduceOps.generic_reduce = reduce_by_halves
