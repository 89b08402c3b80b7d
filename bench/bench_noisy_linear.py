"""A training step of a noisy linear layer: 512 tokens, 768 -> 3072, forward and backward.

The step is forward, gradients of weight, bias and input; the gradients are dropped before each
step, as optimizers do. What the noise adds to the plain step, for scalar noise: one fake_quantize forward
(18.9 MB in fp32) and one backward (28.3 MB); for block noise one block_noise forward and nothing backward.
Operations of the plain step: 6 x 512 x 768 x 3072 = 7.2 G.
Floor: the plain step, ratio 1; on 2 cores at 234 GFLOP/s fp32 it takes 31 ms, and the noise some 1.3 ms (two
passes at 1.5x a 0.42 ms copy) or 0.45 ms. Prediction: 1.04x scalar, 1.015x block in fp32; in bf16, where
AMX makes the plain step six times faster and the noise two, 1.10x and 1.04x.
Measured, 2 cores with AMX (3.9 GHz), fp32: 1.05x scalar, 1.05x block (short runs 1.05x to 1.10x and 1.03x to
1.08x); in bf16 1.22x and 1.19x. A step that merely clones the weight takes 1.02x to 1.06x: after the
products a copy of 0.4 ms takes 0.8 to 1. Of the 1.6 ms that scalar noise added in fp32, 1.1 were Python,
which the products had driven out of the caches (0.2 while it is in them); of that, an op that counts
forwards, one that computes the scale, and checks of the backward are now left out where nothing changed, and
it adds 1.1. On older cores noising and multiplying in chunks of 256 to 1536 rows, which stores no copy, took
1.30x to 1.09x; stores past the cache gained nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import qnkernels as qnk
from harness import Case, Contender, compiled, served

FEATURES = (768, 3072)
BITS, SCALAR_RATE, BLOCK, BLOCK_RATE = 8, 0.5, 8, 0.1


@dataclass
class Inputs:
    x: torch.Tensor  # [tokens, in]
    grad: torch.Tensor  # [tokens, out]
    weight: torch.Tensor
    bias: torch.Tensor


def make_inputs(tokens, dtype, device, index) -> Inputs:
    generator = torch.Generator(device).manual_seed(index)
    columns, out = FEATURES
    shapes = ((tokens, columns), (tokens, out), (out, columns), (out,))
    x, grad, weight, bias = (torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes)
    return Inputs(x, grad, weight / columns**0.5, bias)


def plain_model(inputs: Inputs) -> nn.Sequential:
    out, columns = inputs.weight.shape
    layer = nn.Linear(columns, out, device=inputs.x.device, dtype=inputs.x.dtype)
    layer.weight.data.copy_(inputs.weight)
    layer.bias.data.copy_(inputs.bias)
    return nn.Sequential(layer)


def step(model: Callable, parameters: list[nn.Parameter], inputs: Inputs) -> Callable:
    """Forward and backward, gradients in fresh memory."""
    x = inputs.x.detach().requires_grad_()

    def run() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        model(x).backward(inputs.grad)

    return run


def plain(inputs: Inputs) -> Callable:
    model = plain_model(inputs)
    return step(model, list(model.parameters()), inputs)


def noisy(config, inputs: Inputs) -> Callable:
    model = qnk.quantize_(plain_model(inputs), config).train()
    return step(model, list(model.parameters()), inputs)


def eager_scalar(weight, low, high):
    """Scalar noise as it is usually written: formula, mask, straight-through; the range is given."""
    scale = (high - low) / (2**BITS - 1)
    zero_point = torch.round(-low / scale)
    w = weight.float()
    quantized = (torch.round(w / scale + zero_point).clamp(0, 2**BITS - 1) - zero_point) * scale
    inside = torch.minimum(torch.maximum(w, low), high)
    noised = inside + (quantized - inside).detach()
    return torch.where(torch.rand(w.shape, device=w.device) < SCALAR_RATE, noised, w).to(weight.dtype)


def eager_block(weight, low, high):
    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    mask = torch.rand(*blocks.shape[:2], 1, device=weight.device) < BLOCK_RATE
    return (blocks * (1 / (1 - BLOCK_RATE))).masked_fill(mask, 0).reshape(weight.shape)


def formula(noise: Callable, inputs: Inputs) -> Callable:
    weight, bias = inputs.weight.detach().requires_grad_(), inputs.bias.detach().requires_grad_()
    low, high = torch.aminmax(inputs.weight.float())
    return step(lambda x: nn.functional.linear(x, noise(weight, low, high), bias), [weight, bias], inputs)


SCALAR = qnk.ScalarNoiseConfig(bits=BITS, p=SCALAR_RATE)
PRODUCT = qnk.ProductNoiseConfig(block_size=BLOCK, p=BLOCK_RATE, kind="zero")
# noise -> (op behind it, config, the formula in torch ops)
NOISES = {"scalar": ("fake_quantize", SCALAR, eager_scalar), "block": ("block_noise", PRODUCT, eager_block)}


def contenders(noise, device_type) -> list[Contender]:
    op, config, eager = NOISES[noise]
    return [
        *served(op, device_type, partial(noisy, config)),
        Contender("eager", "peer", partial(formula, eager)),
        Contender("torch.compile", "peer", partial(formula, compiled(eager))),
        Contender("nn.Linear", "ceiling", plain),
    ]


def case(noise, tokens, dtype, devices=("cpu", "cuda"), target=None, quick=False) -> Case:
    (columns, out), types = FEATURES, str(dtype).removeprefix("torch.")
    passes = 5 if noise == "scalar" else 2
    return Case(
        op="noisy_linear",
        name=f"{noise} noise, step of {tokens} tokens {columns}->{out} {types}",
        shape=f"{tokens} tokens {columns}->{out}",
        dtype=types,
        moved_bytes=((passes + 4) * out * columns + 4 * tokens * (columns + out)) * dtype.itemsize,
        operations=6 * tokens * columns * out,
        inputs=partial(make_inputs, tokens, dtype),
        contenders=partial(contenders, noise),
        devices=devices,
        target=target,
        quick=quick,
    )


CASES = [
    case("scalar", 512, torch.float32, target=1.05, quick=True),
    case("block", 512, torch.float32, target=1.05, quick=True),
    case("scalar", 512, torch.bfloat16),
    case("block", 512, torch.bfloat16),
    case("scalar", 8192, torch.bfloat16, devices=("cuda",)),
    case("block", 8192, torch.bfloat16, devices=("cuda",)),
]


def test_noisy_linear(timed):
    """One row: a contender on a case. The fixture measures and reports."""
