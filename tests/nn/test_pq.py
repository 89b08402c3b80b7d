"""PQLinear, PQEmbedding, PQConv2d: decoding, gradients, casts, ties, compilation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from numeric import relative_error
from torch import nn

from qnkernels import functional, kmeans
from qnkernels.nn import NoisyLinear, PQConv2d, PQEmbedding, PQLinear
from qnkernels.nn.compressed import become_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (in, out, block, K): one block a row, prime sizes, fewer blocks than centroids, 16-bit codes
SHAPES = [(8, 5, 8, 4), (21, 13, 3, 16), (6, 2, 2, 256), (24, 67, 2, 300), (5, 1, 1, 2)]
CONVS = {
    "3x3": (dict(padding=1), 9),
    "even and dilated, same": (dict(kernel_size=(2, 3), padding="same", dilation=(1, 2)), 4),
    "strided, reflected, without bias": (dict(stride=2, padding=1, padding_mode="reflect", bias=False), 3),
    "1x1": (dict(kernel_size=1), 2),
    "groups": (dict(groups=2, padding=(0, 2)), 9),
}


def make_conv(kind: str) -> tuple[nn.Conv2d, int]:
    options, block = CONVS[kind]
    return nn.Conv2d(4, 6, **{"kernel_size": 3, **options}), block


def plain_twin(layer: PQConv2d | PQLinear, plain: nn.Module) -> nn.Module:
    """The plain layer with the decoded weight."""
    twin = copy.deepcopy(plain)
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
    return twin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "rows", "block", "clusters"), SHAPES)
def test_linear_is_the_kmeans_of_its_blocks(columns, rows, block, clusters, dtype):
    torch.manual_seed(columns)
    linear = nn.Linear(columns, rows, dtype=dtype)
    layer = PQLinear.from_linear(linear, block, clusters, n_iter=4, seed=7)
    n_blocks = columns // block
    count = min(clusters, rows * n_blocks)
    expected = kmeans(linear.weight.detach().reshape(-1, block), count, 4, seed=7)
    assert layer.codes.shape == (rows, n_blocks) and layer.codes.t().is_contiguous()
    assert layer.codes.dtype == (torch.uint8 if count <= 256 else torch.uint16)
    assert torch.equal(layer.codes.int().reshape(-1), expected.codes)
    assert layer.codebook.dtype == dtype and layer.bias is linear.bias
    assert torch.equal(layer.codebook, expected.centroids.to(dtype))
    decoded = expected.centroids.to(dtype)[expected.codes.long()].reshape(rows, columns)
    assert torch.equal(layer.weight, decoded) and (layer.block_size, layer.n_centroids) == (block, count)


@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,), (17,), (70,)])
@pytest.mark.parametrize(("columns", "rows", "block", "clusters"), SHAPES)
def test_linear_against_the_dense_layer_in_float64(columns, rows, block, clusters, shape):
    torch.manual_seed(rows)
    layer = PQLinear.from_linear(nn.Linear(columns, rows), block, clusters, 3, codebook_grad="sum")
    x = torch.randn(*shape, columns, requires_grad=True)
    codebook, exact = layer.codebook.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    weight = codebook[layer.codes.long()].flatten(1)
    bias = layer.bias.detach().double().requires_grad_()
    y, expected = layer(x), F.linear(exact, weight, bias)
    assert y.shape == expected.shape and y.dtype == torch.float32
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    if not y.numel():
        return
    assert relative_error(y, expected) < 1e-4
    for actual, reference in ((x, exact), (layer.codebook, codebook), (layer.bias, bias)):
        assert relative_error(actual.grad, reference.grad) < 1e-4


def test_gradient_of_a_codeword_is_the_mean_over_its_blocks_by_default():
    torch.manual_seed(1)
    linear = nn.Linear(12, 10)
    mean, total = (PQLinear.from_linear(linear, 4, 8, 3, codebook_grad=option) for option in ("mean", "sum"))
    x = torch.randn(9, 12)
    for layer in (mean, total):
        layer(x).square().sum().backward()
    counts = torch.bincount(mean.codes.int().flatten(), minlength=8).clamp(min=1)[:, None]
    torch.testing.assert_close(mean.codebook.grad * counts, total.codebook.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv", "conv, groups"])
def test_gradcheck(kind):
    torch.manual_seed(2)
    options = dict(block_size=2, n_centroids=4, n_iter=2, codebook_grad="sum")
    if kind == "linear":
        layer, x = PQLinear.from_linear(nn.Linear(6, 5), **options), torch.randn(3, 6)
    elif kind == "embedding":
        layer, x = PQEmbedding.from_embedding(nn.Embedding(7, 4), **options), torch.tensor([[1, 6], [1, 0]])
    else:
        conv = nn.Conv2d(2, 4, 2, padding=1, groups=2 if "groups" in kind else 1)
        layer, x = PQConv2d.from_conv2d(conv, **options), torch.randn(2, 2, 3, 4)
    layer.double()
    inputs = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]
    if x.is_floating_point():
        inputs.append(x.double().requires_grad_())

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        arguments = tensors[len(names) :] or (x,)
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=False)), arguments)

    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clusters", [16, 300])
def test_embedding_reads_rows_of_the_decoded_table(dtype, clusters):
    torch.manual_seed(3)
    layer = PQEmbedding.from_embedding(nn.Embedding(201, 6, dtype=dtype), 2, clusters, 2)
    table = layer.weight
    assert table.dtype == dtype and table.shape == (201, 6)
    for indices in (torch.tensor(200), torch.randint(0, 201, (3, 0)), torch.randint(0, 201, (2, 5))):
        assert torch.equal(layer(indices), table[indices])
    assert torch.equal(layer(torch.tensor([1, 2], dtype=torch.int32)), table[1:3])
    with pytest.raises(IndexError):
        layer(torch.tensor([201]))


@pytest.mark.parametrize("zero", [True, False])
def test_padding_gets_no_gradient_and_a_row_of_zeros_stays_one(zero):
    torch.manual_seed(4)
    embedding = nn.Embedding(9, 8, padding_idx=-2)
    if not zero:
        nn.init.normal_(embedding.weight)
    layer = PQEmbedding.from_embedding(embedding, 4, 4, 3)
    assert layer.padding_idx == 7 and layer.zero_padding is zero
    row = layer(torch.tensor(7))
    assert torch.equal(row, layer.weight[7]) and (row == 0).all() == zero
    layer(torch.tensor([7, 7])).sum().backward()
    assert torch.equal(layer.codebook.grad, torch.zeros(4, 4))
    layer(torch.tensor([7, 1, 7])).sum().backward()
    with_padding = layer.codebook.grad.clone()
    layer.codebook.grad = None
    layer(torch.tensor([1])).sum().backward()
    assert torch.equal(layer.codebook.grad, with_padding) and with_padding.abs().sum() > 0


@pytest.mark.parametrize("kind", CONVS)
def test_conv_is_nn_conv2d_over_the_decoded_filters(kind):
    torch.manual_seed(5)
    conv, block = make_conv(kind)
    layer = PQConv2d.from_conv2d(conv, block, 8, 3, codebook_grad="sum")
    twin = plain_twin(layer, conv)
    assert layer.weight.shape == conv.weight.shape
    for x in (torch.randn(2, 4, 8, 7), torch.randn(4, 5, 9), torch.randn(0, 4, 6, 6)):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(a), twin(b)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    blocks = twin.weight.grad.reshape(-1, block)
    sums = torch.zeros(layer.n_centroids, block).index_add_(0, layer.codes.int().flatten(), blocks)
    torch.testing.assert_close(layer.codebook.grad, sums, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"x: expected \[batch, 4, h, w\] or .*, got shape \(2, 3, 4, 4\)"):
        layer(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("trained", [True, False])
def test_no_dense_weight_gradient_is_made(trained):
    """Of the tensors that the backward of a trained layer saves or makes none is as large as the weight."""
    torch.manual_seed(6)
    layer = PQConv2d.from_conv2d(nn.Conv2d(64, 128, 3), 9, 16, 1)
    layer.codebook.requires_grad_(trained)
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                sizes.append(tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return result

    x = torch.randn(1, 64, 4, 4, requires_grad=True)
    with Largest():
        layer(x).sum().backward()
    assert (max(sizes) < 64 * 9 * 128) == trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_reach_the_codebook_and_never_the_codes(dtype):
    torch.manual_seed(7)
    layer = PQLinear.from_linear(nn.Linear(8, 300), 1, 300, 2)
    codes, codebook = layer.codes.clone(), layer.codebook
    assert layer.to(dtype) is layer and layer.codebook is codebook
    assert layer.codebook.dtype == layer.bias.dtype == layer.weight.dtype == dtype
    assert layer.codes.dtype == torch.uint16 and torch.equal(layer.codes, codes)
    assert layer.codes.t().is_contiguous() and layer(torch.randn(2, 8, dtype=dtype)).dtype == dtype


def test_autocast_gives_the_dtype_of_the_plain_layers():
    linear, conv = nn.Linear(8, 4), nn.Conv2d(2, 3, 2)
    cases = [
        (PQLinear.from_linear(linear, 4, 4, 2), linear, torch.randn(2, 8)),
        (PQConv2d.from_conv2d(conv, 4, 4, 2), conv, torch.randn(1, 2, 4, 4)),
    ]
    for layer, plain, x in cases:
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == plain(x).dtype == torch.bfloat16
            with torch.no_grad():
                assert layer(x).dtype == torch.bfloat16
        y.float().sum().backward()
        assert x.grad.dtype == layer.codebook.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_codewords_are_rounded_where_they_are_used(dtype):
    torch.manual_seed(8)
    linear = nn.Linear(16, 12)
    layer = PQLinear.from_linear(linear, 4, 8, 3, codebook_dtype=dtype)
    if dtype == torch.int8:
        scale = layer.codebook.detach().abs().max() / 127
        expected = torch.round(layer.codebook.detach() / scale) * scale
        torch.testing.assert_close(layer.codebook_scale, scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.codewords(), expected)
    else:
        assert torch.equal(layer.codewords(), layer.codebook.to(dtype).float())
    assert layer.codebook.dtype == torch.float32 and torch.equal(
        layer.weight, layer.codewords()[layer.codes.long()].flatten(1)
    )
    assert not torch.equal(layer.codewords(), layer.codebook)
    plain = PQLinear.from_linear(linear, 4, 8, 3)
    x = torch.randn(5, 16)
    for module in (layer, plain):
        module(x).sum().backward()
    torch.testing.assert_close(layer.codebook.grad, plain.codebook.grad, rtol=1e-6, atol=1e-7)


def test_int8_scale_is_followed_in_training_and_kept_in_eval():
    layer = PQLinear.from_linear(nn.Linear(16, 12), 4, 8, 3, codebook_dtype=torch.int8)
    scale, x = layer.codebook_scale.clone(), torch.randn(2, 16)
    with torch.no_grad():
        layer.codebook.mul_(2)
    layer.eval()(x)
    assert torch.equal(layer.codebook_scale, scale)
    assert layer.codewords().abs().max() <= 128 * scale
    layer.train()(x)
    torch.testing.assert_close(layer.codebook_scale, 2 * scale)
    layer.half()
    assert layer.codebook_scale.dtype == torch.float32


@pytest.mark.parametrize("codebook_dtype", [None, torch.float16, torch.int8])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv", "conv, groups"])
def test_layers_compile_whole_and_compute_the_same(kind, codebook_dtype):
    torch.manual_seed(9)
    options = dict(block_size=2, n_centroids=8, n_iter=2, codebook_dtype=codebook_dtype)
    if kind == "linear":
        layer, x = PQLinear.from_linear(nn.Linear(6, 5), **options), torch.randn(3, 6)
    elif kind == "embedding":
        layer = PQEmbedding.from_embedding(nn.Embedding(9, 4, padding_idx=0), **options)
        x = torch.tensor([[1, 0], [8, 2]])
    else:
        conv = nn.Conv2d(4, 6, 2, padding=1, groups=2 if "groups" in kind else 1)
        layer, x = PQConv2d.from_conv2d(conv, **options), torch.randn(2, 4, 5, 6)
    compiled = torch.compile(layer, fullgraph=True)
    expected = layer(x)
    expected.sum().backward()
    grad, layer.codebook.grad = layer.codebook.grad, None
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.codebook.grad, grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("clusters", [8, 300])
def test_deepcopy_and_state_dict_and_repr(clusters):
    torch.manual_seed(10)
    linear = nn.Linear(20, 64)
    layer = PQLinear.from_linear(linear, 4, clusters, 2)
    other = copy.deepcopy(layer)
    assert other.codes is not layer.codes and other.codes.t().is_contiguous()
    assert torch.equal(other.weight, layer.weight)
    assert list(layer.state_dict()) == ["codebook", "bias", "codes"]
    canonical = {name: tensor.detach().clone().contiguous() for name, tensor in layer.state_dict().items()}
    for assign in (False, True):
        fresh = PQLinear.from_linear(nn.Linear(20, 64), 4, clusters, 2)
        fresh.load_state_dict(canonical, assign=assign)
        assert torch.equal(fresh.weight, layer.weight) and fresh.codes.t().is_contiguous()
    assert repr(layer) == (
        f"PQLinear(in_features=20, out_features=64, bias=True, block_size=4, n_centroids={clusters})"
    )
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(64, 20)


def test_repr_of_the_others():
    conv = PQConv2d.from_conv2d(nn.Conv2d(2, 4, 3, padding=1), 9, 4, 1, codebook_grad="sum")
    assert repr(conv) == (
        "PQConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), block_size=9, n_centroids=4, "
        "codebook_grad='sum')"
    )
    embedding = PQEmbedding.from_embedding(
        nn.Embedding(9, 4, padding_idx=1), 2, 4, 1, codebook_dtype=torch.float16
    )
    assert repr(embedding) == (
        "PQEmbedding(9, 4, padding_idx=1, block_size=2, n_centroids=4, codebook_dtype=torch.float16)"
    )


def test_codes_that_cannot_be_loaded():
    layer = PQLinear.from_linear(nn.Linear(8, 3), 4, 5, 2)
    before = layer.codes.clone()
    state = layer.state_dict()
    for codes, message in (
        (torch.full((3, 2), 5, dtype=torch.uint8), "codes: expected values below the 5 centroids, got 5"),
        (torch.zeros(3, 2, dtype=torch.int64), "codes: expected torch.uint8, got torch.int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**state, "codes": codes})
        assert torch.equal(layer.codes, before)


def test_layers_over_one_weight_share_codes_and_codebook_through_moves_and_copies():
    torch.manual_seed(11)
    embedding = PQEmbedding.from_embedding(nn.Embedding(30, 8), 4, 8, 2)
    model = nn.ModuleList([embedding, PQLinear(embedding.pq)])
    for turned in (model, model.bfloat16(), copy.deepcopy(model)):
        assert turned[1].codes is turned[0].codes and turned[1].codebook is turned[0].codebook
        assert len(list(turned.parameters())) == 1
    model.float()
    model[1](model[0](torch.tensor([1, 2]))).sum().backward()
    assert embedding.codebook.grad.abs().sum() > 0


def test_become_keeps_references_hooks_and_flags():
    torch.manual_seed(12)
    noisy = NoisyLinear.from_linear(nn.Linear(8, 4), "block", block_size=4).eval()
    bias, calls = noisy.bias, []
    noisy.register_forward_hook(lambda *_: calls.append(1))
    become_(noisy, PQLinear.from_linear(noisy, 4, 4, 2))
    assert type(noisy) is PQLinear and noisy.bias is bias and not noisy.training
    assert not list(noisy.children()) and noisy(torch.ones(1, 8)).shape == (1, 4) and calls == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 3}, "block_size: expected a divisor of the 8 weights of a row, got 3"),
        ({"block_size": 0}, r"block_size: expected an integer in \[1, 64\], got 0"),
        ({"n_centroids": 1}, r"n_centroids: expected an integer in \[2, 65536\], got 1"),
        ({"n_centroids": 70000}, r"n_centroids: expected an integer in \[2, 65536\], got 70000"),
        ({"n_iter": 0}, "n_iter: expected an integer of at least 1, got 0"),
        ({"seed": -1}, r"seed: expected an integer in \[0, 9223372036854775807\], got -1"),
        ({"codebook_grad": "max"}, r"codebook_grad: expected one of \('mean', 'sum'\), got 'max'"),
        ({"codebook_dtype": torch.int4}, "codebook_dtype: expected None or one of .*, got torch.int4"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PQLinear.from_linear(nn.Linear(8, 4), **options)


def test_refuses_weights_and_embeddings_that_cannot_be():
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match="weight: expected finite values, got 1 of 16 NaN or infinite"):
        PQLinear.from_linear(linear, 4, 2)
    for options in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            PQEmbedding.from_embedding(nn.Embedding(5, 4, **options), 2, 4)


def test_weight_is_differentiable_for_those_who_multiply_by_it_themselves():
    layer = PQEmbedding.from_embedding(nn.Embedding(10, 4), 2, 4, 2, codebook_grad="sum")
    x, grad = torch.randn(3, 4), torch.randn(3, 10)
    F.linear(x, layer.weight).backward(grad)
    expected = functional.pq_linear(x, layer.codes, codebook := layer.codebook.detach().requires_grad_())
    assert expected.shape == (3, 10)
    by_hand = torch.autograd.grad(
        functional.pq_linear(x, layer.codes, codebook, codebook_grad="sum"), codebook, grad
    )
    torch.testing.assert_close(layer.codebook.grad, by_hand[0], rtol=1e-5, atol=1e-5)
