"""Checkpoints of integer models with convolutions and quantized activations, and of earlier versions."""

import copy

import pytest
import torch
from helpers_reload import TOKENS, Model
from numeric import assert_identical
from safetensors import safe_open
from torch import nn

import qnkernels as qnk
from qnkernels import container
from qnkernels.nn import IntConv2d

CONFIGS = {
    "weight only": qnk.Int8WeightOnlyConfig(group_size=6, symmetric=True),
    "int4": qnk.Int4WeightOnlyConfig(group_size=None),
    "dynamic": qnk.Int8DynamicConfig(),
    "static": qnk.Int8StaticConfig(per="tensor"),
}


def fresh(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(99)
    return Model().to(dtype).eval()


def build(config: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    model = Model().to(dtype).eval()
    # filters of 9 weights are neither pairs of codes nor groups of 6
    kept = ("conv",) if config in ("weight only", "int4") else ()
    with qnk.calibrate(model, observer="histogram"):
        model(TOKENS)
    return qnk.quantize_(model, CONFIGS[config], lambda module, name: name not in kept)


def rewrite(path, edit) -> None:
    """Let `edit(specification, tensors)` change a file, and give it a digest that matches."""
    specification, tensors = container.read(path)
    edit(specification, tensors)
    container.write(path, tensors, specification)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip(config, dtype, tmp_path):
    model = build(config, dtype)
    qnk.save_compressed(model, tmp_path / "m")
    loaded = qnk.load_compressed(fresh(dtype), tmp_path / "m")
    assert repr(loaded) == repr(model) and type(loaded.grouped) is IntConv2d
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert_identical(state[name], tensor)
    assert loaded.head.weight_packed is loaded.embedding.weight_packed
    with torch.no_grad():
        assert_identical(loaded(TOKENS), model(TOKENS))
    qnk.save_compressed(loaded, tmp_path / "again")
    (spec, tensors), (again, same) = (container.read(tmp_path / name) for name in ("m", "again"))
    assert spec == again and tensors.keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in tensors.items())


def test_a_static_model_loads_into_one_on_the_meta_device(tmp_path):
    model = build("static")
    qnk.save_compressed(model, tmp_path / "m")
    with torch.device("meta"):
        loaded = Model().eval()
    qnk.load_compressed(loaded, tmp_path / "m")
    with torch.no_grad():
        assert_identical(loaded(TOKENS), model(TOKENS))


def test_size_counts_the_quantizers(tmp_path):
    """Codes, a scale and a zero point a row, biases, and 8 bytes for the quantizer of each input."""
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Flatten(), nn.Linear(64, 100))
    with qnk.calibrate(model):
        model(torch.randn(2, 8, 3, 3))
    qnk.quantize_(model, qnk.Int8StaticConfig())
    claimed = 64 * 72 + 100 * 64 + (64 + 100) * (4 + 1 + 4) + 2 * 8
    assert qnk.compressed_size(model) == claimed
    qnk.save_compressed(model, tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        names = {name.split(".")[1] for name in file.keys()}  # noqa: SIM118
        assert names == {"weight_packed", "scale", "zero_point", "bias", "x_scale", "x_zero_point"}
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert stored == claimed


def test_a_file_without_activations_is_of_weights_only(tmp_path):
    """As files were before activations could be quantized."""
    model = build("weight only")
    qnk.save_compressed(model, tmp_path / "m")
    rewrite(tmp_path / "m", lambda spec, _: [layer.pop("activations") for layer in spec["layers"].values()])
    loaded = qnk.load_compressed(fresh(), tmp_path / "m")
    assert repr(loaded) == repr(model)
    with torch.no_grad():
        assert_identical(loaded(TOKENS), model(TOKENS))


def of_layer(name: str, **fields):
    return lambda spec, tensors: spec["layers"][name].update(fields)


def tensor_as(name: str, value: float):
    return lambda spec, tensors: tensors[name].fill_(value)


EDITS = {
    "a scale of zero": (
        tensor_as("conv.x_scale", 0.0),
        "layer 'conv': x_scale: expected a finite positive value, got 0.0",
    ),
    "a negative scale": (tensor_as("body.0.x_scale", -1.0), "layer 'body.0': x_scale: expected a finite pos"),
    "a scale of NaN": (tensor_as("head.x_scale", float("nan")), "layer 'head': x_scale: .*, got nan"),
    "an infinite scale": (tensor_as("head.x_scale", float("inf")), "layer 'head': x_scale: .*, got inf"),
    "a zero point too large": (
        tensor_as("grouped.x_zero_point", 256.0),
        r"layer 'grouped': x_zero_point: expected an integer in \[0, 255\], got 256.0",
    ),
    "a negative zero point": (
        tensor_as("conv.x_zero_point", -1.0),
        "layer 'conv': x_zero_point: .* got -1.0",
    ),
    "a zero point between": (tensor_as("conv.x_zero_point", 0.5), "layer 'conv': x_zero_point: .* got 0.5"),
    "a zero point of NaN": (tensor_as("conv.x_zero_point", float("nan")), "x_zero_point: .* got nan"),
    "a quantizer for each row": (
        lambda spec, tensors: tensors.update({"conv.x_scale": torch.ones(4)}),
        r"conv.x_scale: expected torch.float32 of shape \(\), got torch.float32 of shape \(4,\)",
    ),
    "no quantizer": (lambda spec, tensors: tensors.pop("conv.x_scale"), "missing conv.x_scale"),
    "a quantizer of a dynamic layer": (of_layer("conv", activations="dynamic"), "got also conv.x_scale"),
    "other activations": (
        of_layer("conv", activations="int8"),
        "layer 'conv': activations: expected one of .*, got 'int8'",
    ),
    "activations that are no name": (of_layer("conv", activations=["static"]), "layer 'conv': activations: "),
    "activations of an embedding": (
        of_layer("embedding", activations="static"),
        r"layer 'embedding': activations: expected one of \('float',\), got 'static'",
    ),
    "a filter of another shape": (
        of_layer("conv", shape=[4, 1, 1, 9]),
        r"layer 'conv': weight: expected the shape in the file, \[4, 1, 1, 9\], got \[4, 1, 3, 3\]",
    ),
    "a filter of two dimensions": (
        of_layer("conv", shape=[4, 9]),
        "layer 'conv': shape: expected 4 positive",
    ),
    "a linear layer for a convolution": (
        of_layer("conv", type="IntLinear", shape=[4, 9]),
        "layer 'conv': model: expected an unquantized Linear, got Conv2d",
    ),
    "a group that no filter has": (
        of_layer("conv", group_size=4),
        "layer 'conv': group_size: expected null or",
    ),
    "pairs of 9 codes": (of_layer("conv", bits=4), "layer 'conv': shape: expected an even number of columns"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_files(edit, tmp_path):
    """Even with a digest that matches; the model stays as it was."""
    change, message = EDITS[edit]
    qnk.save_compressed(build("static"), tmp_path / "m")
    rewrite(tmp_path / "m", change)
    model = fresh()
    types, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        qnk.load_compressed(model, tmp_path / "m")
    assert [type(module) for module in model.modules()] == types
    for name, tensor in model.state_dict().items():
        assert_identical(tensor, state[name])
