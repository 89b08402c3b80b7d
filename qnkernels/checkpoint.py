"""Compressed checkpoints: one .safetensors file whose size on disk is the size claimed."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from . import container
from .layers import naming
from .nn.compressed import CompressedLayer, become_
from .nn.distributed import keep_codes_from_ddp_
from .nn.encoder import choose_encoder_path_
from .ops.checks import fail
from .specification import LayerSpec, describe, parse


def compressed_size(model: nn.Module) -> int:
    """Bytes of a model: codes in their bits, scales, zero points and codebooks as they are saved, and all
    other saved tensors at their dtype.

    A tensor that several layers share counts once.
    """
    parts = _parts(model)
    total = 0
    for tensor in {id(tensor): tensor for _, tensor in _saved_tensors(model)}.values():
        dtype, shape = tensor.dtype, tensor.shape
        if id(tensor) in parts:
            spec, part, _ = parts[id(tensor)]
            dtype, shape = spec.parts()[part]
        total += math.prod(shape) * dtype.itemsize
    return total


def save_compressed(model: nn.Module, path: str | os.PathLike) -> None:
    """Save a model to one .safetensors file, compressed layers compressed, noisy layers as plain ones.

    Shared tensors are stored once. The file appears whole or not at all. Non-persistent buffers are
    left out, as in state_dict. Raises ValueError for what is not a tensor, OSError for the path.
    """
    parts = _parts(model)
    tensors, aliases, names, storages = {}, {}, {}, set()
    for name, tensor in _saved_tensors(model):
        if id(tensor) in names:
            aliases[name] = names[id(tensor)]
            continue
        names[id(tensor)] = name
        if id(tensor) in parts:
            spec, part, layer = parts[id(tensor)]
            tensor = spec.encode(part, layer)
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if storage in storages else value
        storages.add(storage)
    layers = {name: describe(layer).to_json() for name, layer in _compressed_layers(model)}
    container.write(path, tensors, {"layers": layers, "aliases": aliases})


def load_compressed(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a file of `save_compressed` into a freshly built, unquantized model, in place; returns it.

    Compressed layers come out compressed, shared weights shared. A model built on the meta device is filled
    on the CPU, so that no full-size weight is ever allocated. Nothing is unpickled. Everything is checked
    before the model is touched: ValueError names what is wrong with the file, or where it and the model
    differ; OSError says that the file cannot be opened.
    """
    file = _File.read(os.fspath(path))
    modules = dict(model.named_modules())
    for name, spec in file.layers.items():
        with naming(name, file.path):
            spec.check_layer(modules.get(name))
    _check_tensors(model, modules, file)
    for name, spec in file.layers.items():
        with naming(name, file.path):
            spec.check_values(file.parts(name))
    for name, spec in file.layers.items():
        layer = modules[name]
        become_(layer, spec.build(file.parts(name, layer.weight.device), layer))
    _fill(model, file)
    choose_encoder_path_(model)
    keep_codes_from_ddp_(model)
    return model


def _compressed_layers(model: nn.Module) -> Iterator[tuple[str, CompressedLayer]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, CompressedLayer))


def _parts(model: nn.Module) -> dict[int, tuple[LayerSpec, str, CompressedLayer]]:
    """By id of each tensor that stands for a weight: what describes it, under which name, and its layer."""
    parts = {}
    for name, layer in _compressed_layers(model):
        with naming(name):
            spec = describe(layer)
        state = layer.state_dict(keep_vars=True)
        parts |= {id(state[part]): (spec, part, layer) for part in spec.parts()}
    return parts


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            fail(name, "a tensor in the state of the model", type(tensor).__name__)
        if tensor.device.type == "meta":
            fail(name, "a tensor with data", "one on the meta device")
        yield name, tensor


@dataclass(frozen=True)
class _File:
    """A file in memory: tensors by the name they are stored under, aliases from other names to those."""

    path: str
    layers: dict[str, LayerSpec]
    aliases: dict[str, str]
    tensors: dict[str, torch.Tensor]
    decoded: dict[tuple, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> "_File":
        specification, tensors = container.read(path)
        if not isinstance(specification, dict) or specification.keys() != {"layers", "aliases"}:
            raise ValueError(f"{path}: specification: expected layers and aliases, got {specification!r}")
        layers, aliases = specification["layers"], specification["aliases"]
        for key, value in specification.items():
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {key}: expected an object, got {value!r}")
        for name, stored in aliases.items():
            if not isinstance(stored, str) or stored not in tensors or name in tensors:
                raise ValueError(
                    f"{path}: aliases: expected {name!r} to name a stored tensor, got {stored!r}"
                )
        specs = {}
        for name, value in layers.items():
            with naming(name, path):
                specs[name] = parse(value)
        return cls(path, specs, aliases, tensors)

    def stored(self, name: str) -> str:
        return self.aliases.get(name, name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name; the same object for all its names."""
        return self.tensors[self.stored(name)]

    def parts(self, layer: str, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """The parts of a layer as they are in memory, shared between the layers that share them in the file.

        A given device moves them there.
        """
        parts = {part: self._part(layer, part) for part in self.layers[layer].parts()}
        if device is not None and device.type != "meta":
            for tensor in parts.values():
                tensor.data = tensor.data.to(device)
        return parts

    def _part(self, layer: str, part: str) -> torch.Tensor:
        spec = self.layers[layer]
        needed = {name: _join(layer, name) for name in spec.needs(part)}
        key = (*map(self.stored, needed.values()), spec.form(part))
        if key not in self.decoded:
            self.decoded[key] = spec.decode(part, {name: self.tensor(full) for name, full in needed.items()})
        return self.decoded[key]


def _join(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part


def _check_tensors(model: nn.Module, modules: dict[str, nn.Module], file: _File) -> None:
    """Names, dtypes and shapes in the file against what the model will hold, and how the model shares."""
    state = model.state_dict(keep_vars=True)
    specs = {id(modules[name]): spec for name, spec in file.layers.items()}
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    for name, layer in model.named_modules(remove_duplicate=False):
        if id(layer) in specs:
            state.pop(_join(name, "weight"))
            expected.pop(_join(name, "weight"))
            expected |= {_join(name, part): form for part, form in specs[id(layer)].parts().items()}
    names = file.tensors.keys() | file.aliases.keys()
    if missing := sorted(expected.keys() - names):
        raise ValueError(f"{file.path}: expected the tensors of the model, missing {_list(missing)}")
    if unexpected := sorted(names - expected.keys()):
        raise ValueError(f"{file.path}: expected the tensors of the model only, got also {_list(unexpected)}")
    for name, (dtype, shape) in expected.items():
        tensor = file.tensor(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            received = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{file.path}: {name}: expected {dtype} of shape {shape}, got {received}")
    first: dict[int, str] = {}
    for name, tensor in state.items():
        other = first.setdefault(id(tensor), name)
        if file.stored(name) != file.stored(other):
            raise ValueError(
                f"{file.path}: {name}: expected the same tensor as {other}, as in the model, got another"
            )
    saved = {id(tensor) for tensor in state.values()}
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta" and id(buffer) not in saved:
            raise ValueError(
                f"{name}: expected a buffer with data, since no file holds it, got one on the meta device"
            )


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@torch.no_grad()
def _fill(model: nn.Module, file: _File) -> None:
    """Copy everything into the model but the parts that compressed layers were built over; what is on meta
    is replaced.
    """
    built = {id(tensor) for tensor in file.decoded.values()}
    made: dict[int, torch.Tensor] = {}
    for name, target in model.state_dict(keep_vars=True).items():
        if id(target) in built:
            continue
        if target.device.type != "meta":
            target.copy_(file.tensor(name))
            continue
        parent, _, attribute = name.rpartition(".")
        layer = model.get_submodule(parent)
        if isinstance(target, nn.Parameter):
            value = made.setdefault(id(target), nn.Parameter(file.tensor(name), target.requires_grad))
            layer._parameters[attribute] = value
        else:
            layer._buffers[attribute] = made.setdefault(id(target), file.tensor(name))
