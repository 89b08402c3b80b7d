"""Int8DynamicConfig and Int8StaticConfig: what each layer becomes, from which ranges, and what is refused."""

import copy

import pytest
import torch
from helpers_reload import TOKENS, Model
from numeric import assert_identical, relative_error
from torch import nn

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.nn import Int8Linear, IntConv2d, IntEmbedding
from qnkernels.nn.compressed import CompressedLayer

CONFIGS = {"dynamic": qnk.Int8DynamicConfig, "static": qnk.Int8StaticConfig}
KINDS = {
    "embedding": IntEmbedding,
    "conv": IntConv2d,
    "grouped": IntConv2d,
    "body.0": Int8Linear,
    "body.2": Int8Linear,
    "head": Int8Linear,
}


def build(seed: int = 0, **options) -> Model:
    torch.manual_seed(seed)
    return Model(**options).eval()


def calibrated(model: nn.Module, observer: str = "minmax") -> nn.Module:
    with qnk.calibrate(model, observer=observer):
        model(TOKENS)
    return model


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("mode", CONFIGS)
def test_every_layer_in_place(mode, noisy):
    model = build()
    with torch.no_grad():
        expected = model(TOKENS)
        layers = {name: model.get_submodule(name) for name in KINDS}
        calls, bias = [], model.body[0].bias
        model.head.register_forward_hook(lambda *_: calls.append(1))
        if noisy:
            qnk.quantize_(model, qnk.ScalarNoiseConfig(per="channel", activations=False))
        calibrated(model)
        calls.clear()
        assert qnk.quantize_(model, CONFIGS[mode]()) is model
        for name, layer in layers.items():
            assert model.get_submodule(name) is layer and type(layer) is KINDS[name]
            assert name == "embedding" or layer.activations == mode
            assert not hasattr(layer, "input_range") and not layer.training
        assert model.body[0].bias is bias and model.head.weight_packed is model.embedding.weight_packed
        assert relative_error(model(TOKENS), expected) < 0.03 and calls == [1]


@pytest.mark.parametrize("observer", ["minmax", "ema_minmax", "percentile", "histogram"])
def test_static_quantizers_are_those_of_the_recorded_ranges(observer):
    model = calibrated(build(), observer)
    ranges = {name: model.get_submodule(name).input_range for name in KINDS if name != "embedding"}
    copied = copy.deepcopy(model)
    for turned in (model, copied):
        qnk.quantize_(turned, qnk.Int8StaticConfig())
        for name, seen in ranges.items():
            layer = turned.get_submodule(name)
            scale, zero_point = F.quantization_parameters(torch.tensor(seen.low), torch.tensor(seen.high))
            assert_identical(layer.x_scale, scale)
            assert_identical(layer.x_zero_point, zero_point)


def test_fields_reach_the_weights():
    model = nn.Sequential(nn.Linear(16, 4), nn.Conv2d(4, 6, 2))
    weights = [layer.weight.detach().clone() for layer in model]
    qnk.quantize_(model, qnk.Int8DynamicConfig(group_size=8, symmetric=True, observer="histogram"))
    for layer, weight in zip(model, weights, strict=True):
        low, high = F.histogram_range(weight.flatten(1), 8, group_size=8)
        scale, _ = F.quantization_parameters(low, high, 8, symmetric=True)
        assert_identical(layer.scale, scale)
        assert layer.group_size == 8 and layer.symmetric
    layer = qnk.quantize_(nn.Linear(16, 4), qnk.Int8DynamicConfig(per="tensor"))
    assert (layer.scale == layer.scale[0]).all()
    with pytest.raises(ValueError, match="observer: expected one of"):
        qnk.Int8StaticConfig(observer="ema_minmax")


def test_a_layer_that_saw_no_data_is_named_and_nothing_is_changed():
    model = build()
    message = "input_range: expected a range recorded by calibrate, got none: the layer saw no data"
    with pytest.raises(ValueError, match=f"layer 'conv': {message}"):
        qnk.quantize_(model, qnk.Int8StaticConfig())
    calibrated(model)
    del model.body[2].input_range
    ranges = model.conv.input_range
    with pytest.raises(ValueError, match=f"layer 'body.2': {message}"):
        qnk.quantize_(model, qnk.Int8StaticConfig())
    assert not any(isinstance(layer, CompressedLayer) for layer in model.modules())
    assert model.conv.input_range is ranges
    qnk.quantize_(model, qnk.Int8StaticConfig(), lambda module, name: name != "body.2")
    assert type(model.conv) is IntConv2d and type(model.body[2]) is nn.Linear
    with pytest.raises(ValueError, match=f"the model itself: {message}"):
        qnk.quantize_(nn.Linear(2, 2), qnk.Int8StaticConfig())


def test_a_range_beyond_fp32_is_refused():
    layer = nn.Linear(2, 2)
    with qnk.calibrate(layer, observer="minmax"):
        layer(torch.tensor([-3e38, 3e38]))
    with pytest.raises(ValueError, match="x_scale: expected a finite positive value, got inf"):
        qnk.quantize_(layer, qnk.Int8StaticConfig())


def test_ranges_outlive_noise_and_other_configs():
    model = calibrated(build(tied=False))
    seen = model.head.input_range
    qnk.remove_noise_(qnk.quantize_(model, qnk.ScalarNoiseConfig()))
    assert model.head.input_range is seen
    qnk.quantize_(model, qnk.Int8WeightOnlyConfig(), lambda module, name: name == "head")
    assert not hasattr(model.head, "input_range") and model.head.activations == "float"
    qnk.quantize_(model, qnk.Int8StaticConfig())
    assert model.conv.activations == "static" and model.head.activations == "float"


def test_a_static_model_clamps_what_lies_outside_its_ranges():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    with qnk.calibrate(layer, observer="minmax"):
        layer(torch.tensor([[-1.0], [1.55]]))
    x = torch.tensor([[-2.0], [-1.0], [0.0], [0.5], [1.55], [50.0]])
    y = qnk.quantize_(layer, qnk.Int8StaticConfig(symmetric=True))(x)
    # 255 steps of 0.01, of which the 100th is 0
    torch.testing.assert_close(y.detach(), x.clamp(-1.0, 1.55))


def test_int4_filters_with_an_odd_number_of_weights_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 2, 3))
    message = r"layer '1': weight: expected an even number of columns .* got shape \(2, 9\)"
    with pytest.raises(ValueError, match=message):
        qnk.quantize_(model, qnk.Int4WeightOnlyConfig(group_size=None))
    assert type(model[0]) is nn.Linear
