"""Whether anybody looks at ops: modes, function transforms, tracers, the profiler."""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad, profiler


def find() -> tuple[Callable[[], object], ...] | None:
    """Tests for those who look at ops, each false while nobody does; None where torch lacks one of them."""
    names = (
        "_len_torch_function_stack",
        "_len_torch_dispatch_stack",
        "_are_functorch_transforms_active",
        "_get_tracing_state",
    )
    found = tuple(getattr(torch._C, name, None) for name in names)
    known = hasattr(profiler, "_is_profiler_enabled") and hasattr(forward_ad, "_current_level")
    functorch = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return (*found, functorch) if known and None not in (*found, functorch) else None


WATCHERS = find()
