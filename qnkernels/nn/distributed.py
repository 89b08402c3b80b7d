"""DistributedDataParallel, which sends every buffer of a model from its first process to the others."""

from torch import nn

from .pq_weight import PQLayer

IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel reads of the model that it wraps


def keep_codes_from_ddp_(model: nn.Module) -> None:
    """Codes never change, and 16-bit ones have a dtype that the communication libraries cannot send.

    Each process must have the same codes from the start, as it has after k-means of the same weight.
    """
    names = {
        f"{name}.codes" if name else "codes"
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, PQLayer)
    }
    if names:
        setattr(model, IGNORED, sorted(names.union(getattr(model, IGNORED, ()))))
