"""What the algorithms share: the layers of a model by name, and errors that name the layer."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

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
