"""Layers that train in low precision: what a forward and backward compute, and that they are drop-in."""

import copy

import pytest
import torch
from numeric import assert_identical
from torch import nn
from torch.utils.checkpoint import checkpoint

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.nn import NoisyConv2d, NoisyEmbedding, NoisyLinear
from qnkernels.nn.precision import TrainingPrecision


def linear(**options) -> NoisyLinear:
    torch.manual_seed(0)
    return NoisyLinear.from_linear(nn.Linear(12, 7), "precision", **options)


def quantized_grad(grad, bits, seed):
    """The gradient as the layer quantizes it; torch's generator gives the seed, as in the forward."""
    torch.manual_seed(seed)
    seed = torch.randint(0, 2**62, ())
    return F.dynamic_fake_quantize(grad, bits, per_sample=True, stochastic=True, seed=seed)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("input_range", ["moving", "sample", None])
def test_a_step_of_linear(input_range, per):
    layer = linear(bits=4, grad_bits=5, input_range=input_range, per=per)
    x = torch.randn(3, 8, 12, requires_grad=True)
    grad = torch.randn(3, 8, 7)
    torch.manual_seed(1)
    layer(x).backward(grad)
    quantized = x.detach()
    if input_range == "moving":  # the first forward takes the range of its input
        quantized = F.fake_quantize(x.detach(), *F.quantization_parameters(*F.minmax(x.detach()), 4), 4)
    elif input_range == "sample":
        quantized = F.dynamic_fake_quantize(x.detach(), 4, per_sample=True)
    weight = F.dynamic_fake_quantize(layer.weight.detach(), 4, per_sample=per == "channel")
    coarse = quantized_grad(grad, 5, 1)
    torch.testing.assert_close(layer.weight.grad, coarse.flatten(0, 1).t() @ quantized.flatten(0, 1))
    torch.testing.assert_close(layer.bias.grad, coarse.sum((0, 1)))
    expected = coarse @ weight
    inside = torch.ones_like(expected, dtype=torch.bool)
    if input_range == "moving":  # a rounded zero point may leave out the outermost values
        scale, zero_point = F.quantization_parameters(*F.minmax(x.detach()), 4)
        inside = (x >= (0.0 - zero_point) * scale) & (x <= (15 - zero_point) * scale)
    torch.testing.assert_close(x.grad, expected * inside)
    torch.testing.assert_close(layer(x.detach()), nn.functional.linear(quantized, weight, layer.bias))


def test_a_step_of_conv2d():
    torch.manual_seed(0)
    layer = NoisyConv2d.from_conv2d(nn.Conv2d(4, 6, 3, groups=2), "precision", bits=5, grad_bits=4)
    x, grad = torch.randn(2, 4, 9, 9, requires_grad=True), torch.randn(2, 6, 7, 7)
    torch.manual_seed(1)
    y = layer(x)
    y.backward(grad)
    quantized = F.fake_quantize(x.detach(), *F.quantization_parameters(*F.minmax(x.detach()), 5), 5)
    weight = F.dynamic_fake_quantize(layer.weight.detach(), 5, per_sample=True).requires_grad_()
    expected = nn.functional.conv2d(quantized.requires_grad_(), weight, layer.bias, groups=2)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(expected, (weight, quantized), quantized_grad(grad, 4, 1))
    torch.testing.assert_close(layer.weight.grad, grads[0])
    some = x.grad != 0  # outermost values may be cut off
    torch.testing.assert_close(x.grad[some], grads[1][some])
    assert some.float().mean() > 0.95


def test_a_step_of_embedding():
    torch.manual_seed(0)
    layer = NoisyEmbedding.from_embedding(nn.Embedding(9, 5, padding_idx=2), "precision", bits=3, grad_bits=4)
    tokens, grad = torch.tensor([[1, 2, 8], [8, 0, 1]]), torch.randn(2, 3, 5)
    torch.manual_seed(1)
    y = layer(tokens)
    y.backward(grad)
    weight = F.dynamic_fake_quantize(layer.weight.detach(), 3, per_sample=True).requires_grad_()
    expected = nn.functional.embedding(tokens, weight, 2)
    assert_identical(y, expected)
    (grad_weight,) = torch.autograd.grad(expected, weight, quantized_grad(grad, 4, 1))
    torch.testing.assert_close(layer.weight.grad, grad_weight)


def test_the_gradient_of_32_bits_is_the_gradient():
    layer = linear(bits=8, grad_bits=32, input_range=None)
    x, grad = torch.randn(5, 12), torch.randn(5, 7)
    torch.manual_seed(3)
    layer(x).backward(grad)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert_identical(after, torch.rand(1))  # nothing was drawn
    assert_identical(layer.weight.grad, grad.t() @ x)


def test_moving_range_follows_the_input_and_eval_keeps_it():
    layer = linear(bits=8, momentum=0.5)
    for scale in (1.0, 3.0):
        layer(torch.full((2, 12), scale))
    assert layer.noise.moving.high == 2.0
    layer.eval()
    x = torch.linspace(-1, 4, 24).view(2, 12)
    expected = F.fake_quantize(x, *F.quantization_parameters(torch.tensor(0.0), torch.tensor(2.0), 8), 8)
    weight = F.dynamic_fake_quantize(layer.weight.detach(), 8, per_sample=True)
    torch.testing.assert_close(layer(x), nn.functional.linear(expected, weight, layer.bias))
    assert layer.noise.moving.step == 2 and layer.noise.moving.high == 2.0


def test_precision_changes_at_once_and_between_forward_and_backward():
    layer = linear(bits=2, grad_bits=8)
    x = torch.randn(4, 12, requires_grad=True)
    y = layer(x)
    layer.noise.set_bits(8)
    y.sum().backward()  # with the mask of 2 bits
    fine = layer(x.detach())
    assert len(layer.noise(layer.weight).unique()) > 4
    assert not torch.allclose(y, fine, atol=1e-3)
    assert "bits=8, grad_bits=8, input_range='moving'" in repr(layer)


def test_state_dict_and_reversal():
    plain = nn.Sequential(nn.Linear(4, 8), nn.Embedding(3, 4), nn.Conv2d(1, 2, 3))
    keys = list(plain.state_dict())
    model = qnk.quantize_(copy.deepcopy(plain), qnk.CyclicPrecisionConfig(bits=5))
    assert list(model.state_dict()) == keys
    assert [type(layer) for layer in model] == [NoisyLinear, NoisyEmbedding, NoisyConv2d]
    model.load_state_dict(plain.state_dict())
    qnk.remove_noise_(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Embedding, nn.Conv2d]
    x = torch.randn(2, 4)
    assert_identical(model[0](x), plain[0](x))


def test_it_can_be_packed():
    model = qnk.quantize_(nn.Sequential(nn.Linear(16, 8)), qnk.CyclicPrecisionConfig(bits=8))
    weight = model[0].noise(model[0].weight).detach()
    qnk.quantize_(model, qnk.Int8WeightOnlyConfig())
    torch.testing.assert_close(model[0].weight, weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_forward(reentrant):
    """The repeated forward sees the range of the first, moves nothing, and draws the same seeds."""
    x = torch.randn(6, 12)

    def step(wrapped: bool):
        conv = NoisyConv2d.from_conv2d(nn.Conv2d(1, 1, 3, padding=1), "precision", bits=4, grad_bits=4)
        scalar = NoisyLinear.from_linear(nn.Linear(7, 7), "scalar", bits=2, p=0.5)
        layer = nn.Sequential(linear(bits=4, grad_bits=4), scalar, nn.Unflatten(0, (1, 1, 6)), conv)
        torch.manual_seed(5)
        inputs = x.clone().requires_grad_()
        y = checkpoint(layer, inputs, use_reentrant=reentrant) if wrapped else layer(inputs)
        y.square().sum().backward()
        assert conv.noise.moving.step == 1
        moving = layer[0].noise.moving
        return [p.grad for p in layer.parameters()], moving.step.item(), moving.low.clone()

    torch.manual_seed(9)
    expected = step(False)
    torch.manual_seed(9)
    actual = step(True)
    assert actual[1] == expected[1] == 1
    assert_identical(actual[2], expected[2])
    # seeds: those of the first forward; one was drawn again for the gradient, in the same place
    for one, other in zip(actual[0], expected[0], strict=True):
        assert_identical(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_models(dtype):
    layer = linear(bits=4)
    x = torch.randn(3, 12, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()
    half = linear(bits=4).to(dtype)
    assert half.noise.moving.low.dtype == torch.float32
    assert half(x.detach().to(dtype)).dtype == dtype


def test_compiles_once_for_every_precision():
    count = 0

    def backend(graph, _):
        nonlocal count
        count += 1
        return graph

    model = nn.Sequential(linear(bits=3), nn.ReLU(inplace=True), NoisyLinear(7, 3))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(4, 12)
    for bits in (3, 5, 8):
        results = []
        for one, call in ((model, compiled), (eager, eager)):
            one[0].noise.set_bits(bits)
            one.zero_grad()
            torch.manual_seed(bits)
            call(x).square().sum().backward()
            results.append([*(p.grad.clone() for p in one.parameters()), one[0].noise.moving.high.clone()])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert count == 1


def test_evaluation_draws_nothing():
    layer = linear().eval()
    torch.manual_seed(4)
    with torch.no_grad():
        layer(torch.randn(2, 12, generator=torch.Generator().manual_seed(0)))
    after = torch.rand(1)
    torch.manual_seed(4)
    assert_identical(after, torch.rand(1))


def test_an_empty_batch():
    layer = linear()
    layer(torch.empty(0, 12)).sum().backward()
    assert layer.noise.moving.step == 0
    assert layer.weight.grad.eq(0).all()


def test_bad_options_are_named():
    for options, message in (
        (dict(bits=1), r"bits: expected an integer in \[2, 16\], got 1"),
        (dict(grad_bits=20), r"grad_bits: expected an integer in \[2, 16\], got 20"),
        (dict(input_range="token"), "input_range: expected None or one of"),
        (dict(per="group"), "per: expected one of"),
        (dict(momentum=0), r"momentum: expected a rate in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingPrecision(torch.ones(2, 2), **options)
        with pytest.raises(ValueError, match=message):
            qnk.CyclicPrecisionConfig(**options)
    with pytest.raises(ValueError, match="activations: expected False with precision noise"):
        NoisyLinear.from_linear(nn.Linear(2, 2), "precision", activations=True)
