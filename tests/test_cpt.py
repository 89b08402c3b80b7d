"""CyclicPrecision: the schedule of the published code, what it costs, and what it does to a model."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import qnkernels as qnk
from qnkernels.nn import NoisyLinear

GOLDEN = json.loads((Path(__file__).parent / "data" / "fairseq_cpt.json").read_text())


def schedule(**options) -> qnk.CyclicPrecision:
    arguments = dict(min_bits=3, max_bits=8, cycles=4, total_steps=40) | options
    return qnk.CyclicPrecision(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), **arguments)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['min_bits']}-{case['max_bits']}")
def test_schedule_of_the_original_code(case):
    names = ("min_bits", "max_bits", "cycles", "total_steps", "grad_bits")
    cpt = schedule(**{name: case[name] for name in names})
    total = case["total_steps"]
    assert cpt.period == case["period"]
    seen = []
    for _ in range(total):
        seen.append(cpt.bits)
        cpt.step()
    assert seen[: cpt.period] == case["first_cycle"]
    assert seen[-5:] == case["last"]
    assert cpt.bitops.relative_to_static == pytest.approx(case["relative_bitops_vs_static_max"], rel=1e-12)


@pytest.mark.parametrize(("low", "high", "saved"), [(3, 8, 0.3667), (3, 6, 0.3004)])
def test_savings_of_the_paper(low, high, saved):
    cpt = schedule(min_bits=low, max_bits=high, cycles=32, total_steps=64_000)
    assert 1 - cpt.bitops_of(64_000).relative_to_static == pytest.approx(saved, abs=1e-4)


def test_bit_operations_step_by_step():
    cpt = schedule(grad_bits=6, total_steps=43)
    total = 0.0
    for step in range(43):
        assert cpt.bitops.total == pytest.approx(total)
        assert cpt.bitops.full == step * 1024
        assert cpt.bitops.static == pytest.approx(step * (64 + 96) / 3)
        total += (cpt.bits**2 + 12 * cpt.bits) / 3
        cpt.step()
    assert cpt.bitops.relative_to_full == pytest.approx(total / (43 * 1024))


def test_shapes():
    bits = lambda **options: [schedule(cycles=2, **options).bits_at(t) for t in range(9)]  # noqa: E731
    assert bits(shape="triangular", min_bits=2, max_bits=6, total_steps=16) == [2, 3, 4, 5, 6, 5, 4, 3, 2]
    assert bits(shape="step", min_bits=4, max_bits=8, total_steps=12) == [4, 4, 4, 8, 8, 8, 4, 4, 4]
    assert bits(min_bits=5, max_bits=5, total_steps=4) == [5] * 9
    cosine = [round(4 + 2 * (1 - math.cos(math.pi * (t % 8) / 8))) for t in range(9)]
    assert bits(min_bits=4, max_bits=8, total_steps=16) == cosine


def test_every_layer_follows_the_schedule():
    cpt = schedule()
    assert all(isinstance(layer, NoisyLinear) for layer in cpt.model)
    for _ in range(25):
        cpt.step()
        for layer in cpt.model:
            assert layer.noise.bits == cpt.bits
            assert layer.noise.moving.bits == cpt.bits
            assert layer.noise.grad_bits == 8


def test_only_some_layers_and_quant_noise_on_others():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    qnk.quantize_(model, qnk.ScalarNoiseConfig(bits=4, p=0.5), lambda _, name: name == "2")
    cpt = qnk.CyclicPrecision(model, 3, 8, 2, 20, filter_fn=lambda _, name: name == "0")
    assert list(cpt.layers) == ["0"]
    assert type(model[1]) is nn.Linear and model[2].noise.p == 0.5
    model(torch.randn(3, 4)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_frozen_backbone_trains_its_head_only():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    cpt = qnk.CyclicPrecision(model, 4, 8, 2, 20, shape="step")
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    x, target = torch.randn(64, 6), torch.randn(64, 2)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cpt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model[0].weight, before) and model[0].weight.grad is None


def test_it_goes_on_from_a_saved_state():
    cpt = schedule()
    for _ in range(17):
        cpt.step()
    again = schedule()
    again.load_state_dict(json.loads(json.dumps(cpt.state_dict())))
    assert again.bits == cpt.bits != again.bits_at(0)
    assert again.model[0].noise.bits == cpt.bits
    with pytest.raises(ValueError, match=r"state\['max_bits'\]: expected 6, got 8"):
        schedule(max_bits=6).load_state_dict(cpt.state_dict())
    with pytest.raises(ValueError, match="steps_done"):
        schedule().load_state_dict(cpt.state_dict() | {"steps_done": -1})


def test_low_precision_training_learns():
    """A regression that 3 to 8 bits fit: the loss falls by far, and stays finite at the lowest precision."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    target = torch.sin(x @ torch.randn(8, 4))
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    cpt = qnk.CyclicPrecision(model, 3, 8, 4, 200)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(200):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cpt.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_bad_arguments_are_named():
    for options, message in (
        (dict(min_bits=1), r"min_bits: expected an integer in \[2, 16\], got 1"),
        (dict(min_bits=9), r"max_bits: expected an integer in \[9, 16\], got 8"),
        (dict(cycles=0), "cycles: expected an integer of at least 1, got 0"),
        (dict(total_steps=None), "total_steps: expected an integer of at least 4, got None"),
        (dict(total_steps=3), "total_steps: expected an integer of at least 4, got 3"),
        (dict(shape="sine"), "shape: expected one of"),
        (dict(grad_bits=17), "grad_bits: expected an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule(**options)
    with pytest.warns(UserWarning, match="no layer"), pytest.raises(ValueError, match="filter_fn"):
        schedule(filter_fn=lambda module, name: False)
