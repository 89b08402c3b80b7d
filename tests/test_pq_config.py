"""quantize_ with PQConfig: which layers turn, what stays tied, and that nothing is left half done."""

import copy

import pytest
import torch
from torch import nn

import qnkernels as qnk
from qnkernels.nn import NoisyLinear, PQConv2d, PQEmbedding, PQLinear


class Model(nn.Module):
    """A tied language model with a convolution, and a module that is reached by two names."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.conv = nn.Conv2d(1, 4, 2)
        self.body = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16, bias=False))
        self.again = self.body[0]
        self.head = nn.Linear(16, 12, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.conv(torch.nn.functional.pad(x[:, None], (0, 1, 0, 1))).mean(1)
        return self.head(x + self.body(x))


CONFIG = qnk.PQConfig(block_size=4, n_centroids=16, n_iter=5)
TOKENS = torch.tensor([[0, 3, 11], [5, 5, 1]])


@pytest.mark.parametrize("noise", [None, qnk.ScalarNoiseConfig(activations=True), qnk.ProductNoiseConfig(4)])
def test_layers_are_turned_in_place(noise):
    torch.manual_seed(0)
    model = Model().eval()
    if noise is not None:
        qnk.quantize_(model, noise)
    references, bias, calls = (
        [model.embedding, model.conv, *model.body[::2], model.head],
        model.body[0].bias,
        [],
    )
    model.body[0].register_forward_hook(lambda *_: calls.append(1))
    model.body[0].weight.requires_grad_(False)
    weights = {id(layer): layer.weight.detach().clone() for layer in references}
    assert qnk.quantize_(model, CONFIG) is model
    assert [type(layer) for layer in references] == [PQEmbedding, PQConv2d, PQLinear, PQLinear, PQLinear]
    assert references == [model.embedding, model.conv, *model.body[::2], model.head]
    assert model.again is model.body[0] and model.body[0].bias is bias and not model.head.training
    assert not any("noise" in name for name, _ in model.named_modules())
    for layer in references:
        before = weights[id(layer)]
        assert "weight" not in dict(layer.named_parameters()) and layer.weight.shape == before.shape
        assert (layer.weight - before).norm() < 0.6 * before.norm()
    assert not model.body[0].codebook.requires_grad and model.body[2].codebook.requires_grad
    model(TOKENS).sum().backward()
    assert calls == [1] and model.body[0].codebook.grad is None and model.conv.codebook.grad is not None


def test_few_blocks_reduce_the_centroids_and_are_exact():
    torch.manual_seed(1)
    linear = nn.Linear(8, 4)
    weight = linear.weight.detach().clone()
    qnk.quantize_(linear, qnk.PQConfig(block_size=8))
    assert linear.n_centroids == 4 and torch.equal(linear.weight, weight)


def test_tied_weights_share_codes_and_codebook():
    model = qnk.quantize_(Model(), CONFIG)
    for turned in (model, model.bfloat16(), copy.deepcopy(model)):
        assert turned.head.codes is turned.embedding.codes
        assert turned.head.codebook is turned.embedding.codebook
    untied = qnk.quantize_(Model(tied=False), CONFIG)
    assert untied.head.codes is not untied.embedding.codes


def test_filter_options_and_root():
    config = qnk.PQConfig(2, 8, 3, 1, "sum", torch.float16)
    model = qnk.quantize_(Model(), config, lambda module, name: name.startswith("body"))
    assert type(model.conv) is nn.Conv2d and type(model.body[0]) is PQLinear
    layer = model.body[2]
    assert (layer.block_size, layer.n_centroids, layer.codebook_grad) == (2, 8, "sum")
    assert layer.codebook_dtype == torch.float16
    linear = nn.Linear(20, 16, bias=False)
    assert qnk.quantize_(linear, config) is linear and type(linear) is PQLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_codewords_and_activations(dtype):
    torch.manual_seed(2)
    config = qnk.PQConfig(4, 8, 3, codebook_dtype=torch.int8, activations=True)
    layer = qnk.quantize_(nn.Linear(16, 32, dtype=dtype), config)
    plain = copy.deepcopy(layer)
    plain.activations = False
    x = torch.randn(64, 16, dtype=dtype)
    y = layer(x)
    assert (
        y.dtype == dtype and len(y.unique()) <= 256 < len(plain(x).unique()) + (dtype != torch.float32) * 300
    )
    low, high = layer.activation_noise.low.clone(), layer.activation_noise.high.clone()
    assert torch.equal(low, plain(x).float().min()) and torch.equal(high, plain(x).float().max())
    layer.eval()
    wide = layer(x * 10)
    assert wide.max() <= high * 1.02 and torch.equal(layer.activation_noise.low, low)
    names = ["codebook", "bias", "codes", "codebook_scale"]
    ranges = ["activation_noise.low", "activation_noise.high", "activation_noise.step"]
    assert sorted(layer.state_dict()) == sorted(names + ranges)


def test_nothing_is_changed_when_one_layer_cannot_be():
    model = Model()
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"layer 'conv': block_size: expected a divisor of the 4 .*, got 8"):
        qnk.quantize_(model, qnk.PQConfig(block_size=8))
    with pytest.raises(
        ValueError, match=r"layer 'body.2': block_size: expected a divisor of the 20 .*, got 16"
    ):
        qnk.quantize_(model, qnk.PQConfig(block_size=16), lambda module, name: name != "conv")
    with torch.no_grad():
        model.body[2].weight[0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"'body.2': weight: expected finite values, got 1 of 320"):
        qnk.quantize_(model, CONFIG)
    assert [type(module) for module in model.modules()] == types


def test_config_checks_its_fields():
    with pytest.raises(ValueError, match=r"codebook_grad: expected one of .*, got 'max'"):
        qnk.PQConfig(codebook_grad="max")
    with pytest.raises(ValueError, match=r"block_size: expected an integer in \[1, 64\], got 8.0"):
        qnk.PQConfig(block_size=8.0)


def test_fused_encoder_does_not_read_the_dense_weight():
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    qnk.quantize_(model, CONFIG)
    assert type(model.layers[0].linear1) is PQLinear and not isinstance(model.layers[0].linear1, NoisyLinear)
    calls = []
    model.layers[0].linear1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert model(torch.randn(2, 5, 16)).isfinite().all()
    assert calls == [1]
