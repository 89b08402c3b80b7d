"""IntLinear with quantized activations: exact integers, gradients, state, compilation, adapters."""

import copy

import pytest
import torch
from helpers_int_linear import Packed, assert_within, exact_quantized
from numeric import DTYPES, assert_identical
from torch import nn
from torch.nn.utils import parametrize

import qnkernels as qnk
from qnkernels.nn import Int4Linear, Int8Linear, IntLinear

STATIC = dict(activations="static", x_scale=0.0125, x_zero_point=97.0)  # [-1.2125, 1.975]: cuts at both ends
MODES = {"dynamic": dict(activations="dynamic"), "static": STATIC}
# bits, group_size, symmetric, in, out
CASES = [
    *[(8, None, False, 7, 5), (8, None, True, 1, 1), (8, 4, False, 24, 3), (4, None, False, 10, 33)],
    *[(4, 6, True, 18, 2), (4, 128, False, 256, 5)],
]


def as_packed(layer: IntLinear) -> Packed:
    return Packed(layer.weight_packed, layer.scale, layer.zero_point, layer.bits)


def quantizer(mode: str) -> tuple[float, float] | None:
    return (STATIC["x_scale"], STATIC["x_zero_point"]) if mode == "static" else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "columns", "rows"), CASES)
@pytest.mark.parametrize("mode", MODES)
def test_forward_is_the_exact_integer_product(mode, bits, group_size, symmetric, columns, rows, dtype):
    torch.manual_seed(columns)
    linear = nn.Linear(columns, rows, dtype=dtype)
    layer = IntLinear.from_linear(linear, bits, group_size, symmetric, **MODES[mode])
    assert type(layer) is {8: Int8Linear, 4: Int4Linear}[bits] and layer.activations == mode
    for shape in ((), (1,), (3, 2), (0,), (17,)):
        x = torch.randn(*shape, columns).to(dtype)
        y = layer(x)
        assert y.shape == (*shape, rows) and y.dtype == dtype
        if not y.numel():
            continue
        exact = exact_quantized(x.reshape(-1, columns), as_packed(layer), linear.bias, quantizer(mode))
        assert_within(y.reshape(-1, rows), exact.value, exact.bound)
        if exact.rounded is not None:
            assert_identical(y.detach().reshape(-1, rows), exact.rounded)


@pytest.mark.parametrize("mode", ["float", *MODES])
def test_backward_is_that_of_the_decoded_weight(mode):
    """Straight through the rounding of x; stopped outside a given range."""
    torch.manual_seed(1)
    layer = Int8Linear.from_linear(nn.Linear(13, 6), **MODES.get(mode, {}))
    x = (2 * torch.randn(4, 5, 13)).requires_grad_()
    grad = torch.randn(4, 5, 6)
    layer(x).backward(grad)
    expected = grad.double() @ layer.weight.double()
    if mode == "static":
        low, high = -97.0 * layer.x_scale, 158.0 * layer.x_scale
        outside = (x < low) | (x > high)
        assert 0 < outside.sum() < x.numel()
        expected[outside] = 0
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


class Adapted(nn.Module):
    """A low-rank adapter beside a frozen layer."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("mode", ["float", *MODES])
@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_train_on_a_frozen_quantized_model(mode, bits):
    torch.manual_seed(2)
    bases = [nn.Linear(16, 24), nn.Linear(24, 3)]
    options = MODES.get(mode, {})
    layers = [IntLinear.from_linear(base, bits, **options) for base in bases]
    model = nn.Sequential(Adapted(layers[0], 4), nn.Tanh(), Adapted(layers[1], 4))
    frozen = copy.deepcopy([layer.state_dict() for layer in layers])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    x, target = torch.randn(32, 16), torch.randn(32, 3)
    optimizer = torch.optim.Adam(trained, 0.02)
    losses = []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for layer, before in zip(layers, frozen, strict=True):
        assert layer.bias.grad is None
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_autocast_and_casts(mode):
    torch.manual_seed(3)
    layer = Int8Linear.from_linear(nn.Linear(8, 4), **MODES[mode])
    x = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert_identical(y, layer(x.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.half()
    assert layer.weight.dtype == layer(x.half()).dtype == torch.float16
    for name, buffer in layer.named_buffers():
        assert_identical(buffer, buffers[name])


@pytest.mark.parametrize("mode", MODES)
def test_deepcopy_state_dict_and_repr(mode):
    torch.manual_seed(4)
    layer = Int8Linear.from_linear(nn.Linear(6, 4), symmetric=True, **MODES[mode])
    static = ["x_scale", "x_zero_point"] if mode == "static" else []
    state = layer.state_dict()
    assert list(state) == ["bias", "weight_packed", "scale", *static]
    if static:
        assert layer.x_scale.shape == layer.x_zero_point.shape == ()
        assert layer.x_scale.dtype == layer.x_zero_point.dtype == torch.float32
    other = dict(STATIC, x_scale=0.5, x_zero_point=3) if static else MODES[mode]
    fresh = Int8Linear.from_linear(nn.Linear(6, 4), symmetric=True, **other)
    fresh.load_state_dict(state)
    x = torch.randn(3, 6)
    assert_identical(fresh(x), layer(x))
    assert_identical(copy.deepcopy(layer)(x), layer(x))
    assert repr(layer) == (
        f"Int8Linear(in_features=6, out_features=4, bias=True, bits=8, symmetric=True, activations={mode})"
    )


@pytest.mark.parametrize("mode", ["float", *MODES])
def test_export(mode):
    torch.manual_seed(5)
    model = nn.Sequential(Int8Linear.from_linear(nn.Linear(6, 4), **MODES.get(mode, {})), nn.ReLU()).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(3, 6),), dynamic_shapes=({0: batch},))
    for rows in (1, 2, 9):
        x = torch.randn(rows, 6)
        assert_identical(program.module()(x), model(x).detach())


def test_compiles_whole_with_the_default_compiler():
    torch.manual_seed(6)
    torch._dynamo.reset()
    layers = [Int8Linear.from_linear(nn.Linear(8, 8), **options) for options in MODES.values()]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert_identical(torch.compile(model, fullgraph=True)(x), model(x))
    torch._dynamo.reset()


def test_tied_weights_share_codes_and_keep_their_own_quantizers():
    torch.manual_seed(7)
    model = nn.ModuleDict({"table": nn.Embedding(12, 8), "a": nn.Linear(8, 12), "b": nn.Linear(8, 12)})
    model["a"].weight = model["b"].weight = model["table"].weight
    with qnk.calibrate(model, observer="minmax"):
        model["a"](torch.randn(3, 8))
        model["b"](9 * torch.randn(3, 8))
    qnk.quantize_(model, qnk.Int8StaticConfig())
    for turned in (model, copy.deepcopy(model), model.half()):
        assert turned["a"].weight_packed is turned["b"].weight_packed is turned["table"].weight_packed
        assert turned["a"].x_scale < turned["b"].x_scale


def test_a_bias_that_is_no_parameter_of_the_layer():
    class Twice(nn.Module):
        def forward(self, bias: torch.Tensor) -> torch.Tensor:
            return 2 * bias

    layer = Int8Linear.from_linear(nn.Linear(6, 4))
    x = torch.randn(3, 6)
    expected = layer(x) + layer.bias
    parametrize.register_parametrization(layer, "bias", Twice())
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activations": "int8"},
            r"activations: expected one of \('float', 'dynamic', 'static'\), got 'int8'",
        ),
        ({"activations": "static"}, "x_scale: expected a number with activations='static', got None"),
        (
            {"activations": "static", "x_scale": 1.0},
            "x_zero_point: expected a number with activations='static', got None",
        ),
        (
            {"activations": "dynamic", "x_scale": 1.0},
            "x_scale: expected None with activations='dynamic', got 1.0",
        ),
        ({"x_zero_point": 7}, "x_zero_point: expected None with activations='float', got 7"),
        ({**STATIC, "x_scale": 0.0}, "x_scale: expected a finite positive value, got 0.0"),
        ({**STATIC, "x_scale": float("inf")}, "x_scale: expected a finite positive value, got inf"),
        ({**STATIC, "x_scale": torch.ones(2)}, r"x_scale: expected a number or a 0-d .*, got shape \(2,\)"),
        ({**STATIC, "x_zero_point": 256}, r"x_zero_point: expected an integer in \[0, 255\], got 256.0"),
        ({**STATIC, "x_zero_point": 1.5}, r"x_zero_point: expected an integer in \[0, 255\], got 1.5"),
        ({**STATIC, "x_zero_point": float("nan")}, r"x_zero_point: expected an integer .*, got nan"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        IntLinear.from_linear(nn.Linear(4, 2), **options)
