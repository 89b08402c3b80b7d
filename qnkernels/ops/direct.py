"""Calls of an op that go past torch's dispatcher.

The dispatcher costs an op that is written in Python more than a small layer takes to compute, and its
gradient formula costs several times that. What it does is needed by those who look at ops: compilers and
tracers, modes, function transforms, subclasses of tensors, the profiler. A call that none of them sees is
made directly.
"""

from collections.abc import Callable
from functools import update_wrapper
from operator import itemgetter

import torch
from torch.autograd import forward_ad, profiler
from torch.compiler import is_compiling

from ..backends import select_whole
from ..backends.watchers import WATCHERS

TENSORS = (torch.Tensor, torch.nn.Parameter)
# Exact types that an argument may have, by the type in the schema; another one goes to the dispatcher, which
# converts it or says what is wrong with it.
KINDS = {
    "Tensor": TENSORS,
    "Optional[Tensor]": (*TENSORS, type(None)),
    "int": (int,),
    "Optional[int]": (int, type(None)),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Optional[ScalarType]": (torch.dtype, type(None)),
}


def watched(*tensors: torch.Tensor) -> bool:
    """Whether anybody looks at ops, or one of the tensors is not a plain one on a CPU or a GPU."""
    if is_compiling() or WATCHERS is None:
        return True
    function_modes, dispatch_modes, transforms, tracing, is_wrapped = WATCHERS
    if (
        function_modes()
        or dispatch_modes()
        or transforms()
        or tracing() is not None
        or profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
    ):
        return True
    for tensor in tensors:
        if (
            type(tensor) not in TENSORS
            or not (tensor.is_cpu or tensor.is_cuda)
            or tensor.is_neg()
            or is_wrapped(tensor)
        ):
            return True
    return False


def direct(dispatched: Callable, function: Callable, differentiable: Callable | None = None) -> Callable:
    """A callable, taking all arguments of the schema in order, that gives what `dispatched` (an op of
    torch.ops) gives, and calls its implementation `function` itself where nothing else needs to know.

    Not direct: while something compiles, traces, profiles or transforms, or a mode is active; arguments of
    other types than the schema's own or on other devices than a CPU or a GPU. Where a gradient is wanted the
    formula given to its attribute `differentiate` serves as a plain torch.autograd.Function.
    """
    formula = None

    def differentiate(backward: Callable, setup_context: Callable) -> None:
        nonlocal formula
        formula = _formula(dispatched.__name__, differentiable or function, backward, setup_context)

    if WATCHERS is None:
        call = _always(dispatched)
        call.dispatched, call.differentiate = dispatched, differentiate
        return call
    function_modes, dispatch_modes, transforms, tracing, is_wrapped = WATCHERS
    is_grad_enabled = torch.is_grad_enabled
    tensors_of: dict[tuple[type, ...], itemgetter] = {}

    def call(*arguments):
        # is_compiling() comes first and alone, so that torch.compile sees no more than the op
        if is_compiling():
            return dispatched(*arguments)
        if (
            function_modes()
            or dispatch_modes()
            or transforms()
            or tracing() is not None
            or profiler._is_profiler_enabled
            or forward_ad._current_level >= 0
        ):
            return dispatched(*arguments)
        kinds = tuple(map(type, arguments))
        pick = tensors_of.get(kinds)
        if pick is None:
            pick = _tensors(dispatched.default._schema, kinds)
            if pick is None:
                return dispatched(*arguments)
            tensors_of[kinds] = pick
        tensors = pick(arguments)
        first = tensors[0]
        # Of the tensors only the first may well be the result of a computation, and outlive its transform.
        if not (first.is_cpu or first.is_cuda) or is_wrapped(first):
            return dispatched(*arguments)
        for tensor in tensors:
            if tensor.is_neg():  # the imaginary part of a conjugate, whose sign is still to be flipped
                return dispatched(*arguments)
        if is_grad_enabled():
            for tensor in tensors:
                if tensor.requires_grad:
                    return (dispatched if formula is None else formula)(*arguments)
        return function(*arguments)

    update_wrapper(call, function)
    call.dispatched, call.differentiate = dispatched, differentiate
    return call


def whole_first(name: str, call: Callable) -> Callable:
    """`call`, what `direct` gave for the op of this name, after what takes plain tensors whole, if anything
    does: that looks itself whether anybody watches, but cannot see a compiler.
    """

    def first(*arguments):
        if is_compiling():
            return call.dispatched(*arguments)
        whole = select_whole(name)
        if whole is not None and (result := whole(*arguments)) is not None:
            return result
        return call(*arguments)

    update_wrapper(first, call)
    return first


def _always(dispatched: Callable) -> Callable:
    return lambda *arguments: dispatched(*arguments)


def _tensors(schema: torch.FunctionSchema, kinds: tuple[type, ...]) -> itemgetter | None:
    """What picks the tensors from arguments of these types; None where the schema has other types."""
    if len(kinds) != len(schema.arguments):
        return None
    for argument, kind in zip(schema.arguments, kinds, strict=True):
        if kind not in KINDS.get(str(argument.real_type), ()):
            return None
    positions = [index for index, kind in enumerate(kinds) if kind in TENSORS]
    # an itemgetter of one index gives no tuple
    return itemgetter(*positions, *(positions if len(positions) == 1 else ()))


def _formula(name: str, function: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """The op as a torch.autograd.Function; the arguments are those of torch.library.register_autograd."""

    def forward(ctx, *arguments):
        output = function(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods).apply
