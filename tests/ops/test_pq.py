"""pq_decode, pq_linear, pq_embedding and their gradients, on the backend that serves and the reference."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numeric import DTYPES, assert_identical
from pairs import covering, name

import qnkernels as qnk
from qnkernels import functional as F

HALVES = (torch.bfloat16, torch.float16)
# In half precision two roundings are allowed, each of at most eps / 2: of the codebook to the dtype of x, and
# of the result. Sums are in fp32, where 1e-4 leaves room for tables of two 8-bit planes.
BOUND = {torch.float32: 1e-4} | {dtype: torch.finfo(dtype).eps for dtype in HALVES}

SIZES = {
    "d": (1, 2, 3, 4, 7, 8, 9, 16, 33, 64),
    "K": (1, 2, 16, 255, 256, 257, 1000, 4096),
    "m": (0, 1, 2, 3, 5, 16, 17, 40, 130),
    "out": (1, 5, 63, 64, 65, 300),
    "n_blocks": (1, 3, 17, 260, 513),
    "code": ("uint8", "uint16"),
    "layout": ("rows", "columns"),
}
LARGEST = 300_000  # weights of the dense layer


def possible(d, K, out, n_blocks, code, **rest) -> bool:
    return out * n_blocks * d <= LARGEST and (K <= 256 or code == "uint16")


CASES = list(covering(SIZES | {"x": ("plain", "column", "row"), "dtype": DTYPES}, possible))
# what kernels are most likely to treat apart, with every batch
COMMON = [(d, K) for d in (4, 8, 16) for K in (16, 256, 1024)]


@pytest.fixture(params=["served", "reference"])
def backend(request):
    return contextlib.nullcontext if request.param == "served" else lambda: qnk.backend("reference")


def seeded(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


def draw_codes(rows, n_blocks, K, code, layout, generator) -> torch.Tensor:
    codes = torch.randint(0, K, (rows, n_blocks), generator=generator).to(getattr(torch, code))
    return codes if layout == "rows" else codes.t().contiguous().t()


def dense(codes, codebook) -> torch.Tensor:
    """The decoded weight in float64."""
    return torch.from_numpy(codebook.detach().double().numpy()[codes.numpy()]).flatten(1)


def draw(m, columns, dtype, generator, kind="plain") -> torch.Tensor:
    """x or a gradient; with outliers where kind says so. In float16 small, so that no sum overflows."""
    x = torch.randn(m, columns, generator=generator) * (2**-6 if dtype == torch.float16 else 1)
    if kind == "column":
        x[:, torch.randint(columns, (), generator=generator)] *= 1000
    if kind == "row" and m:
        first = int(torch.randint(m, (), generator=generator))
        x[first : first + 16] *= 1000
    return x.to(dtype)


def assert_near(actual, expected, bound) -> None:
    """|actual - expected| <= bound |expected|, and half a unit of what the dtype resolves near 0."""
    assert actual.shape == expected.shape
    kind = torch.finfo(actual.dtype)
    resolved = kind.smallest_normal * kind.eps / 2 * actual.numel() ** 0.5
    distance, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    assert distance <= bound * norm + resolved, f"relative error {distance / norm:.2e}"


def codeword_sums(blocks, codes, K) -> torch.Tensor:
    """Float64 sums [K, d] of blocks [rows * n_blocks, d] by code."""
    sums = np.zeros((K, blocks.shape[1]))
    np.add.at(sums, codes.numpy().reshape(-1), blocks.detach().double().numpy())
    return torch.from_numpy(sums)


def counts(codes, K) -> torch.Tensor:
    return torch.from_numpy(np.bincount(codes.numpy().reshape(-1), minlength=K))[:, None]


def check_linear(backend, x, codes, codebook, bias, grad) -> None:
    """pq_linear and its gradients, the sum and the mean, against float64."""
    (K, d), weight, exact = codebook.shape, dense(codes, codebook), x.double()
    sums = codeword_sums((grad.double().t() @ exact).reshape(-1, d), codes, K)
    mean = sums / counts(codes, K).clamp(min=1)
    bound = BOUND[x.dtype]
    for kind, expected in (("sum", sums), ("mean", mean)):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, codebook, bias)]
        with backend():
            y = F.pq_linear(leaves[0], codes, *leaves[1:], codebook_grad=kind)
            y.backward(grad)
        assert y.dtype == x.dtype
        assert_near(y.detach(), exact @ weight.t() + bias.double(), bound)
        assert [leaf.grad.dtype for leaf in leaves] == [x.dtype, codebook.dtype, bias.dtype]
        assert_near(leaves[0].grad, grad.double() @ weight, bound)
        assert_near(leaves[1].grad, expected, max(bound, BOUND[codebook.dtype]))
        assert_near(leaves[2].grad, grad.double().sum(0), BOUND[bias.dtype])


@pytest.mark.parametrize("case", CASES, ids=name)
def test_linear_against_float64(backend, case):
    d, K, m, out, n_blocks, code, layout, kind, dtype = case.values()
    generator = seeded(d, K, m, out, n_blocks)
    codes = draw_codes(out, n_blocks, K, code, layout, generator)
    codebook, bias = torch.randn(K, d, generator=generator), torch.randn(out, generator=generator)
    x, grad = draw(m, n_blocks * d, dtype, generator, kind), draw(m, out, dtype, generator)
    check_linear(backend, x, codes, codebook, bias, grad)


@pytest.mark.parametrize(("d", "K"), COMMON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_common_codebooks_with_every_batch(d, K, dtype):
    """The codebook in the dtype of x, as in a half-precision model."""
    generator = seeded(d, K)
    code = "uint8" if K <= 256 else "uint16"
    codes = draw_codes(192, 33, K, code, "columns", generator)
    codebook = torch.randn(K, d, generator=generator).to(dtype)
    bias = torch.randn(192, generator=generator).to(dtype)
    for m in (*SIZES["m"], 32, 64, 256):
        for kind in ("plain", "column", "row"):
            x, grad = draw(m, 33 * d, dtype, generator, kind), draw(m, 192, dtype, generator)
            check_linear(contextlib.nullcontext, x, codes, codebook, bias, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_row_does_not_spoil_the_others(dtype):
    generator = seeded(9)
    codes = draw_codes(192, 40, 256, "uint8", "columns", generator)
    codebook = torch.randn(256, 8, generator=generator)
    for m in (2, 5, 17, 130):
        x = draw(m, 320, dtype, generator)
        x[m // 2] *= 1000
        y, expected = F.pq_linear(x, codes, codebook), x.double() @ dense(codes, codebook).t()
        for actual, exact in zip(y, expected, strict=True):
            assert_near(actual, exact, BOUND[dtype])


@pytest.mark.parametrize("d", [4, 8])
def test_linear_of_many_blocks_does_not_overflow(d):
    """x and codebook of one sign, in long rows: where sums in 16 bits would wrap."""
    generator = seeded(d)
    codes = draw_codes(70, 1030, 256, "uint8", "columns", generator)
    codebook = torch.rand(256, d, generator=generator) + 1
    for m in (1, 2, 17, 70):
        x = torch.rand(m, 1030 * d, generator=generator) + 1
        for sign in (1, -1):
            y = F.pq_linear(sign * x, codes, codebook)
            expected = sign * (x.double() @ dense(codes, codebook).t())
            assert ((y.double() - expected).abs() <= 1e-4 * expected.abs()).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_linear_at_other_magnitudes(backend, scale):
    generator = seeded(int(np.log10(scale)) + 100)
    codes = draw_codes(65, 17, 256, "uint8", "rows", generator)
    codebook = torch.randn(256, 8, generator=generator)
    for m in (1, 16, 130):
        x = torch.randn(m, 136, generator=generator)
        expected = (x * scale).double() @ dense(codes, codebook).t()
        with backend():
            assert_near(F.pq_linear(x * scale, codes, codebook), expected, 1e-4)
            assert_near(F.pq_linear(x, codes, codebook * scale), expected, 1e-4)


def test_rows_of_zeros_and_a_codebook_of_zeros(backend):
    generator = seeded(1)
    codes = draw_codes(65, 17, 256, "uint8", "rows", generator)
    codebook, bias = torch.randn(256, 8, generator=generator), torch.randn(65, generator=generator)
    for m in (1, 17, 130):
        x = torch.randn(m, 136, generator=generator)
        with backend():
            assert_identical(F.pq_linear(x, codes, torch.zeros(256, 8), bias), bias.expand(m, 65))
            mixed = x.clone()
            mixed[m // 2] = 0
            assert_identical(F.pq_linear(mixed, codes, codebook, bias)[m // 2], bias)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite_rows_are_told_and_leave_the_others_alone(backend, poison):
    generator = seeded(2)
    codes = draw_codes(65, 17, 256, "uint8", "rows", generator)
    codebook = torch.randn(256, 8, generator=generator)
    for m in (1, 3, 17, 130):
        x = torch.randn(m, 136, generator=generator)
        x[m // 2, 5] = poison
        with backend():
            y = F.pq_linear(x, codes, codebook)
        assert not y[m // 2].isfinite().any()
        others = torch.arange(m) != m // 2
        if others.any():
            assert_near(y[others], x[others].double() @ dense(codes, codebook).t(), 1e-4)


def test_codes_of_all_sixteen_bits(backend):
    generator = seeded(10)
    codes = draw_codes(65, 3, 65_536, "uint16", "columns", generator)
    codes[0, 0], codes[64, 2] = 65_535, 32_768
    codebook, bias = torch.randn(65_536, 2, generator=generator), torch.zeros(65)
    for m in (1, 16, 70):
        x, grad = (draw(m, n, torch.float32, generator) for n in (6, 65))
        check_linear(backend, x, codes, codebook, bias, grad)
    with backend():
        assert_identical(F.pq_decode(codes, codebook), dense(codes, codebook).float())
        rows = torch.tensor([64, 0])
        assert_identical(F.pq_embedding(rows, codes, codebook), dense(codes, codebook).float()[rows])


MEMORY = """
import sys, torch
from qnkernels import functional as F
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))
def run(rows, batch, train):
    codes = torch.randint(0, 256, (512, rows), dtype=torch.uint8).t()
    codebook = torch.randn(256, 8, requires_grad=train)
    y = F.pq_linear(torch.randn(batch, 4096, requires_grad=train), codes, codebook)
    if train: y.sum().backward()
for batch, train in ((1, False), (16, False), (8, True)):
    run(128, batch, train)  # threads, buffers of a fixed size
    before = peak()
    run(8192, batch, train)
    print(peak() - before)
"""


def test_neither_the_dense_weight_nor_its_gradient_is_built():
    """8192x4096: 128 MiB in fp32, where the codes are 4 MiB. What a small batch may take is a quarter."""
    environment = {**os.environ, "PYTHONPATH": str(Path(qnk.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(int(grown) < 32 for grown in run.stdout.split()), run.stdout


def test_linear_without_bias_and_with_shapes_of_x(backend):
    generator = seeded(3)
    codes = draw_codes(30, 5, 40, "uint8", "rows", generator)
    codebook = torch.randn(40, 4, generator=generator)
    x = torch.randn(2, 3, 7, 20, generator=generator)
    expected = x.double() @ dense(codes, codebook).t()
    with backend():
        for given, wanted in (
            (x, expected),
            (x[0, 0, 0], expected[0, 0, 0]),
            (x.transpose(0, 2), expected.transpose(0, 2)),
            (x[..., ::2, :], expected[..., ::2, :]),
        ):
            assert_near(F.pq_linear(given, codes, codebook), wanted, 1e-4)
        assert F.pq_linear(x[:0], codes, codebook).shape == (0, 3, 7, 30)


def test_gradients_of_an_expanded_upstream_and_of_chosen_inputs(backend):
    generator = seeded(4)
    codes = draw_codes(30, 5, 40, "uint8", "rows", generator)
    codebook = torch.randn(40, 4, generator=generator, requires_grad=True)
    x = torch.randn(3, 20, generator=generator)
    with backend():
        F.pq_linear(x, codes, codebook, codebook_grad="sum").sum().backward()
    assert x.grad is None
    blocks = x.double().sum(0).reshape(1, 5, 4).expand(30, 5, 4).reshape(-1, 4)
    assert_near(codebook.grad, codeword_sums(blocks, codes, 40), 1e-4)
    x = x.requires_grad_()
    with backend():
        (grad,) = torch.autograd.grad(F.pq_linear(x, codes, codebook.detach()).sum(), x)
    assert_near(grad, dense(codes, codebook).sum(0).expand(3, 20), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_codebook_of_another_dtype_than_x(backend, dtype):
    generator = seeded(5)
    codes = draw_codes(33, 6, 256, "uint8", "rows", generator)
    for other in set(DTYPES) - {dtype}:
        codebook = torch.randn(256, 8, generator=generator).to(other)
        for m in (1, 16, 70):
            x, grad = (draw(m, n, dtype, generator) for n in (48, 33))
            check_linear(backend, x, codes, codebook, torch.zeros(33), grad)


def test_linear_and_gradients_of_the_golden_layer(backend):
    """What fairseq's PQLinear gives: output, gradient of x, gradient of the codewords as a sum."""
    file = np.load(Path(__file__).parents[1] / "data" / "fairseq_product.npz")
    golden = {key: torch.from_numpy(file[key]) for key in file}
    # stored for block after block, all rows of each
    codes = golden["pq8_assignments"].reshape(12, 128).t().to(torch.uint8)
    codebook, x = golden["pq8_centroids"].requires_grad_(), golden["layer_x"].requires_grad_()
    with backend():
        assert_identical(F.pq_decode(codes, codebook).detach(), golden["pq8_decoded"])
        y = F.pq_linear(x, codes, codebook, golden["layer_bias"], codebook_grad="sum")
        y.backward(golden["layer_grad_out"])
    assert_near(y.detach(), golden["layer_y"], 1e-4)
    assert_near(x.grad, golden["layer_grad_x"], 1e-4)
    assert_near(codebook.grad, golden["layer_grad_centroids_sum"], 1e-4)
    assert_identical(counts(codes, 64)[:, 0].float(), golden["layer_counts"])


DECODE = {key: SIZES[key] for key in ("d", "K", "out", "n_blocks", "code", "layout")} | {"dtype": DTYPES}


@pytest.mark.parametrize("case", list(covering(DECODE, possible)), ids=name)
def test_decode_and_embedding_are_exact(backend, case):
    """They copy codewords; their gradients are sums in fp32."""
    d, K, rows, n_blocks, code, layout, dtype = case.values()
    generator = seeded(d, K, rows, n_blocks)
    codes = draw_codes(rows, n_blocks, K, code, layout, generator)
    codebook = torch.randn(K, d, generator=generator).to(dtype)
    weight = dense(codes, codebook).to(dtype)
    grad = torch.randn(rows, n_blocks * d, generator=generator).to(dtype)
    indices = torch.randint(0, rows, (3, 7), generator=generator)
    row_grad = torch.randn(3, 7, n_blocks * d, generator=generator).to(dtype)
    picked = torch.from_numpy(codes.numpy()[indices.numpy()])
    sums = (
        codeword_sums(grad.reshape(-1, d), codes, K),
        codeword_sums(row_grad.reshape(-1, d), picked, K),
    )
    for kind, divisor in (("sum", 1), ("mean", counts(codes, K).clamp(min=1))):
        leaves = [codebook.clone().requires_grad_() for _ in sums]
        with backend():
            decoded = F.pq_decode(codes, leaves[0], kind)
            embedded = F.pq_embedding(indices, codes, leaves[1], kind)
            decoded.backward(grad)
            embedded.backward(row_grad)
        assert_identical(decoded.detach(), weight)
        assert_identical(embedded.detach(), weight[indices])
        for leaf, total in zip(leaves, sums, strict=True):
            assert leaf.grad.dtype == dtype
            assert_near(leaf.grad, total / divisor, BOUND[dtype])


def test_embedding_shapes_and_repeated_indices(backend):
    generator = seeded(6)
    codes = draw_codes(10, 3, 16, "uint8", "rows", generator)
    codebook = torch.randn(16, 4, generator=generator, requires_grad=True)
    weight = dense(codes, codebook).float()
    with backend():
        assert_identical(F.pq_embedding(torch.tensor(3), codes, codebook).detach(), weight[3])
        strided = torch.arange(10).reshape(2, 5).t()
        assert_identical(F.pq_embedding(strided, codes, codebook).detach(), weight[strided])
        assert F.pq_embedding(torch.empty(0, 5, dtype=torch.int64), codes, codebook).shape == (0, 5, 12)
        F.pq_embedding(torch.full((1000,), 3), codes, codebook, "sum").sum().backward()
    expected = 1000.0 * torch.from_numpy(np.bincount(codes[3].numpy(), minlength=16))
    assert_identical(codebook.grad, expected[:, None].expand(16, 4).float())


@pytest.mark.parametrize("index", [-1, 31, 2**40])
def test_embedding_index_outside(index):
    codes = torch.zeros(31, 2, dtype=torch.uint8)
    with pytest.raises(IndexError):
        F.pq_embedding(torch.tensor([0, index]), codes, torch.ones(4, 8))


def double(*shape, generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gradcheck(layout):
    generator = seeded(7)
    codes = draw_codes(6, 3, 5, "uint8", layout, generator)
    x, codebook, bias = (double(*shape, generator=generator) for shape in ((4, 12), (5, 4), (6,)))
    assert torch.autograd.gradcheck(lambda *t: F.pq_linear(t[0], codes, *t[1:], "sum"), (x, codebook, bias))
    assert torch.autograd.gradcheck(lambda c: F.pq_decode(codes, c, "sum"), (codebook,))
    indices = torch.tensor([[0, 5, 5], [2, 1, 0]])
    assert torch.autograd.gradcheck(lambda c: F.pq_embedding(indices, codes, c, "sum"), (codebook,))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_opcheck(layout):
    generator, ops = seeded(8), torch.ops.qnkernels
    codes = draw_codes(6, 3, 20, "uint8", layout, generator)
    codebook = torch.randn(20, 4, generator=generator, requires_grad=True)
    x, bias = torch.randn(2, 5, 12, requires_grad=True), torch.randn(6, requires_grad=True)
    indices = torch.tensor([[0, 5, 5], [2, 1, 0]])
    torch.library.opcheck(ops.pq_decode.default, (codes, codebook, "sum"))
    torch.library.opcheck(ops.pq_decode_backward.default, (torch.randn(6, 12), codes, 20, True))
    torch.library.opcheck(ops.pq_linear.default, (x, codes, codebook, bias))
    torch.library.opcheck(ops.pq_linear.default, (x, codes, codebook, None, "sum"))
    plain = (torch.randn(2, 5, 6), x.detach(), codes, codebook.detach(), False)
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.pq_linear_backward.default, (*plain, *needed))
    torch.library.opcheck(ops.pq_embedding.default, (indices, codes, codebook))
    arguments = (torch.randn(2, 3, 12), indices, codes, 20, True)
    torch.library.opcheck(ops.pq_embedding_backward.default, arguments)
