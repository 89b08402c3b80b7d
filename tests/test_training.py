"""Noise inside what people train with: DDP, activation checkpointing, torch.compile, autocast, copies."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import helpers_ddp
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qnkernels as qnk

SCALAR = qnk.ScalarNoiseConfig(
    bits=3, observer="ema_minmax", per="channel", update_every=2, activations=True, p_activations=0.5
)
NOISES = {"scalar": SCALAR, "block": qnk.ProductNoiseConfig(block_size=4, p=0.3)}


def make_model(config=None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 8))
    return model if config is None else qnk.quantize_(model, config)


def train(model: nn.Module, forward, steps: int = 5) -> list[torch.Tensor]:
    """Gradients, parameters and buffers after some steps, in one list."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.manual_seed(1)
    seen = []
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = forward(x).square().mean()
        loss.backward()
        seen += [loss.detach().clone(), *(parameter.grad.clone() for parameter in model.parameters())]
        optimizer.step()
    return [*seen, *(tensor.detach() for tensor in [*model.parameters(), *model.buffers()])]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_noise_and_counts_once(noise, use_reentrant):
    """Bit for bit the training without it, through steps where an observation is due and where none is."""
    plain, saving = make_model(NOISES[noise]), make_model(NOISES[noise])

    def forward(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(saving, x.requires_grad_(), use_reentrant=use_reentrant)

    expected = train(plain, plain)
    assert_same(train(saving, forward), expected)
    if noise == "scalar":
        assert saving[0].noise.step == saving[3].activation_noise.step == 5


@pytest.mark.parametrize("noise", NOISES)
def test_training_is_reproducible_and_its_noise_is_fresh(noise):
    models = [make_model(NOISES[noise]) for _ in range(2)]
    assert_same(train(models[0], models[0]), train(models[1], models[1]))
    model = models[0]
    x = torch.randn(4, 8)
    model[2].p = 0.0
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("noise", NOISES)
def test_copies_are_independent_and_equal(noise):
    model = make_model(NOISES[noise])
    train(model, model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.randn(4, 8)
        assert torch.equal(other.eval()(x), copy.deepcopy(model).eval()(x))
        before = [tensor.clone() for tensor in [*model.parameters(), *model.buffers()]]
        train(other.train(), other)
        assert_same(before, [*model.parameters(), *model.buffers()])


def test_eval_under_inference_mode_leaves_training_as_it_was():
    model, undisturbed = make_model(SCALAR), make_model(SCALAR)
    with torch.inference_mode():
        model.eval()(torch.randn(3, 8))
    model.train()
    assert_same(train(model, model), train(undisturbed, undisturbed))


def test_autocast_trains_fp32_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 4))
    qnk.quantize_(model, qnk.ScalarNoiseConfig(bits=4, activations=True, p_activations=0.5))
    tokens = torch.randint(0, 9, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](tokens).dtype == torch.float32  # as nn.Embedding does
        y = model(tokens)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


def test_one_layer_used_twice_before_the_backward():
    torch.manual_seed(0)
    layer = qnk.quantize_(nn.Linear(8, 8), qnk.ScalarNoiseConfig(bits=3, p=1.0, update_every=1))
    x = torch.randn(2, 8)
    layer(layer(x)).sum().backward()
    assert layer.noise.step == 2 and layer.weight.grad.isfinite().all()


def test_ddp_averages_the_gradients_of_each_process_with_its_own_noise(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(qnk.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, helpers_ddp.__file__, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(results[0]["parameters"], results[1]["parameters"])
    assert results[0]["step"] == 2 * helpers_ddp.STEPS - 1
    alone = []
    for rank in range(2):
        model = helpers_ddp.make_model()
        torch.manual_seed(100 + rank)
        helpers_ddp.loss_of(model, rank).backward()
        alone.append([parameter.grad for parameter in model.parameters()])
    for received, *own in zip(results[0]["gradients"], *alone, strict=True):
        torch.testing.assert_close(received, (own[0] + own[1]) / 2)
    assert not torch.equal(alone[0][1], alone[1][1])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 8)),
    "embedding": (lambda: nn.Embedding(9, 8), lambda: torch.randint(0, 9, (4,))),
    "conv": (lambda: nn.Conv2d(2, 4, 2), lambda: torch.randn(1, 2, 4, 4)),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("noise", NOISES)
def test_every_noisy_layer_is_captured_whole(kind, noise):
    """Traced, made functional and differentiated without a break; the same numbers as eager."""
    make, data = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = qnk.quantize_(make(), NOISES[noise]), data()
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(3):
        torch.manual_seed(step)
        y = compiled(x)
        y.square().sum().backward()
        torch.manual_seed(step)
        expected = eager(x)
        expected.square().sum().backward()
        assert torch.equal(y, expected)
    assert torch.equal(layer.weight.grad, eager.weight.grad)
    assert_same(list(layer.buffers()), list(eager.buffers()))
    layer.eval(), eager.eval()
    assert torch.equal(compiled(x), eager(x))


PACKED = [
    qnk.Int8WeightOnlyConfig(),
    qnk.Int4WeightOnlyConfig(group_size=4, symmetric=True),
    qnk.Int8DynamicConfig(),
    qnk.Int8StaticConfig(),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("config", PACKED, ids=["int8", "int4", "dynamic", "static"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_packed_layer_is_captured_whole(kind, config):
    make, data = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = make(), data()
    if kind != "embedding":
        with qnk.calibrate(layer, observer="minmax"):
            layer(0.5 * x)
    qnk.quantize_(layer, config)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if x.is_floating_point():
        x.requires_grad_()
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
        assert torch.equal(gradient, expected)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_draws_fresh_noise_and_follows_bits_without_recompilation():
    """The default compiler, which draws random numbers in its own kernels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6))
    qnk.quantize_(model, qnk.ScalarNoiseConfig(bits=2, update_every=2))
    compiled = torch.compile(model, fullgraph=True)
    tokens = torch.arange(9)
    torch.manual_seed(1)
    first, second = compiled(tokens), compiled(tokens)
    torch.manual_seed(1)
    assert torch.equal(compiled(tokens), first) and not torch.equal(first, second)
    second.sum().backward()
    assert model[1].weight.grad.isfinite().all() and model[0].noise.step == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for module in model:
            module.noise.bits.fill_(16)
        y = compiled(tokens)
    plain = nn.functional.linear(model[0].weight, model[1].weight, model[1].bias)
    torch.testing.assert_close(y, plain, rtol=0, atol=1e-3)
    assert (first - plain).abs().max() > 0.1
    model.eval()
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_checkpointing_repeats_the_noise():
    plain, saving = (make_model(qnk.ScalarNoiseConfig(bits=3, update_every=0)) for _ in range(2))
    plain[2].p = saving[2].p = 0.0

    def forward(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(saving, x, use_reentrant=False)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert_same(train(saving, compiled), train(plain, plain))
