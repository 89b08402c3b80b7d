"""IntWeightOnlyConfig of 2 to 8 bits: what the layers compute, and files that take just these bits."""

import os

import pytest
import torch
from helpers_reload import TOKENS, Model
from numeric import assert_identical
from torch import nn

import qnkernels as qnk
from qnkernels import container
from qnkernels import functional as F
from qnkernels.nn import Int4Linear, Int8Linear, IntConv2d, IntEmbedding, IntLinear

BITS = range(2, 9)
OPTIONS = {
    "channels": {},
    "groups": {"group_size": 6},
    "tensor": {"per": "tensor"},
    "symmetric": {"symmetric": True},
    "histogram": {"observer": "histogram", "symmetric": True, "group_size": 12},
}
EVEN = ("embedding", "body.0", "body.2", "head")  # filters of 9 and 6 weights are not for every option


def build(bits: int, dtype: torch.dtype = torch.float32, **options) -> Model:
    torch.manual_seed(0)
    model = Model().to(dtype).eval()
    config = qnk.IntWeightOnlyConfig(bits, **options)
    convolutions = () if bits <= 4 or options.get("group_size") else ("conv", "grouped")
    return qnk.quantize_(model, config, lambda _, name: name in (*EVEN, *convolutions))


def fresh(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(99)
    return Model().to(dtype).eval()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bits", BITS)
def test_layers_decode_to_what_noise_of_these_bits_gives(bits, options):
    options = OPTIONS[options]
    model = build(bits, **options)
    torch.manual_seed(0)
    plain = Model()
    for name in EVEN:
        weight, layer = plain.get_submodule(name).weight.detach(), model.get_submodule(name)
        per_row = options.get("per") != "tensor" and "group_size" not in options
        axis, group = 0 if per_row else None, options.get("group_size")
        if options.get("observer") == "histogram":
            low, high = F.histogram_range(weight, bits, axis, group)
        else:
            low, high = F.minmax(weight, axis, group)
        scale, zero = F.quantization_parameters(low, high, bits, options.get("symmetric", False))
        assert_identical(layer.weight, F.fake_quantize(weight, scale, zero, bits, axis, group))
        assert layer.code_bits == bits and layer.bits == (4 if bits <= 4 else 8)
        assert f"bits={bits}" in repr(layer)
    kind = {8: Int8Linear, 4: Int4Linear}.get(bits, IntLinear)
    assert type(model.head) is kind and type(model.embedding) is IntEmbedding


@pytest.mark.parametrize("bits", BITS)
def test_forwards_are_products_with_the_decoded_weight(bits):
    model = build(bits, symmetric=bits % 2 == 0)
    plain = fresh()
    decoded = {f"{name}.weight": model.get_submodule(name).weight for name in (*EVEN, "conv", "grouped")}
    plain.load_state_dict(model.state_dict() | decoded, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=2e-4, atol=2e-5)
        assert_identical(model.embedding(TOKENS), plain.embedding(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bits", BITS)
def test_round_trip(bits, options, dtype, tmp_path):
    model = build(bits, dtype, **OPTIONS[options])
    qnk.save_compressed(model, tmp_path / "m")
    loaded = qnk.load_compressed(fresh(dtype), tmp_path / "m")
    assert repr(loaded) == repr(model)
    for name, tensor in model.state_dict().items():
        assert_identical(loaded.state_dict()[name], tensor)
    assert loaded.head.weight_packed is loaded.embedding.weight_packed
    with torch.no_grad():
        assert_identical(loaded(TOKENS), model(TOKENS))
    specification, tensors = container.read(tmp_path / "m")
    assert specification["layers"]["head"]["bits"] == bits
    values = 50 * 48
    assert tensors["embedding.weight_packed"].numel() == -(-values * bits // 8)


def test_streams_that_end_inside_a_byte(tmp_path):
    for bits, columns in ((3, 2), (5, 3), (6, 1), (7, 5), (2, 2)):
        layer = qnk.quantize_(nn.Linear(columns, 3), qnk.IntWeightOnlyConfig(bits))
        qnk.save_compressed(layer, tmp_path / "m")
        loaded = qnk.load_compressed(nn.Linear(columns, 3), tmp_path / "m")
        assert_identical(loaded.weight, layer.weight)


def test_convolutions_of_five_bits(tmp_path):
    torch.manual_seed(3)
    conv = qnk.quantize_(nn.Conv2d(3, 5, 3), qnk.IntWeightOnlyConfig(5, symmetric=True))
    qnk.save_compressed(conv, tmp_path / "m")
    loaded = qnk.load_compressed(nn.Conv2d(3, 5, 3), tmp_path / "m")
    x = torch.randn(2, 3, 6, 6)
    assert type(loaded) is IntConv2d
    assert_identical(loaded(x).detach(), conv(x).detach())


def test_loads_into_a_model_on_the_meta_device(tmp_path):
    model = build(3)
    qnk.save_compressed(model, tmp_path / "m")
    with torch.device("meta"):
        loaded = Model().eval()
    qnk.load_compressed(loaded, tmp_path / "m")
    with torch.no_grad():
        assert_identical(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("bits", BITS)
def test_file_is_as_large_as_claimed(bits, tmp_path):
    """Codes of `bits` bits, a scale and a zero point a row; the file adds less than 1 %."""
    model = nn.Sequential(nn.Embedding(1000, 256), nn.Linear(256, 2048, bias=False))
    qnk.quantize_(model, qnk.IntWeightOnlyConfig(bits))
    rows, weights = 1000 + 2048, (1000 + 2048) * 256
    claimed = weights * bits // 8 + rows * 5
    assert qnk.compressed_size(model) == claimed
    qnk.save_compressed(model, tmp_path / "m")
    assert claimed < os.path.getsize(tmp_path / "m") < claimed * 1.01


@pytest.mark.parametrize(("symmetric", "high"), [(False, 7), (True, 11)])
def test_codes_of_too_many_bits_are_named(symmetric, high, tmp_path):
    """In a state_dict, and in the layer when it is saved; a file of 3-bit codes cannot hold one."""
    torch.manual_seed(1)
    config = qnk.IntWeightOnlyConfig(3, symmetric=symmetric)
    layer, other = (qnk.quantize_(nn.Linear(4, 4), config) for _ in range(2))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other.load_state_dict(state)
    assert_identical(other.weight, layer.weight)
    state["weight_packed"][1, 1] = 0xFF
    message = rf"weight_packed: expected codes of 3 bits, in \[{high - 7}, {high}\], got 15"
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)
    assert_identical(other.weight, layer.weight)
    state["weight_packed"] = state["weight_packed"].float()
    with pytest.raises(RuntimeError, match=r"weight_packed: expected torch.uint8, got torch.float32"):
        other.load_state_dict(state)
    layer.weight_packed[0, 0] = 0xFF
    with pytest.raises(ValueError, match=message):
        qnk.save_compressed(layer, tmp_path / "m")
    assert not os.listdir(tmp_path)


EDITS = {
    "a zero point of too many bits": (
        lambda spec, tensors: tensors["0.zero_point"].fill_(8),
        "layer '0': zero_point: expected values below 8, got 8",
    ),
    "fewer bits than codes": (
        lambda spec, tensors: spec["layers"]["0"].update(bits=2),
        r"0.weight_packed: expected torch.uint8 of shape \(4,\), got torch.uint8 of shape \(6,\)",
    ),
    "a stream as a matrix": (
        lambda spec, tensors: tensors.update({"0.weight_packed": tensors["0.weight_packed"].view(2, 3)}),
        r"0.weight_packed: expected torch.uint8 of shape \(6,\), got torch.uint8 of shape \(2, 3\)",
    ),
    "one bit": (
        lambda spec, tensors: spec["layers"]["0"].update(bits=1),
        r"layer '0': bits: expected an integer in \[2, 8\], got 1",
    ),
    "nine bits": (lambda spec, tensors: spec["layers"]["0"].update(bits=9), r"layer '0': bits: .* got 9"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_files(edit, tmp_path):
    """Even with a digest that matches."""
    change, message = EDITS[edit]
    model = qnk.quantize_(nn.Sequential(nn.Linear(4, 4)), qnk.IntWeightOnlyConfig(3))
    qnk.save_compressed(model, tmp_path / "m")
    specification, tensors = container.read(tmp_path / "m")
    change(specification, tensors)
    container.write(tmp_path / "m", tensors, specification)
    with pytest.raises(ValueError, match=message):
        qnk.load_compressed(nn.Sequential(nn.Linear(4, 4)), tmp_path / "m")


def test_options_that_cannot_be():
    for bits in (1, 9, 3.0, True, None):
        with pytest.raises(ValueError, match=r"bits: expected an integer in \[2, 8\]"):
            qnk.IntWeightOnlyConfig(bits)
    message = r"layer '0': weight: expected an even number of columns to pack 3-bit codes, got shape \(2, 9\)"
    with pytest.raises(ValueError, match=message):
        qnk.quantize_(nn.Sequential(nn.Conv2d(1, 2, 3)), qnk.IntWeightOnlyConfig(3))
    assert qnk.Int8WeightOnlyConfig(16).group_size == qnk.Int4WeightOnlyConfig(16).group_size == 16
    assert (qnk.Int8StaticConfig().bits, qnk.Int4WeightOnlyConfig().bits) == (8, 4)
