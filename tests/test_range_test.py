"""The precision range test: what it finds, that it leaves the model alone, and its picture."""

import pytest
import torch
from torch import nn

import qnkernels as qnk


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    return qnk.quantize_(model, qnk.CyclicPrecisionConfig(bits=6))


def scripted(values: dict[int, float], model: nn.Module):
    """A train_step that changes the model and whose accuracy is that of the precision it runs at."""

    def step() -> float:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        model(torch.randn(2, 8))
        return values[model[0].noise.bits.item()]

    return step


def test_the_first_precision_that_moves_is_found():
    model = make_model()
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    values = {2: 0.1, 3: 0.105, 4: 0.2, 5: 0.9}
    result = qnk.precision_range_test(model, scripted(values, model), steps=7, window=3, progress=False)
    assert result.min_bits == 4
    assert result.bits == [2, 3, 4]
    assert result.levels == pytest.approx([0.1, 0.105, 0.2])
    assert [len(curve) for curve in result.accuracies] == [7, 7, 7]
    for tensor, old in zip((*model.parameters(), *model.buffers()), before, strict=True):
        assert torch.equal(tensor, old)
        assert tensor.grad is None
    assert model[0].noise.bits == 6 and model[0].noise.moving.step == 0


def test_learning_within_the_first_precision_counts():
    model = make_model()
    curve = iter([0.1] * 5 + [0.5] * 5)
    result = qnk.precision_range_test(model, lambda: next(curve), (4, 5), steps=10, window=5, progress=False)
    assert (result.min_bits, result.bits, result.start) == (4, [4], 0.1)


def test_none_is_found():
    model = make_model()
    result = qnk.precision_range_test(model, lambda: 0.3, (2, 5), steps=2, window=1, progress=False)
    assert result.min_bits is None and result.bits == [2, 5]


def test_a_real_model_learns_at_some_precision(tmp_path):
    model = make_model()
    torch.manual_seed(1)
    x = torch.randn(256, 8)
    labels = (x @ torch.randn(8, 4)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def step() -> float:
        logits = model(x)
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return (logits.argmax(1) == labels).float().mean().item()

    result = qnk.precision_range_test(model, step, steps=30, threshold=0.1)
    assert result.min_bits in (2, 3, 4)
    result.plot(tmp_path / "range.png")
    assert (tmp_path / "range.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["range.png"]


def test_an_error_leaves_the_model_as_it_was():
    model = make_model()
    before = model[0].weight.clone()
    step = scripted({2: 0.1, 3: float("nan")}, model)
    with pytest.raises(FloatingPointError, match="finite accuracy, got nan at 3 bits, step 0"):
        qnk.precision_range_test(model, step, (2, 3), steps=2, window=1, progress=False)
    assert torch.equal(model[0].weight, before) and model[0].noise.bits == 6


def test_bad_arguments_are_named():
    model = make_model()
    for options, message in (
        (dict(bits=()), "bits: expected increasing precisions"),
        (dict(bits=(3, 2)), "bits: expected increasing precisions"),
        (dict(bits=(1, 2)), r"bits: expected an integer in \[2, 16\], got 1"),
        (dict(steps=5, window=6), r"window: expected an integer in \[1, 5\], got 6"),
        (dict(steps=0), "steps: expected an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            qnk.precision_range_test(model, lambda: 0.0, progress=False, **options)
    with pytest.raises(ValueError, match="model: expected layers that train in low precision"):
        qnk.precision_range_test(nn.Linear(2, 2), lambda: 0.0)
