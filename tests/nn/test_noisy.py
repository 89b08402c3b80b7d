"""Noisy layers: what their forwards compute, and what they leave alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qnkernels import functional
from qnkernels.nn import NoisyConv2d, NoisyEmbedding, NoisyLinear

# (layer, input) of each kind, odd sizes
LAYERS = {
    "linear": lambda: (nn.Linear(24, 7), torch.randn(3, 5, 24)),
    "linear without bias": lambda: (nn.Linear(8, 1, bias=False), torch.randn(2, 8)),
    "embedding": lambda: (nn.Embedding(13, 16, padding_idx=4), torch.randint(0, 13, (2, 3))),
    "conv": lambda: (nn.Conv2d(4, 6, (2, 4), padding=1, groups=2), torch.randn(2, 4, 5, 7)),
    "conv, reflected": lambda: (
        nn.Conv2d(2, 3, (1, 4), padding="same", padding_mode="reflect"),
        torch.randn(2, 9, 9),
    ),
}
FROM = {
    nn.Linear: NoisyLinear.from_linear,
    nn.Embedding: NoisyEmbedding.from_embedding,
    nn.Conv2d: NoisyConv2d.from_conv2d,
}


def noisy(layer: nn.Module, noise: str = "scalar", **options) -> nn.Module:
    return FROM[type(layer)](layer, noise, **options)


def plain_forward(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The forward of a plain layer with another weight."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.copy_(weight)
    return twin(x)


def fully_quantized(weight: torch.Tensor, bits: int, per: str, group_size: int | None) -> torch.Tensor:
    """The quantizer of the paper, written out in plain torch, over the min and max of each part."""
    rows = weight.detach().reshape(len(weight), -1)
    parts = {"tensor": rows.reshape(1, -1), "channel": rows, "group": rows.reshape(-1, group_size or 1)}[per]
    low = parts.amin(1, keepdim=True).clamp(max=0)
    high = parts.amax(1, keepdim=True).clamp(min=0)
    s = (high - low) / (2**bits - 1)
    s = torch.where(s > 0, s, 1.0)
    z = torch.round(-low / s)
    codes = torch.round(parts / s + z).clamp(0, 2**bits - 1)
    return ((codes - z) * s).reshape(weight.shape)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("per", "group_size"), [("tensor", None), ("channel", None), ("group", 4)])
@pytest.mark.parametrize("bits", [2, 4, 8, 11])
def test_eval_is_the_plain_layer_with_the_quantized_weight(kind, per, group_size, bits):
    torch.manual_seed(bits)
    layer, x = LAYERS[kind]()
    state = torch.get_rng_state()
    y = noisy(layer, bits=bits, per=per, group_size=group_size).eval()(x)
    assert torch.equal(torch.get_rng_state(), state), "eval draws no random number"
    expected = plain_forward(layer, fully_quantized(layer.weight, bits, per, group_size), x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("noise", "options"),
    [
        ("scalar", {"bits": 4, "p": 0.5}),
        ("block", {"block_size": 4, "p": 0.3}),
        ("block", {"block_size": 4, "kind": "mean"}),
    ],
)
def test_weight_is_never_written(kind, noise, options):
    torch.manual_seed(1)
    layer, x = LAYERS[kind]()
    before = copy.deepcopy(layer.state_dict())
    module = noisy(layer, noise, **options)
    for _ in range(50):
        module(x).sum().backward()
    module.eval()
    module(x)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", LAYERS)
def test_training_quantizes_at_rate_p_with_a_straight_through_gradient(kind):
    torch.manual_seed(2)
    layer, x = LAYERS[kind]()
    module = noisy(layer, bits=3, p=0.5)
    torch.manual_seed(11)
    y = module(x)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**62, ())
    low, high = functional.minmax(layer.weight.detach())
    scale, zero_point = functional.quantization_parameters(low, high, 3)
    rows = layer.weight.detach().flatten(1)
    weight = functional.fake_quantize(rows, scale, zero_point, 3, p=0.5, seed=seed).view_as(layer.weight)
    torch.testing.assert_close(y, plain_forward(layer, weight, x), rtol=0, atol=0)
    grad = torch.randn_like(y)
    y.backward(grad)
    # a zero point is rounded, so that the outermost weights may lie outside the range: no gradient there
    inside = (rows >= -zero_point * scale) & (rows <= (7 - zero_point) * scale)
    far = torch.full_like(rows, 1e9)
    noised = functional.fake_quantize(far, scale, zero_point, 3, p=0.5, seed=seed) != far
    passed = (inside | ~noised).view_as(layer.weight)
    plain = copy.deepcopy(layer)
    plain.zero_grad()
    with torch.no_grad():
        plain.weight.copy_(weight)
    plain(x).backward(grad)
    torch.testing.assert_close(module.weight.grad, plain.weight.grad * passed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_rate_is_realised(p):
    torch.manual_seed(3)
    module = NoisyLinear.from_linear(nn.Linear(256, 256), bits=2, p=p)
    noised = module.noise(module.weight)
    rate = (noised != module.weight).double().mean().item()
    # 65536 draws: four standard deviations
    assert abs(rate - p) <= 4 * (p * (1 - p) / 65536) ** 0.5


def test_block_noise_zeroes_whole_blocks_and_rescales_the_rest():
    torch.manual_seed(4)
    conv = nn.Conv2d(6, 5, 3)
    module = NoisyConv2d.from_conv2d(conv, "block", block_size=9, p=0.4)
    ratio = (module.noise(conv.weight) / conv.weight).detach().reshape(5, 6, 9)
    dropped = ratio[..., 0] == 0
    assert 0 < dropped.sum() < 30
    expected = torch.where(dropped, 0.0, 1 / 0.6)[..., None].expand_as(ratio)
    torch.testing.assert_close(ratio, expected)
    module.eval()
    assert module.noise(conv.weight) is conv.weight


def test_block_noise_by_the_mean():
    torch.manual_seed(5)
    linear = nn.Linear(12, 9)
    module = NoisyLinear.from_linear(linear, "block", block_size=4, p=0.5, kind="mean")
    blocks, noised = (
        linear.weight.detach().reshape(9, 3, 4),
        module.noise(linear.weight).detach().reshape(9, 3, 4),
    )
    changed = (noised != blocks).any(-1)
    assert 0 < changed.sum() < 27
    mean = blocks.mean(-1, keepdim=True).expand_as(blocks)
    torch.testing.assert_close(noised, torch.where(changed[..., None], mean, blocks))


def test_per_channel_means_the_output_axis():
    weight = torch.randn(3, 5) * torch.tensor([[1e-3], [1.0], [1e3]])
    linear = nn.Linear(5, 3)
    with torch.no_grad():
        linear.weight.copy_(weight)
    module = NoisyLinear.from_linear(linear, bits=8, per="channel").eval()
    error = (module.noise(linear.weight) - weight).abs().amax(1)
    step = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)) / 255
    assert (error <= step / 2 * 1.001).all()


@pytest.mark.parametrize("bits", range(2, 17))
def test_error_shrinks_with_bits_as_expected(bits):
    torch.manual_seed(bits)
    linear = nn.Linear(300, 200)
    module = NoisyLinear.from_linear(linear, bits=bits).eval()
    error = (module.noise(linear.weight) - linear.weight).double().square().mean().sqrt()
    step = (linear.weight.max() - linear.weight.min()).double() / (2**bits - 1)
    # the rounding error of weights spread evenly over the range is uniform over a step
    assert error.item() == pytest.approx(step.item() / 12**0.5, rel=0.02)


@pytest.mark.parametrize("observer", ["minmax", "ema_minmax", "histogram"])
def test_eval_is_on_the_grid_even_where_weights_left_the_range(observer):
    torch.manual_seed(6)
    module = NoisyLinear.from_linear(nn.Linear(40, 30), bits=4, observer=observer)
    module(torch.randn(2, 40))
    with torch.no_grad():
        module.weight.mul_(3)
    module.eval()
    weight = module.noise(module.weight)
    assert len(weight.unique()) <= 16
    steps = weight / weight.unique().diff().min()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_padding_row_stays_zero():
    torch.manual_seed(7)
    embedding = nn.Embedding(9, 8, padding_idx=2)
    for module in (
        noisy(embedding, bits=2, p=1.0),
        noisy(embedding, "block", block_size=4, kind="mean", p=0.9),
    ):
        assert torch.equal(module(torch.tensor([2, 2])), torch.zeros(2, 8))
        module.zero_grad()
        module(torch.tensor([2, 3])).sum().backward()
        assert torch.equal(module.weight.grad[2], torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_dtypes(kind, dtype):
    torch.manual_seed(8)
    layer, x = LAYERS[kind]()
    layer = layer.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    module = noisy(layer, bits=5, per="channel", activations=True, p_activations=0.5)
    y = module(x)
    assert y.dtype == dtype and y.isfinite().all()
    y.sum().backward()
    assert module.weight.grad.dtype == dtype
    module.eval()
    assert module(x).dtype == dtype


def test_casting_a_model_leaves_the_ranges_in_fp32():
    module = NoisyLinear.from_linear(nn.Linear(8, 4), activations=True)
    module(torch.randn(2, 8))
    low, bits = module.noise.low.clone(), module.noise.bits
    module.bfloat16()
    assert module.weight.dtype == torch.bfloat16
    assert module.noise.low.dtype == module.activation_noise.high.dtype == torch.float32
    assert module.noise.bits is bits and torch.equal(module.noise.low, low)
    assert module.eval()(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LAYERS)
def test_empty_batch(kind):
    layer, x = LAYERS[kind]()
    module = noisy(layer, activations=True)
    empty = x[:0] if x.dim() != 3 or kind != "conv, reflected" else x[None][:0]
    for training in (True, False):
        module.train(training)
        y = module(empty)
        assert y.shape == layer(empty).shape and y.numel() == 0
    assert module.activation_noise.step == 0


def test_non_contiguous_weight():
    linear = nn.Linear(6, 10)
    linear.weight = nn.Parameter(torch.randn(6, 10).t())
    module = NoisyLinear.from_linear(linear, bits=4, per="group", group_size=3).eval()
    expected = fully_quantized(linear.weight.contiguous(), 4, "group", 3)
    assert torch.equal(module.noise(linear.weight), expected)
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    module = NoisyConv2d.from_conv2d(conv, bits=4, per="group", group_size=9).eval()
    assert torch.equal(module.noise(conv.weight), fully_quantized(conv.weight.contiguous(), 4, "group", 9))


def test_from_shares_parameters_and_leaves_the_original():
    linear = nn.Linear(8, 4)
    hook = linear.register_forward_hook(lambda *_: pytest.fail("the hook belongs to the original"))
    module = NoisyLinear.from_linear(linear, bits=4)
    assert type(linear) is nn.Linear and not hasattr(linear, "noise")
    assert module.weight is linear.weight and module.bias is linear.bias
    assert list(module.state_dict()) == ["weight", "bias"]
    assert (module.in_features, module.out_features, module.training) == (8, 4, True)
    module(torch.randn(1, 8))
    hook.remove()
    with pytest.raises(TypeError, match="expected Linear itself, got Bilinear"):
        NoisyLinear.from_linear(nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize(
    ("noisy_class", "arguments"),
    [(NoisyLinear, (24, 7)), (NoisyEmbedding, (13, 16, 2)), (NoisyConv2d, (4, 6, 3))],
)
def test_built_anew_with_default_noise(noisy_class, arguments):
    torch.manual_seed(12)
    module = noisy_class(*arguments)
    torch.manual_seed(12)
    plain = noisy_class.PLAIN(*arguments)
    assert torch.equal(module.weight, plain.weight) and list(module.state_dict()) == list(plain.state_dict())
    assert (module.noise.bits, module.noise.p, module.activation_noise) == (8, 0.5, None)


def test_changing_bits_between_forward_and_backward_keeps_the_gradient_of_the_forward():
    torch.manual_seed(9)
    linear = nn.Linear(16, 8)
    module = NoisyLinear.from_linear(linear, bits=8, p=1.0)
    module(torch.randn(4, 16))
    with torch.no_grad():
        module.weight.mul_(2)  # half of the weights are outside the stored range from here on
    x = torch.randn(4, 16)
    y = module(x)
    module.noise.bits.fill_(2)
    y.sum().backward()
    bound = module.noise.low, module.noise.high
    scale, zero_point = functional.quantization_parameters(*bound, 8)
    weight = module.weight.detach()
    inside = (weight >= -zero_point * scale) & (weight <= (255 - zero_point) * scale)
    torch.testing.assert_close(module.weight.grad, x.sum(0).expand(8, 16) * inside)
    assert 0 < inside.sum() < inside.numel()


def test_autocast_writes_the_weight_in_the_autocast_dtype():
    torch.manual_seed(10)
    module = NoisyLinear.from_linear(nn.Linear(12, 6), bits=4).eval()
    x = torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    weight = module.noise(module.weight).bfloat16()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16(), weight, module.bias.bfloat16()))
