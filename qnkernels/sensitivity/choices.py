"""What the layers of a group may be stored as: configs by a short label, and how many bytes they take."""

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import nn

from ..mixed import LayerConfig
from ..ops.checks import fail
from ..pq import PQConfig
from ..ptq import IntWeightOnlyConfig
from ..specification.base import dtype_name
from ..specification.packed import PackedSpec
from ..specification.product import PQSpec

Choices = dict[str, LayerConfig]

TYPES = {config.__name__: config for config in (IntWeightOnlyConfig, PQConfig)}


def make_choices(bits: Sequence[int], pq: Sequence[PQConfig], **options) -> Choices:
    """By label; options: of IntWeightOnlyConfig. Raises ValueError or TypeError naming the argument."""
    for argument, values in (("bits", bits), ("pq", pq)):
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise TypeError(f"{argument}: expected a list, got {values!r}")
    for config in pq:
        if not isinstance(config, PQConfig):
            raise TypeError(f"pq: expected PQConfig objects, got {config!r}")
        if config.activations or config.group is not None:
            fail("pq", "configs without activations and group, which are no matter of the weights", config)
    choices: Choices = {}
    for config in (*(IntWeightOnlyConfig(each, **options) for each in bits), *pq):
        if label(config) in choices:
            fail("pq" if config in pq else "bits", "each choice once", f"{label(config)} again")
        choices[label(config)] = config
    if not choices:
        fail("bits", "at least one choice here or in pq", "none")
    return choices


def label(config: LayerConfig) -> str:
    """int4, or pq8x256 for blocks of 8 weights and 256 codewords."""
    if isinstance(config, PQConfig):
        return f"pq{config.block_size}x{config.n_centroids}"
    return f"int{config.bits}"


def stored_bytes(layer: nn.Module, config: LayerConfig) -> int:
    """What `save_compressed` writes for the weight of a layer that `config` turned."""
    rows, columns = layer.weight.flatten(1).shape
    weight = dict(shape=[rows, columns], dtype=dtype_name(layer.weight.dtype), bias=False, padding_idx=None)
    if isinstance(config, PQConfig):
        dtype = config.codebook_dtype
        spec = PQSpec(
            type="PQLinear",
            **weight,
            codebooks=1,
            block_size=config.block_size,
            n_centroids=min(config.n_centroids, rows * columns // config.block_size),
            codebook_grad=config.codebook_grad,
            codebook_dtype=None if dtype is None else dtype_name(dtype),
            zero_padding=False,
            activations=False,
        )
    else:
        options = dict(bits=config.bits, group_size=config.group_size, symmetric=config.symmetric)
        spec = PackedSpec(type="IntLinear", **weight, **options)
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in spec.parts().values())


def to_json(config: LayerConfig) -> dict:
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "group"}
    return {"type": type(config).__name__} | {
        name: dtype_name(value) if isinstance(value, torch.dtype) else value for name, value in values.items()
    }


def from_json(value: dict) -> LayerConfig:
    """Raises ValueError, TypeError or KeyError for what `to_json` did not write."""
    values = dict(value)
    config = TYPES[values.pop("type")]
    if (name := values.get("codebook_dtype")) is not None:
        values["codebook_dtype"] = getattr(torch, name, name)
    return config(**values)
