"""MixedPrecisionConfig: each layer in codes of its own, in place and in a file."""

import pytest
import torch
from helpers_reload import TOKENS, Model
from numeric import assert_identical
from torch import nn

import qnkernels as qnk
from qnkernels.nn import Int4Linear, IntConv2d, IntEmbedding, IntLinear, PQLinear
from qnkernels.nn.compressed import CompressedLayer

THREE, FIVE = qnk.IntWeightOnlyConfig(3), qnk.IntWeightOnlyConfig(5, symmetric=True)
PRODUCT = qnk.PQConfig(block_size=4, n_centroids=16, n_iter=3)
LAYERS = {"embedding": THREE, "head": THREE, "conv": FIVE, "body.0": PRODUCT}


def build(tied: bool = True) -> Model:
    torch.manual_seed(0)
    return Model(tied=tied).eval()


@pytest.mark.parametrize("noise", [None, qnk.ScalarNoiseConfig()])
def test_each_layer_becomes_what_its_config_says(noise, tmp_path):
    model, alone = build(), {name: build() for name in LAYERS}
    if noise is not None:
        qnk.quantize_(model, noise, lambda _, name: name in LAYERS)
    for name, config in LAYERS.items():
        qnk.quantize_(alone[name], config, lambda _, found, name=name: found == name)
    assert qnk.quantize_(model, qnk.MixedPrecisionConfig(LAYERS)) is model
    kinds = {"embedding": IntEmbedding, "head": IntLinear, "conv": IntConv2d, "body.0": PQLinear}
    for name, kind in kinds.items():
        assert type(model.get_submodule(name)) is kind
        assert_identical(model.get_submodule(name).weight, alone[name].get_submodule(name).weight)
    assert type(model.body[2]) is nn.Linear and type(model.grouped) is nn.Conv2d
    assert model.head.weight_packed is model.embedding.weight_packed
    qnk.save_compressed(model, tmp_path / "m")
    loaded = qnk.load_compressed(build(), tmp_path / "m")
    with torch.no_grad():
        assert_identical(loaded(TOKENS), model(TOKENS))


def test_mistakes_are_named_and_nothing_is_changed():
    model = build()
    cases = [
        ({"body.0": THREE, "body.7": THREE}, r"layers: expected names of layers .*, got \['body.7'\]"),
        (
            {"embedding": THREE, "head": FIVE},
            "layer 'head': layers: expected the config of 'embedding', whose weight it shares, got Int",
        ),
        ({"embedding": THREE}, "layer 'head': layers: expected the config of 'embedding', .*, got None and"),
        ({"body.0": PRODUCT, "conv": THREE}, "layer 'conv': weight: expected an even number of columns"),
        ({"conv": PRODUCT}, "layer 'conv': block_size: expected a divisor of the 9 weights of a row"),
    ]
    for layers, message in cases:
        with pytest.raises(ValueError, match=message):
            qnk.quantize_(model, qnk.MixedPrecisionConfig(layers))
    with pytest.raises(ValueError, match=r"and the filter lets through, got \['conv'\]"):
        qnk.quantize_(model, qnk.MixedPrecisionConfig({"conv": FIVE}), lambda _, name: name != "conv")
    assert not any(isinstance(layer, CompressedLayer) for layer in model.modules())
    with pytest.raises(TypeError, match="layers: expected an integer weight config or PQConfig for 'a', got"):
        qnk.MixedPrecisionConfig({"a": qnk.ScalarNoiseConfig()})


def test_equal_configs_share_codes_and_others_may_differ():
    model = build(tied=False)
    layers = {"embedding": THREE, "head": qnk.Int4WeightOnlyConfig(group_size=None)}
    qnk.quantize_(model, qnk.MixedPrecisionConfig(layers))
    assert (model.embedding.code_bits, model.head.code_bits, type(model.head)) == (3, 4, Int4Linear)
