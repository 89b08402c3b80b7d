"""Groups of layers by name: which are quantized together."""

import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..layers import Layers, check_sharing, naming, tied_layers
from ..nn.noisy import NOISY, NoisyLayer
from ..ops.checks import fail

Filter = Callable[[nn.Module, str], bool]
Selector = str | Filter | Sequence[str]

KINDS = "Linear, Embedding and Conv2d layers"


def assign(
    model: nn.Module, groups: Mapping[str, Selector] | None, filter_fn: Filter | None = None
) -> tuple[dict[str, Layers], list[str]]:
    """The layers of each group, those that share a weight side by side, and the names of those in no group.

    Layers are those of the kinds that are quantized, for which, or for one that shares their weight,
    `filter_fn` is true. groups: see `sensitivity`. Raises ValueError naming the group or layer.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, NoisyLayer):
            with naming(name):
                fail("model", "no noisy layers, as remove_noise_ leaves none", type(layer).__name__)
    tied = tied_layers(model, lambda layer: type(layer) in NOISY)
    if filter_fn is not None:
        tied = [layers for layers in tied if any(filter_fn(layer, name) for name, layer in layers)]
    if not tied:
        fail("model", f"{KINDS} to quantize", f"{type(model).__name__} without any")
    check_sharing(model, [item for layers in tied for item in layers])
    if groups is None:
        return {layers[0][0]: layers for layers in tied}, []
    if not groups:
        fail("groups", "at least one group, or None for one of each layer", repr(groups))
    names = {name for layers in tied for name, _ in layers}
    matches = {group: _matcher(group, selector, names) for group, selector in groups.items()}
    assigned: dict[str, Layers] = {group: [] for group in groups}
    left_out = []
    for layers in tied:
        found = [
            group for group, match in matches.items() if any(match(layer, name) for name, layer in layers)
        ]
        if len(found) > 1:
            expected = "each layer, with those that share its weight, in one group"
            fail("groups", expected, f"{_names(layers)} in {' and '.join(map(repr, found))}")
        if found:
            assigned[found[0]] += layers
        else:
            left_out += [name for name, _ in layers]
    for group, layers in assigned.items():
        if not layers:
            fail("groups", f"{KINDS} in each group", f"none in {group!r}")
    return assigned, left_out


def _matcher(group: str, selector: Selector, names: set[str]) -> Filter:
    if callable(selector):
        return selector
    if isinstance(selector, str):
        try:
            pattern = re.compile(selector)
        except re.error as error:
            raise ValueError(
                f"groups: expected a regular expression for {group!r}, got {selector!r} ({error})"
            ) from error
        return lambda _, name: pattern.search(name) is not None
    if not isinstance(selector, Sequence):
        expected = f"groups: expected a regular expression, a function or a list of names for {group!r}"
        raise TypeError(f"{expected}, got {selector!r}")
    if unknown := [name for name in selector if name not in names]:
        fail("groups", f"names of {KINDS} in {group!r}", repr(unknown[0]))
    return lambda _, name: name in selector


def _names(layers: Layers) -> str:
    return " with ".join(repr(name) for name, _ in layers)
