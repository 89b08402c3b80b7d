"""What the algorithms share: the layers of a model by name and by weight, and errors that name the layer."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from .nn.pq_weight import PQLayer
from .ops.checks import fail

Layers = list[tuple[str, nn.Module]]
Steps = list[Callable[[], None]]


@contextlib.contextmanager
def naming(name: str, file: str | None = None) -> Iterator[None]:
    """Put the layer's name, and that of the file, in front of ValueErrors and TypeErrors raised inside."""
    label = f"layer {name!r}" if name else "the model itself"
    label = label if file is None else f"{file}: {label}"
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{label}: {error}") from error


def check_owns_weight(layer: nn.Module) -> None:
    """The weight must be a parameter of the layer, not a tensor that a hook computes."""
    if layer._parameters.get("weight") is None:
        raise ValueError("weight: expected a parameter of the layer, got a tensor computed by a hook")


def weight_id(layer: nn.Module) -> int:
    """The same for layers that share a weight, or its codes."""
    weight = layer.codes if isinstance(layer, PQLayer) else layer._parameters.get("weight")
    return id(layer if weight is None else weight)


def tied_layers(model: nn.Module, is_ours: Callable[[nn.Module], bool]) -> list[Layers]:
    """The layers for which `is_ours` is true, those that share a weight together."""
    tied: dict[int, Layers] = {}
    for name, layer in model.named_modules():
        if is_ours(layer):
            tied.setdefault(weight_id(layer), []).append((name, layer))
    return list(tied.values())


def check_sharing(model: nn.Module, layers: Layers) -> None:
    """A weight must not be held by a module that would keep it when its codes take its place."""
    ours = {id(layer) for _, layer in layers}
    weights = {weight_id(layer): name for name, layer in layers}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if id(module) not in ours and id(parameter) in weights:
                owner = weights[id(parameter)]
                with naming(owner):
                    expected = "one that only Linear, Embedding and Conv2d layers share"
                    fail("weight", expected, f"that of {type(module).__name__} {name!r}, too")
