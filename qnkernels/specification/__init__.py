"""How a checkpoint describes a compressed layer, and what must hold before a model's layer becomes it."""

from ..nn.compressed import CompressedLayer
from ..nn.pq_weight import PQLayer
from ..ops.checks import fail
from .base import LayerSpec
from .packed import PackedSpec
from .product import PQSpec

__all__ = ["LayerSpec", "describe", "parse"]

TYPES: dict[str, type[LayerSpec]] = {name: spec for spec in (PackedSpec, PQSpec) for name in spec.PLAIN}


def describe(layer: CompressedLayer) -> LayerSpec:
    """The description of a layer; raises ValueError where no file can hold it."""
    return (PQSpec if isinstance(layer, PQLayer) else PackedSpec).of(layer)


def parse(value: object) -> LayerSpec:
    """From what JSON gave, which may be anything; raises ValueError naming the field."""
    if not isinstance(value, dict):
        fail("specification", "an object", repr(value))
    name = value.get("type")
    if not isinstance(name, str) or name not in TYPES:
        fail("type", f"one of {tuple(TYPES)}", repr(name))
    return TYPES[name].parse(value)
