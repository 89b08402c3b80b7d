"""IntConv2d: nn.Conv2d over decoded filters, and over integer patches where activations are quantized."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers_int_linear import Packed, assert_within, exact_quantized
from numeric import DTYPES, assert_identical, relative_error
from torch import nn

import qnkernels as qnk
from qnkernels.nn import IntConv2d, NoisyConv2d, int_conv2d

STATIC = dict(activations="static", x_scale=0.0125, x_zero_point=97.0)
MODES = {"dynamic": dict(activations="dynamic"), "static": STATIC}
CONVS = {
    "3x3": dict(padding=1),
    "even and dilated, same": dict(kernel_size=(2, 3), padding="same", dilation=(1, 2)),
    "strided, reflected, without bias": dict(stride=2, padding=1, padding_mode="reflect", bias=False),
    "1x1": dict(kernel_size=1),
    "1x1, strided and padded": dict(kernel_size=1, stride=(2, 3), padding=(0, 1)),
    "groups": dict(groups=2, padding=(0, 2)),
    "depthwise": dict(groups=4, out_channels=8, padding=1),
}
PACKINGS = {"int8": (8, None, False), "int4": (4, None, False), "int8 groups, symmetric": (8, 2, True)}
INPUTS = [(2, 4, 8, 7), (4, 5, 9), (0, 4, 6, 6), (1, 4, 3, 3)]


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **CONVS[kind]}
    return nn.Conv2d(**options, dtype=dtype)


CASES = [
    (kind, packing) for kind in CONVS for packing in PACKINGS if kind != "depthwise" or packing == "int8"
]


def convert(kind: str, packing: str, dtype: torch.dtype = torch.float32, **options) -> IntConv2d:
    return IntConv2d.from_conv2d(make(kind, dtype), *PACKINGS[packing], **options)


def exact_conv(layer: IntConv2d, x: torch.Tensor) -> torch.Tensor:
    """nn.Conv2d with the decoded filters, in float64."""
    conv = make_twin(layer).double()
    return conv(x.double())


def make_twin(layer: IntConv2d) -> nn.Conv2d:
    twin = nn.Conv2d(
        *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding),
        *(layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode),
    )
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


@pytest.mark.parametrize(("kind", "packing"), CASES)
def test_float_activations_against_float64(kind, packing, monkeypatch):
    """Both ways of computing it, for few positions and for many, in the forward and in the backward."""
    torch.manual_seed(1)
    layer = convert(kind, packing)
    assert layer.weight.shape == make(kind).weight.shape
    for shape in INPUTS:
        x, grad = torch.randn(shape), None
        for few in (0.0, 1e9):
            monkeypatch.setattr(int_conv2d, "POSITIONS_PER_FILTER", few)
            a, b = x.clone().requires_grad_(), x.double().requires_grad_()
            y, expected = layer(a), exact_conv(layer, b)
            assert y.shape == expected.shape and y.is_contiguous() and y.dtype == torch.float32
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
            grad = torch.randn_like(y) if grad is None else grad
            y.backward(grad)
            expected.backward(grad.double())
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)
    if layer.bias is not None:
        assert layer.bias.grad.isfinite().all() and layer.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "packing"), CASES)
def test_quantized_activations_are_exact_integer_products_of_patches(kind, packing, mode):
    torch.manual_seed(2)
    layer = convert(kind, packing, **MODES[mode])
    quantizer = (STATIC["x_scale"], STATIC["x_zero_point"]) if mode == "static" else None
    twin, groups = make_twin(layer), layer.groups
    for shape in INPUTS:
        x = torch.randn(shape)
        y = layer(x)
        assert y.shape == twin(x).shape and y.is_contiguous()
        if not y.numel():
            continue
        padding = "constant" if twin.padding_mode == "zeros" else twin.padding_mode
        images = F.pad(x.reshape(-1, *x.shape[-3:]), twin._reversed_padding_repeated_twice, padding)
        patches = F.unfold(images, twin.kernel_size, twin.dilation, 0, twin.stride).transpose(1, 2)
        rows = y.detach().reshape(len(images), layer.out_channels, -1).transpose(1, 2).flatten(0, 1)
        parts = (layer.weight_packed, layer.scale, layer.zero_point, layer.bias)
        chunks = [[None] * groups if part is None else part.chunk(groups) for part in parts]
        columns = patches.flatten(0, 1).chunk(groups, 1)
        for actual, part, weight, scale, zero, bias in zip(
            rows.chunk(groups, 1), columns, *chunks, strict=True
        ):
            exact = exact_quantized(part, Packed(weight, scale, zero, layer.bits), bias, quantizer)
            assert_within(actual, exact.value, exact.bound)
            if exact.rounded is not None:
                assert_identical(actual, exact.rounded)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["3x3", "1x1", "groups"])
def test_gradients_with_quantized_activations(kind, mode):
    """Those of the convolution with the decoded filters; of x none from outside the range."""
    torch.manual_seed(3)
    layer = convert(kind, "int8", **MODES[mode])
    twin = make_twin(layer)
    a = (2 * torch.randn(2, 4, 6, 5)).requires_grad_()
    b = a.detach().clone().requires_grad_()
    y, expected = layer(a), twin(b)
    assert relative_error(y, expected) < (0.02 if mode == "dynamic" else 1)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    if mode == "static":
        outside = (a < -97 * layer.x_scale) | (a > 158 * layer.x_scale)
        assert 0 < outside.sum() < a.numel()
        b.grad[outside] = 0
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_images_in_parts_give_the_same(mode, monkeypatch):
    torch.manual_seed(4)
    layer, x = convert("3x3", "int8", **MODES[mode]), torch.randn(5, 4, 6, 6)
    whole = layer(x)
    for elements in (1, 2 * 36 * 36, 4 * 36 * 36 + 7):
        monkeypatch.setattr(int_conv2d, "PATCH_ELEMENTS", elements)
        assert_identical(layer(x), whole)


def test_memory_layout_follows_the_input():
    layer = convert("3x3", "int8", activations="dynamic")
    x = torch.randn(2, 4, 6, 6)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert layer(x).is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert_identical(last, layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["float", *MODES])
def test_dtypes_casts_and_autocast(mode, dtype):
    torch.manual_seed(5)
    layer = convert("3x3", "int8", dtype, **MODES.get(mode, {}))
    x = torch.randn(2, 4, 6, 6).to(dtype)
    y = layer(x)
    assert y.dtype == layer.weight.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps if mode == "float" else 1
    assert relative_error(y, exact_conv(layer, x)) < tolerance
    scale = layer.scale.clone()
    layer.bfloat16()
    assert layer.weight.dtype == layer(x.bfloat16()).dtype == torch.bfloat16
    assert_identical(layer.scale, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_decodes_to_what_noise_uses_in_eval(bits, per):
    torch.manual_seed(6)
    conv = make("3x3")
    noisy = NoisyConv2d.from_conv2d(conv, bits=bits, per=per).eval()
    layer = IntConv2d.from_conv2d(noisy, bits, per=per)
    assert_identical(layer.weight, noisy.noise(conv.weight).detach())
    assert layer.bias is conv.bias and not layer.training


@pytest.mark.parametrize("mode", ["float", *MODES])
def test_deepcopy_state_dict_repr_and_export(mode):
    torch.manual_seed(7)
    layer = convert("3x3", "int4", **MODES.get(mode, {})).eval()
    x = torch.randn(2, 4, 6, 6)
    assert_identical(copy.deepcopy(layer)(x), layer(x))
    fresh = convert("3x3", "int4", **MODES.get(mode, {}))
    fresh.load_state_dict(layer.state_dict())
    assert_identical(fresh(x), layer(x))
    assert repr(layer) == (
        "IntConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bits=4"
        + ("" if mode == "float" else f", activations={mode}")
        + ")"
    )
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(nn.Sequential(layer), (x,), dynamic_shapes=shapes).module()
    for batch in (1, 5):
        x = torch.randn(batch, 4, 6, 6)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-5, atol=1e-5)


def test_references_and_geometry_stay_when_a_model_is_quantized():
    torch.manual_seed(8)
    model = nn.Sequential(make("even and dilated, same"), nn.ReLU(), nn.Conv2d(6, 4, 1))
    x = torch.randn(2, 4, 6, 6)
    plain, convs, calls = model(x), list(model), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    qnk.quantize_(model, qnk.Int8DynamicConfig())
    assert list(model) == convs and type(model[0]) is type(model[2]) is IntConv2d
    assert model[0].padding == "same" and model[0].stride == (1, 1)
    assert relative_error(model(x), plain) < 0.02 and calls == [1]


def test_refuses():
    with pytest.raises(ValueError, match=r"weight: expected an even number of columns .* shape \(3, 9\)"):
        IntConv2d.from_conv2d(nn.Conv2d(1, 3, 3), bits=4)
    with pytest.raises(ValueError, match="group_size: expected a divisor of the 9 columns"):
        IntConv2d.from_conv2d(nn.Conv2d(1, 3, 3), group_size=4)
    with pytest.raises(ValueError, match=r"x: expected \[batch, 4, h, w\] or .*, got shape \(2, 3, 4, 4\)"):
        convert("3x3", "int8")(torch.randn(2, 3, 4, 4))
