"""pq_decode, pq_linear, pq_embedding and their gradients under the interpreter, against float64."""

import itertools

import pytest
import torch
from helpers_pq_linear import assert_near, by_codeword, weight
from numeric import DTYPES, assert_identical

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.backends import kernels

# rows of the weight, blocks, d, centroids: one of each; odd; one past a tile; many centroids; wide blocks
WEIGHTS = (
    (1, 1, 1, 1),
    (5, 7, 3, 4),
    (33, 20, 8, 256),
    (67, 9, 4, 300),
    (17, 5, 9, 2),
    (40, 3, 33, 7),
    (19, 2, 64, 16),
)
ROWS = (1, 2, 3, 4, 5, 16, 17, 70)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_linear_against_float64(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    turn = WEIGHTS.index(shape) + DTYPES.index(dtype)
    for index, m in enumerate(ROWS):
        transposed = (index // 2 + turn) % 2 == 1
        # every other time the codebook comes in another dtype, with values that both have
        codes, codebook, decoded = weight(*shape, torch.bfloat16, transposed, generator)
        codebook = codebook.to(dtype if m % 2 else torch.float32)
        decoded = decoded if dtype != torch.float16 else codebook.half().double()[codes.long()].flatten(1)
        x = torch.randn(m, decoded.shape[1], generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator).to(dtype) if transposed else None
        y = kernels("triton")["pq_linear"](x, codes, codebook, bias)
        shift = torch.zeros(shape[0]).double() if bias is None else bias.double()
        exact, magnitude = x.double() @ decoded.T + shift, x.double().abs() @ decoded.abs().T + shift.abs()
        assert_near(y, exact, magnitude, x.shape[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_linear_backward_against_float64(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    n_centroids = shape[3]
    for m, transposed in ((1, False), (16, True), (17, False), (70, True)):
        codes, codebook, decoded = weight(*shape, dtype, transposed, generator)
        x = torch.randn(m, decoded.shape[1], generator=generator).to(dtype)
        grad = torch.randn(m, shape[0], generator=generator).to(dtype)
        mean = not transposed
        arguments = (grad, x, codes, codebook, mean)
        grad_x, grad_codebook = kernels("triton")["pq_linear_backward"](*arguments, True, True)
        assert_near(grad_x, grad.double() @ decoded, grad.double().abs() @ decoded.abs(), shape[0], dtype)
        dense, magnitude = grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs()
        blocks = [one.reshape(codes.numel(), -1) for one in (dense, magnitude)]
        sums = [by_codeword(one, codes, n_centroids, mean) for one in blocks]
        assert_near(grad_codebook, *sums, m, torch.float32)
        if m > 1:
            continue
        only_x, nothing = kernels("triton")["pq_linear_backward"](*arguments, True, False)
        assert_identical(only_x, grad_x)
        assert nothing.shape == (0,) and nothing.dtype == torch.float32
        nothing, only_codebook = kernels("triton")["pq_linear_backward"](*arguments, False, True)
        assert_identical(only_codebook, grad_codebook)
        assert nothing.shape == (0,) and nothing.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*WEIGHTS, (70, 37, 8, 11)], ids=str)
def test_decode_and_embedding_equal_the_reference(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape) + 2)
    for transposed in (False, True):
        codes, codebook, _ = weight(*shape, dtype, transposed, generator)
        indices = torch.randint(0, shape[0], (23,), generator=generator)
        for name, arguments in (("pq_decode", ()), ("pq_embedding", (indices,))):
            results = (kernels(b)[name](*arguments, codes, codebook) for b in ("triton", "reference"))
            assert_identical(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*WEIGHTS, (70, 37, 8, 11)], ids=str)
def test_gradients_of_decode_and_embedding(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape) + 3)
    rows, n_blocks, d, n_centroids = shape
    for transposed, mean in itertools.product((False, True), (False, True)):
        codes, _, decoded = weight(*shape, dtype, transposed, generator)
        indices = torch.randint(0, rows, (29,), generator=generator)
        grad = torch.randn(decoded.shape, generator=generator).to(dtype)
        found = kernels("triton")["pq_decode_backward"](grad, codes, n_centroids, mean)
        blocks = grad.double().reshape(codes.numel(), d)
        sums = [by_codeword(one, codes, n_centroids, mean) for one in (blocks, blocks.abs())]
        assert_near(found, *sums, 1, dtype)
        grad = torch.randn(29, n_blocks * d, generator=generator).to(dtype)
        found = kernels("triton")["pq_embedding_backward"](grad, indices, codes, n_centroids, mean)
        table = torch.zeros(rows, n_blocks * d, dtype=torch.float64).index_add_(0, indices, grad.double())
        magnitude = torch.zeros_like(table).index_add_(0, indices, grad.double().abs())
        blocks = [one.reshape(codes.numel(), d) for one in (table, magnitude)]
        sums = [by_codeword(one, codes, n_centroids, mean) for one in blocks]
        assert_near(found, *sums, 1, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_reach_the_gradients(value):
    generator = torch.Generator().manual_seed(0)
    codes, codebook, _ = weight(6, 4, 8, 5, torch.float32, False, generator)
    grad, x = torch.randn(3, 6), torch.randn(3, 32)
    wide = torch.randn(6, 32)
    grad[1, 2] = wide[2, 3] = value
    ours = kernels("triton")
    assert not ours["pq_linear_backward"](grad, x, codes, codebook, True, False, True)[1].isfinite().any()
    assert not ours["pq_decode_backward"](wide, codes, 5, False).isfinite().any()
    assert not ours["pq_embedding_backward"](wide, torch.arange(6), codes, 5, True).isfinite().any()
    x[1, 5] = value
    for rows in (x, x.repeat(6, 1)):
        y = ours["pq_linear"](rows, codes, codebook, None)
        assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2].isfinite().all()


def test_gradients_of_zeros_and_of_extreme_sizes():
    codes, _, _ = weight(6, 4, 8, 5, torch.float32, False, torch.Generator().manual_seed(1))
    backward = kernels("triton")["pq_decode_backward"]
    assert_identical(backward(torch.zeros(6, 32), codes, 5, True), torch.zeros(5, 8))
    for scale in (1e-37, 1e30):
        grad = torch.randn(6, 32) * scale
        exact = by_codeword(grad.double().reshape(-1, 8), codes, 5, True)
        torch.testing.assert_close(
            backward(grad, codes, 5, True).double(), exact, rtol=1e-5, atol=1e-7 * scale
        )


def test_a_codeword_that_is_not_finite_stays_where_it_is_used():
    """Codeword 0 fills idle lanes and rows, which must not spread its infinity."""
    generator = torch.Generator().manual_seed(2)
    codes, codebook, _ = weight(9, 3, 5, 4, torch.float32, False, generator)
    codes = codes.clamp(min=1)
    codes[4, 1] = 0
    codebook[0] = float("inf")
    for m in (1, 5, 17):
        y = kernels("triton")["pq_linear"](torch.rand(m, 15) + 0.5, codes, codebook, None)
        assert y[:, 4].isinf().all() and y[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    grad_x, _ = kernels("triton")["pq_linear_backward"](
        torch.rand(2, 9) + 0.5, torch.rand(2, 15), codes, codebook, True, True, False
    )
    assert grad_x[:, 5:10].isinf().all() and grad_x[:, [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]].isfinite().all()


def test_embedding_clamps_indices_to_the_table():
    codes, codebook, _ = weight(6, 3, 8, 5, torch.float32, False, torch.Generator().manual_seed(3))
    embedding = kernels("triton")["pq_embedding"]
    for index, row in ((-1, 0), (6, 5), (2**40, 5), (-(2**40), 0)):
        assert_identical(
            embedding(torch.tensor([index]), codes, codebook), embedding(torch.tensor([row]), codes, codebook)
        )
    with pytest.raises(IndexError, match="indices"):
        embedding(torch.tensor([0]), codes[:0], codebook)


def test_codes_past_the_codebook_read_its_end_and_get_no_gradient():
    codes, codebook, _ = weight(9, 3, 8, 5, torch.float32, False, torch.Generator().manual_seed(5))
    codes[4, 1] = 255
    last = codes.clone()
    last[4, 1] = 4
    ours = kernels("triton")
    for m in (1, 17):
        x, grad = torch.randn(m, 24), torch.randn(m, 9)
        assert_identical(*(ours["pq_linear"](x, one, codebook, None) for one in (codes, last)))
        found, whole = (
            ours["pq_linear_backward"](grad, x, one, codebook, False, True, True) for one in (codes, last)
        )
        assert_identical(found[0], whole[0])
        block = (grad.T @ x)[4, 8:16]
        torch.testing.assert_close(whole[1][4] - found[1][4], block, rtol=1e-4, atol=1e-5)
        assert_identical(found[1][:4], whole[1][:4])
    assert_identical(*(ours["pq_decode"](one, codebook) for one in (codes, last)))
    dense = torch.ones(9, 24)
    found, whole = (ours["pq_decode_backward"](dense, one, 5, False) for one in (codes, last))
    assert_identical(whole[4] - found[4], torch.ones(8))


def test_empty():
    codes, codebook, _ = weight(6, 3, 8, 5, torch.float32, False, torch.Generator().manual_seed(4))
    ours = kernels("triton")
    none = torch.empty(0, dtype=torch.int64)
    assert ours["pq_linear"](torch.empty(0, 24), codes, codebook, None).shape == (0, 6)
    grad_x, grad_codebook = ours["pq_linear_backward"](
        torch.empty(0, 6), torch.empty(0, 24), codes, codebook, True, True, True
    )
    assert grad_x.shape == (0, 24)
    assert_identical(grad_codebook, torch.zeros(5, 8))
    assert ours["pq_decode"](codes[:0], codebook).shape == (0, 24)
    assert_identical(
        ours["pq_decode_backward"](torch.empty(0, 24), codes[:0], 5, True), torch.zeros(5, 0 + 8)
    )
    assert ours["pq_embedding"](none, codes, codebook).shape == (0, 24)
    assert_identical(
        ours["pq_embedding_backward"](torch.empty(0, 24), none, codes, 5, True), torch.zeros(5, 8)
    )


def test_a_weight_without_columns():
    codes, codebook = torch.empty(3, 0, dtype=torch.uint8), torch.randn(4, 8)
    bias = torch.randn(3)
    for m in (1, 17):
        y = kernels("triton")["pq_linear"](torch.empty(m, 0), codes, codebook, bias)
        assert_identical(y, bias.expand(m, 3).contiguous())


def test_through_the_public_face():
    """Gradients of x, codebook and bias, with leading dimensions and views, as a caller meets them."""
    generator = torch.Generator().manual_seed(6)
    codes, codebook, _ = weight(10, 6, 4, 16, torch.float32, True, generator)
    x, bias = torch.randn(24, 3, 2, generator=generator), torch.randn(10, generator=generator)
    results = []
    for name in ("triton", "reference"):
        inputs = [one.clone().requires_grad_() for one in (x, codebook, bias)]
        with qnk.backend(name):
            y = F.pq_linear(inputs[0].permute(2, 1, 0), codes, *inputs[1:])
            results.append((y, *torch.autograd.grad((y * y).sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
