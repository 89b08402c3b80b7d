"""Noisy and packed layers on a GPU: they train, keep their weights, and agree with the CPU."""

import copy

import pytest
import torch
from torch import nn

import qnkernels as qnk

pytestmark = pytest.mark.needs_cuda

NOISES = {
    "scalar": qnk.ScalarNoiseConfig(bits=4, p=0.5, update_every=3),
    "scalar channel ema": qnk.ScalarNoiseConfig(bits=8, p=0.5, per="channel", observer="ema_minmax"),
    "scalar histogram": qnk.ScalarNoiseConfig(bits=4, p=0.5, observer="histogram", update_every=5),
    "zero": qnk.ProductNoiseConfig(block_size=8, p=0.1),
    "mean": qnk.ProductNoiseConfig(block_size=8, p=0.1, kind="mean"),
}


class Classifier(nn.Module):
    """An embedding, a convolution and two linear layers over 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.convolution = nn.Conv2d(1, 8, (2, 4), bias=True)
        self.hidden = nn.Linear(8 * 15 * 29, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features = self.convolution(self.embedding(tokens)[:, None]).relu().flatten(1)
        return self.head(self.hidden(features).relu())


def task(device):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 50, (128, 16), generator=generator)
    return tokens.to(device), (tokens.sum(1) % 5).to(device)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return Classifier().to(device)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("autocast", [False, True])
def test_noisy_layers_train(device, model, noise, autocast):
    qnk.quantize_(model, NOISES[noise])
    tokens, labels = task(device)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    first, last = torch.stack(losses[:5]).mean().item(), torch.stack(losses[-5:]).mean().item()
    assert last < 0.5 * first


@pytest.mark.parametrize("noise", NOISES)
def test_a_training_forward_leaves_the_weights_alone_and_draws_new_noise(device, model, noise):
    qnk.quantize_(model, NOISES[noise])
    before = copy.deepcopy(model.state_dict())
    tokens, _ = task(device)
    first, second = model(tokens), model(tokens)
    assert not torch.equal(first, second)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("noise", NOISES)
def test_evaluation_agrees_with_the_cpu(device, model, noise):
    qnk.quantize_(model, NOISES[noise])
    tokens, _ = task(device)
    model(tokens)  # one observation
    model.eval()
    on_cpu = copy.deepcopy(model).cpu()
    with torch.no_grad():
        actual, expected = model(tokens).cpu(), on_cpu(tokens.cpu())
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise", ["scalar", "zero"])
def test_a_seeded_run_repeats_itself(device, model, noise):
    qnk.quantize_(model, NOISES[noise])
    tokens, _ = task(device)
    model(tokens)
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(model(tokens))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("noise", ["scalar", "mean"])
def test_compiled_whole(device, model, noise):
    qnk.quantize_(model, NOISES[noise])
    tokens, labels = task(device)
    compiled = torch.compile(model, fullgraph=True)
    first, second = compiled(tokens), compiled(tokens)
    nn.functional.cross_entropy(second, labels).backward()
    assert not torch.equal(first, second)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        qnk.Int8WeightOnlyConfig(),
        qnk.Int4WeightOnlyConfig(group_size=8),
        qnk.PQConfig(block_size=8, n_centroids=64),
    ],
)
def test_packed_layers_agree_with_the_cpu(device, config):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(70, 48), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 24))
    qnk.quantize_(model, config)
    tokens = torch.randint(0, 70, (9, 11))
    with torch.no_grad():
        expected = model(tokens)
        actual = model.to(device)(tokens.to(device))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("observer", ["minmax", "ema_minmax", "percentile", "histogram"])
def test_calibration_sees_what_it_sees_on_the_cpu(device, model, observer):
    """The input of the convolution, rows of the table, is the same on both."""
    other = copy.deepcopy(model).cpu()
    for turned in (model, other):
        tokens, _ = task(next(turned.parameters()).device)
        with torch.no_grad(), qnk.calibrate(turned, observer):
            for part in tokens.split(40):
                turned(part)
    assert model.convolution.input_range == other.convolution.input_range
    for name in ("hidden", "head"):
        actual, expected = (net.get_submodule(name).input_range for net in (model, other))
        assert actual.low == pytest.approx(expected.low, rel=1e-2, abs=1e-6)
        assert actual.high == pytest.approx(expected.high, rel=1e-2)


@pytest.mark.parametrize(
    "config", [qnk.Int8WeightOnlyConfig(), qnk.Int8DynamicConfig(), qnk.Int8StaticConfig()]
)
def test_integer_layers_and_convolutions_agree_with_the_cpu(device, model, config):
    """But for activations that round to the neighbouring level."""
    model.cpu()
    tokens, _ = task("cpu")
    with torch.no_grad():
        with qnk.calibrate(model, "minmax"):
            model(tokens)
        expected = qnk.quantize_(model, config)(tokens)
        actual = model.to(device)(tokens.to(device)).cpu()
    assert (actual - expected).norm() < 2e-3 * expected.norm()


def test_gradients_of_product_quantized_layers_agree_with_the_cpu(device, model):
    """Embedding, convolution and linear: codebooks and biases; the same bit for bit in a second run."""
    qnk.quantize_(model, qnk.PQConfig(block_size=4, n_centroids=32))
    tokens, labels = task(device)

    def gradients(model, tokens, labels):
        model.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        found = {name: one.grad.cpu() for name, one in model.named_parameters()}
        assert sum("codebook" in name for name in found) == 4
        return found

    actual, again = gradients(model, tokens, labels), gradients(model, tokens, labels)
    expected = gradients(copy.deepcopy(model).cpu(), tokens.cpu(), labels.cpu())
    for name, one in expected.items():
        torch.testing.assert_close(actual[name], one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))
        if "codebook" in name and "convolution" not in name:
            assert torch.equal(actual[name], again[name])
