"""Noise by the nearest codeword: when the codebook is refreshed, what eval uses, what saves and loads."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import qnkernels as qnk
from qnkernels import functional, kmeans
from qnkernels.nn import BlockNoise, NoisyConv2d, NoisyEmbedding, NoisyLinear, PQLinear


def make_noise(weight: torch.Tensor, **options) -> BlockNoise:
    defaults = dict(block_size=4, p=0.5, kind="centroid", n_centroids=8, update_every=3, n_iter=2)
    return BlockNoise(weight, **{**defaults, **options})


def clusters(weight: torch.Tensor, n_iter: int, init: str | torch.Tensor = "random", count: int = 8):
    return kmeans(weight.reshape(-1, 4), count, n_iter, init).centroids


@pytest.mark.parametrize("every", [0, 1, 3])
def test_codebook_is_warm_started_every_so_many_forwards(every):
    weight = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    noise = make_noise(weight, update_every=every)
    expected = None
    for forward in range(7):
        weight = weight * 1.1
        noise(weight)
        if forward == 0:
            expected = clusters(weight, 20)
        elif every and forward % every == 0:
            expected = clusters(weight, 2, expected)
        assert torch.equal(noise.codewords.codebook, expected)
        assert noise.codewords.step == forward + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_noises_blocks_at_the_rate_and_eval_all_of_them(dtype):
    torch.manual_seed(1)
    weight = torch.randn(64, 64, dtype=dtype)
    noise = make_noise(weight, p=0.25)
    torch.manual_seed(5)
    noised = noise(weight)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**62, ())
    book = noise.codewords.codebook
    expected = functional.block_noise(weight, 4, 0.25, seed, "centroid", codebook=book)
    assert noised.dtype == dtype and torch.equal(noised, expected)
    changed = (noised != weight).reshape(-1, 4).any(1).double().mean().item()
    assert changed == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 1024) ** 0.5)
    state = torch.get_rng_state()
    quantized = noise.eval()(weight * 0.9)
    assert torch.equal(torch.get_rng_state(), state)
    codes, _ = functional.kmeans_assign((weight * 0.9).float().reshape(-1, 4), book)
    assert torch.equal(quantized, book[codes.long()].reshape(64, 64).to(dtype))
    assert noise.codewords.step == 1


def test_eval_before_training_uses_a_codebook_of_its_own_and_keeps_no_state():
    weight = torch.randn(10, 12)
    noise = make_noise(weight).eval()
    for w in (weight, weight * 2 + 1):
        book = clusters(w, 20)
        codes, _ = functional.kmeans_assign(w.reshape(-1, 4), book)
        assert torch.equal(noise(w), book[codes.long()].reshape(10, 12))
    assert noise.codewords.step == 0 and not noise.codewords.codebook.any()


def test_fewer_blocks_than_centroids_are_exact():
    weight = torch.randn(3, 8)
    noise = make_noise(weight, n_centroids=256)
    assert noise.codewords.codebook.shape == (6, 4) and torch.equal(noise.eval()(weight), weight)


def test_eval_is_what_quantizing_the_layer_gives_while_the_weight_is_new():
    torch.manual_seed(2)
    linear = nn.Linear(16, 12)
    options = dict(block_size=4, n_centroids=8)
    noisy = NoisyLinear.from_linear(linear, "block", kind="centroid", **options).eval()
    assert torch.equal(noisy.noise(noisy.weight), PQLinear.from_linear(linear, **options).weight)


def test_layers_keep_the_state_of_the_plain_ones():
    torch.manual_seed(3)
    config = qnk.ProductNoiseConfig(4, 0.5, "centroid", n_centroids=8, update_every=2, n_iter=1)
    model = nn.Sequential(nn.Embedding(9, 8, padding_idx=2), nn.Linear(8, 4))
    names = list(model.state_dict())
    qnk.quantize_(model, config)
    assert list(model.state_dict()) == names
    noise = model[1].noise
    assert (noise.codewords.update_every, noise.codewords.n_iter) == (2, 1)
    assert noise.codewords.codebook.shape == (8, 4)
    y = model(torch.arange(9))
    y.sum().backward()
    assert model[1].weight.grad.abs().sum() > 0
    model.bfloat16()
    assert noise.codewords.codebook.dtype == torch.float32
    assert model(torch.arange(9)).dtype == torch.bfloat16


def test_padding_row_stays_as_it_is():
    torch.manual_seed(4)
    module = NoisyEmbedding.from_embedding(
        nn.Embedding(9, 8, padding_idx=2), "block", block_size=4, p=1.0, kind="centroid", n_centroids=4
    )
    for training in (True, False):
        module.train(training)
        assert torch.equal(module(torch.tensor([2, 2])), torch.zeros(2, 8))
    module(torch.tensor([2, 3])).sum().backward()
    assert torch.equal(module.weight.grad[2], torch.zeros(8)) and module.weight.grad[3].abs().sum() > 0


def test_convolution_filters():
    torch.manual_seed(5)
    conv = nn.Conv2d(4, 6, 3)
    options = dict(block_size=9, kind="centroid", n_centroids=5)
    module = NoisyConv2d.from_conv2d(conv, "block", p=1.0, **options)
    weight = module.noise(conv.weight)
    assert weight.shape == conv.weight.shape and len(weight.detach().reshape(-1, 9).unique(dim=0)) <= 5
    assert module(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)


def test_loading_a_state_starts_anew():
    torch.manual_seed(6)
    layer = NoisyLinear.from_linear(nn.Linear(16, 12), "block", block_size=4, kind="centroid", n_centroids=8)
    layer(torch.randn(2, 16))
    other = nn.Linear(16, 12)
    layer.load_state_dict(other.state_dict())
    expected = PQLinear.from_linear(other, 4, 8).weight
    assert torch.equal(layer.eval().noise(layer.weight), expected)


def test_copies_are_independent():
    noise = make_noise(weight := torch.randn(8, 8), update_every=1)
    noise(weight)
    twin = copy.deepcopy(noise)
    noise(weight * 3)
    assert twin.codewords.step == 1 and noise.codewords.step == 2
    assert not torch.equal(twin.codewords.codebook, noise.codewords.codebook)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_once(use_reentrant):
    torch.manual_seed(7)
    layer = NoisyLinear.from_linear(
        nn.Linear(8, 8), "block", block_size=4, p=0.5, kind="centroid", n_centroids=4, update_every=1
    )
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 8, requires_grad=True)
    for forward, module in (
        (layer, layer),
        (lambda x: checkpoint(twin, x, use_reentrant=use_reentrant), twin),
    ):
        torch.manual_seed(1)
        for _ in range(3):
            forward(x).square().sum().backward()
        assert module.noise.codewords.step == 3
    assert torch.equal(layer.weight.grad, twin.weight.grad)


def test_compiled_whole_and_refreshed_all_the_same():
    torch.manual_seed(8)
    layer = NoisyLinear.from_linear(
        nn.Linear(16, 12),
        "block",
        block_size=4,
        p=0.5,
        kind="centroid",
        n_centroids=8,
        update_every=2,
        n_iter=1,
    )
    twin = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    x = torch.randn(3, 16)
    for _ in range(5):
        layer(x).sum().backward()
        compiled(x).sum().backward()
        assert torch.equal(layer.noise.codewords.codebook, twin.noise.codewords.codebook)
        assert layer.noise.codewords.step == twin.noise.codewords.step
        with torch.no_grad():
            layer.weight.mul_(1.1)
            twin.weight.mul_(1.1)
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled.eval()(x), layer.eval()(x))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 65}, r"block_size: expected an integer in \[1, 64\], got 65"),
        ({"n_centroids": 1}, r"n_centroids: expected an integer in \[2, 65536\], got 1"),
        ({"update_every": -1}, "update_every: expected an integer of at least 0, got -1"),
        ({"n_iter": 0}, "n_iter: expected an integer of at least 1, got 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_noise(torch.ones(4, 8), **options)
    with pytest.raises(ValueError, match=message):
        qnk.ProductNoiseConfig(kind="centroid", **options)


def test_repr():
    noise = make_noise(torch.ones(4, 8))
    assert "kind='centroid'" in repr(noise) and "NoiseCodebook(8, 4, update_every=3, n_iter=2)" in repr(noise)
