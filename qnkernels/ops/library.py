"""The torch.library namespace of the ops, and how one is declared."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("qnkernels", "DEF")


def op(schema: str, fake: Callable) -> Callable:
    """Register the decorated function as torch.ops.qnkernels.<name> for every device.

    `fake` has the same signature and returns empty tensors of the right shape and dtype; it and the
    implementation call the same argument checks.
    """
    name = schema.split("(", 1)[0]

    def register(function: Callable) -> Callable:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qnkernels::{name}", fake, lib=LIBRARY)
        return function

    return register


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give the op its gradient formula."""
    torch.library.register_autograd(f"qnkernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)
