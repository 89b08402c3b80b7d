"""The torch.library namespace of the ops, and how one is declared."""

from collections.abc import Callable

import torch

from ..backends import select_whole
from .direct import direct, whole_first

LIBRARY = torch.library.Library("qnkernels", "DEF")


def op(schema: str, fake: Callable, whole: bool = False) -> Callable:
    """Register the decorated function as torch.ops.qnkernels.<name> for every device.

    `fake` has the same signature and returns empty tensors of the right shape and dtype; it and the
    implementation call the same argument checks. Returns what callers call: the op, past torch's dispatcher
    where nobody would notice (see `direct`). whole: a backend may have the op for unchecked tensors, see
    `select_whole`.
    """
    name = schema.split("(", 1)[0]

    def register(function: Callable) -> Callable:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        implementation = _after_whole(name, function) if whole else function
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qnkernels::{name}", fake, lib=LIBRARY)
        call = direct(getattr(torch.ops.qnkernels, name), function, implementation)
        return whole_first(name, call) if whole else call

    return register


def _after_whole(name: str, function: Callable) -> Callable:
    def implementation(*arguments):
        whole = select_whole(name)
        if whole is not None and (result := whole(*arguments)) is not None:
            return result
        return function(*arguments)

    return implementation


def autograd(call: Callable, backward: Callable, setup_context: Callable) -> None:
    """Give the op, as `op` returned it, its gradient formula."""
    name = call.dispatched._qualified_op_name
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    call.differentiate(backward, setup_context)
