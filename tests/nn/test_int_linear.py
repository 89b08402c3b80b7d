"""IntLinear: packing, decoding, forward and backward against float64 and against scalar noise in eval."""

import copy

import pytest
import torch
from torch import nn

from qnkernels.nn import Int4Linear, Int8Linear, IntLinear, NoisyLinear
from qnkernels.reference.int_linear import unpack

CASES = [(8, None, 7, 5), (8, None, 1, 1), (8, 4, 24, 3), (4, None, 10, 33), (4, 6, 18, 2), (4, 128, 256, 5)]


def error_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Bound on the fp32 error of x @ weight^T: n + 2 roundings of sums of absolute products."""
    unit = torch.finfo(torch.float32).eps
    return (x.shape[-1] + 2) * unit * (x.double().abs() @ weight.double().abs().t()) + 1e-30


@pytest.mark.parametrize(("bits", "group_size", "columns", "rows"), CASES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_and_decoding(bits, group_size, columns, rows, symmetric):
    torch.manual_seed(columns)
    linear = nn.Linear(columns, rows)
    layer = IntLinear.from_linear(linear, bits, group_size, symmetric)
    groups = columns // group_size if group_size else 1
    assert layer.weight_packed.dtype == torch.uint8 and layer.weight_packed.shape == (
        rows,
        columns * bits // 8,
    )
    assert layer.scale.dtype == torch.float32 and layer.scale.shape == (rows, groups)
    assert type(layer) is {8: Int8Linear, 4: Int4Linear}[bits]
    parts = linear.weight.detach().reshape(rows, groups, -1)
    if symmetric:
        assert layer.zero_point is None
        scale = parts.abs().amax(-1) / (2 ** (bits - 1) - 1)
        z = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        z = torch.round(-low / scale)
        assert torch.equal(layer.zero_point, z.to(torch.uint8))
    assert torch.equal(layer.scale, scale)
    codes = torch.round(parts / scale[..., None] + z[..., None]).clamp(0, 2**bits - 1)
    assert torch.equal(unpack(layer.weight_packed, bits), codes.reshape(rows, columns).to(torch.uint8))
    expected = ((codes - z[..., None]) * scale[..., None]).reshape(rows, columns)
    assert torch.equal(layer.weight, expected)
    assert (layer.weight - linear.weight).abs().max() <= scale.max() * 0.501 + (
        scale.max() if bits == 4 else 0
    )


@pytest.mark.parametrize(("bits", "group_size", "columns", "rows"), CASES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,), (17,)])
def test_forward_and_backward(bits, group_size, columns, rows, shape):
    torch.manual_seed(rows)
    linear = nn.Linear(columns, rows)
    layer = IntLinear.from_linear(linear, bits, group_size)
    x = torch.randn(*shape, columns, requires_grad=True)
    y = layer(x)
    weight = layer.weight
    exact = x.detach().double() @ weight.double().t() + linear.bias.detach().double()
    assert y.shape == (*shape, rows)
    assert ((y - exact).abs() <= error_bound(x.detach(), weight) + 1e-6 * exact.abs()).all()
    grad = torch.randn_like(y)
    y.backward(grad)
    bound = error_bound(grad, weight.t().contiguous())
    assert ((x.grad - grad.double() @ weight.double()).abs() <= bound).all()
    torch.testing.assert_close(layer.bias.grad, grad.reshape(-1, rows).sum(0))


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("observer", ["minmax", "histogram"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decodes_to_what_noise_uses_in_eval(per, observer, bits, dtype):
    torch.manual_seed(bits)
    linear = nn.Linear(16, 6, dtype=dtype)
    noisy = NoisyLinear.from_linear(linear, bits=bits, per=per, observer=observer).eval()
    layer = IntLinear.from_linear(noisy, bits, per=per, observer=observer)
    assert layer.weight.dtype == dtype and layer.bias is linear.bias
    assert torch.equal(layer.weight, noisy.noise(linear.weight))


def test_groups_decode_to_what_noise_uses_in_eval():
    linear = nn.Linear(24, 6)
    noisy = NoisyLinear.from_linear(linear, bits=4, per="group", group_size=8).eval()
    assert torch.equal(Int4Linear.from_linear(noisy, group_size=8).weight, noisy.noise(linear.weight))


def test_histogram_has_less_error_than_minmax_on_a_weight_with_an_outlier():
    torch.manual_seed(0)
    linear = nn.Linear(64, 4)
    with torch.no_grad():
        linear.weight[:, 0] = 2.0
    minmax, histogram = (Int4Linear.from_linear(linear, None, observer=o) for o in ("minmax", "histogram"))
    error = [(layer.weight - linear.weight).double().square().sum() for layer in (minmax, histogram)]
    assert error[1] < error[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    torch.manual_seed(1)
    layer = Int8Linear.from_linear(nn.Linear(31, 9, dtype=dtype))
    x = torch.randn(4, 31, dtype=dtype)
    exact = (
        x.double() @ ((unpack(layer.weight_packed, 8).double() - layer.zero_point) * layer.scale.double()).t()
    )
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), exact + layer.bias.double(), rtol=torch.finfo(dtype).eps, atol=1e-5
    )


def test_autocast_gives_the_dtype_of_nn_linear():
    linear = nn.Linear(8, 4)
    layer = Int8Linear.from_linear(linear)
    x = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == linear(x).dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_casting_keeps_codes_and_scales():
    layer = Int8Linear.from_linear(nn.Linear(8, 4))
    before = [tensor.clone() for tensor in layer.buffers()]
    assert layer.half() is layer
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(layer.buffers(), before, strict=True))
    assert layer.bias.dtype == layer.weight.dtype == layer(torch.randn(1, 8).half()).dtype == torch.float16


def test_deepcopy_and_state_dict_and_repr():
    torch.manual_seed(2)
    layer = Int4Linear.from_linear(nn.Linear(16, 4), group_size=8)
    other = copy.deepcopy(layer)
    assert other.weight_packed is not layer.weight_packed and torch.equal(other.weight, layer.weight)
    fresh = Int4Linear.from_linear(nn.Linear(16, 4), group_size=8)
    assert list(layer.state_dict()) == ["bias", "weight_packed", "scale", "zero_point"]
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, layer.weight)
    assert repr(layer) == "Int4Linear(in_features=16, out_features=4, bias=True, bits=4, group_size=8)"
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(4, 16)


@pytest.mark.parametrize(
    ("linear", "options", "message"),
    [
        (nn.Linear(8, 2), {"bits": 9}, r"bits: expected an integer in \[2, 8\], got 9"),
        (nn.Linear(7, 2), {"bits": 4}, r"weight: expected an even number of columns .*, got shape \(2, 7\)"),
        (
            nn.Linear(8, 2),
            {"group_size": 3},
            "group_size: expected a divisor of the 8 columns of weight, got 3",
        ),
        (nn.Linear(8, 2), {"group_size": 0}, "group_size: expected None or an integer of at least 1, got 0"),
        (nn.Linear(8, 2), {"observer": "ema_minmax"}, "observer: expected one of .*, got 'ema_minmax'"),
        (nn.Linear(8, 2), {"per": "group"}, "per: expected one of .*, got 'group'"),
        (
            nn.Linear(8, 2),
            {"per": "tensor", "group_size": 4},
            "group_size: expected None with per='tensor', got 4",
        ),
    ],
)
def test_refuses(linear, options, message):
    with pytest.raises(ValueError, match=message):
        IntLinear.from_linear(linear, **options)


def test_refuses_a_weight_that_cannot_be_quantized():
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match="weight: expected finite values, got 1 of 16 NaN or infinite"):
        Int8Linear.from_linear(linear)
    with pytest.raises(TypeError, match=r"weight: expected float32, bfloat16 or float16, got torch.float64"):
        Int8Linear.from_linear(linear.double())
