"""Fake quantization over ranges that follow the data, on a GPU: bit for bit the reference on the CPU."""

import pytest
import torch
from numeric import DTYPES, assert_identical, integer

import qnkernels as qnk
from qnkernels.backends import kernels

SHAPES = ((1,), (7,), (5, 57), (257, 72), (3, 9, 7), (2, 8185), (2, 8186), (2, 8192), (1, 70_001))


def on(device, values):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]


@pytest.mark.of("dynamic_fake_quantize")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stochastic", [True, False])
def test_dynamic_fake_quantize(device, backend, dtype, shape, stochastic):
    generator = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=generator) * 3 - 0.5).to(dtype)
    for bits, per_sample, other in ((2, True, dtype), (8, False, torch.float32), (16, True, dtype)):
        arguments = x, integer(bits), integer(2**40 + 7), per_sample, stochastic, other
        expected = kernels("reference")["dynamic_fake_quantize"](*arguments)
        actual = kernels(backend)["dynamic_fake_quantize"](*on(device, arguments))
        assert_identical(actual.cpu(), expected)


@pytest.mark.of("dynamic_fake_quantize")
@pytest.mark.parametrize("stochastic", [True, False])
def test_samples_of_every_size(device, backend, stochastic):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(60, 72, generator=generator) * 2.0 ** torch.arange(-130, 110, 4)[:, None]
    x[:, ::3] *= 2.0 ** torch.randint(-60, 0, (60, 24), generator=generator)
    arguments = x, integer(5), integer(3), True, stochastic
    expected = kernels("reference")["dynamic_fake_quantize"](*arguments)
    actual = kernels(backend)["dynamic_fake_quantize"](*on(device, arguments))
    assert_identical(actual.cpu(), expected)


@pytest.mark.of("moving_fake_quantize_")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((7,), None), ((13, 131), 0), ((2, 3, 40), 1), ((70_001,), None)]
)
def test_moving_fake_quantize(device, backend, dtype, shape, axis):
    generator = torch.Generator().manual_seed(sum(shape))
    size = () if axis is None else (shape[axis],)
    states = {
        where: on(where, (torch.zeros(size), torch.zeros(size), integer(0))) for where in ("cpu", device)
    }
    for bits in (4, 8, 16):
        x = torch.randn(shape, generator=generator).to(dtype)
        results = {}
        for where, name in (("cpu", "reference"), (device, backend)):
            arguments = on(where, (x, integer(bits)))
            call = kernels(name)["moving_fake_quantize_"]
            results[where] = call(arguments[0], *states[where], arguments[1], 0.3, axis)
        for expected, actual in zip(results["cpu"], results[device], strict=True):
            assert_identical(actual.cpu(), expected)
        for expected, actual in zip(states["cpu"], states[device], strict=True):
            assert_identical(actual.cpu(), expected)


@pytest.mark.of("low_precision_operands_")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("moves", "step"), [(True, 0), (True, 3), (False, 3), (False, 0)])
def test_low_precision_operands(device, backend, dtype, shape, moves, step):
    generator = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=generator) * 3 - 0.5).to(dtype)
    weight = torch.randn(33, 40, generator=generator)
    results = {}
    for where, name in (("cpu", "reference"), (device, backend)):
        state = on(where, (torch.tensor(-1.0), torch.tensor(2.0), integer(step)))
        arguments = on(where, (x, weight, *state, integer(5), 0.3, moves, True))
        results[where] = (*kernels(name)["low_precision_operands_"](*arguments), *state)
    for expected, actual in zip(results["cpu"], results[device], strict=True):
        assert_identical(actual.cpu(), expected)


@pytest.mark.of("stop_gradient_")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_stop_gradient(device, backend, dtype, shape):
    generator = torch.Generator().manual_seed(sum(shape))
    grad = torch.randn(shape, generator=generator).to(dtype)
    outside = torch.randint(0, 256, ((grad.numel() + 7) // 8,), generator=generator).to(torch.uint8)
    actual, expected = grad.to(device, copy=True), grad.clone()
    kernels("reference")["stop_gradient_"](expected, outside)
    kernels(backend)["stop_gradient_"](actual, outside.to(device))
    assert_identical(actual.cpu(), expected)


@pytest.mark.needs_cuda
def test_a_layer_trains_in_low_precision(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).to(device)
    schedule = qnk.CyclicPrecision(model, 3, 8, 2, 40)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, target = torch.randn(128, 64, device=device), torch.randn(128, 8, device=device)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
