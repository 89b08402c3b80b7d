"""The CUDA kernels that decode weights in the emulator, bit for bit, and products of many tokens by them."""

import pytest
import torch
from helpers_emulator import TYPES, alignment, emulated, launches, processors
from helpers_int_linear import UNIT, assert_within, output_rounding, random_packed
from helpers_pq_linear import SOURCES, assert_near, weight
from numeric import DTYPES, assert_identical

from qnkernels.backends import cuda_dense
from qnkernels.reference.int_linear import dequantize_weight

# rows of the weight, blocks, d, centroids: one of each; odd; past a tile of outputs and of blocks; whole
# pieces of 4 and of 8, one and several of a codeword; codes of two bytes in shared memory and through the
# cache; codes in whole runs of 16 bytes
WEIGHTS = (
    *((1, 1, 1, 1), (5, 7, 2, 4), (130, 33, 8, 256), (257, 40, 4, 255), (17, 65, 9, 2), (40, 3, 33, 7)),
    *((19, 2, 64, 16), (131, 34, 12, 300), (24, 6, 8, 7000), (35, 11, 3, 13_000)),
    *((144, 33, 8, 256), (152, 40, 4, 300)),
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_pq_decode(shape, dtype):
    for transposed, count in ((False, 1), (True, 30)):
        codes, codebook, decoded = weight(*shape, dtype, transposed, seeded(sum(shape)))
        with processors(count, "decode"):
            assert_identical(emulated("decode")["pq_decode"](codes, codebook), decoded.to(dtype))


@pytest.mark.parametrize(
    ("shape", "dtype", "book"),
    [
        ((5, 7, 2, 4), torch.bfloat16, "Halves"),
        ((20, 5, 12, 255), torch.bfloat16, "Codewords<4, true>"),
        ((20, 5, 12, 4000), torch.float16, "Codewords<4, false>"),
        ((20, 5, 6, 4000), torch.float32, "Codewords<4, false>"),
        ((24, 6, 8, 256), torch.bfloat16, "Codewords<8, true>"),
        ((24, 6, 8, 7000), torch.bfloat16, "Codewords<8, false>"),
    ],
    ids=str,
)
def test_where_pq_decode_reads_codewords(shape, dtype, book):
    codes, codebook, decoded = weight(*shape, dtype, True, seeded(shape[3]))
    assert_identical(emulated("decode")["pq_decode"](codes, codebook), decoded.to(dtype))
    (launch,) = launches("decode")
    assert launch.kernel == f"pq_decode_kernel<{TYPES[codes.dtype]}, {book}>"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("d", [3, 4, 8])
def test_codes_past_the_codebook_read_its_last_codeword(d, dtype):
    codes = torch.tensor([[0, 4, 5, 255]]).to(dtype)
    codebook = torch.randn(5, d, generator=seeded(d))
    expected = codebook[[0, 4, 4, 4]].reshape(1, -1)
    assert_identical(emulated("decode")["pq_decode"](codes, codebook), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (3, 30), (9, 32), (5, 2080), (2, 8256), (300, 64)])
def test_int_decode(n, k, bits, dtype):
    for groups in {1, 2, k // 2, max(k // 32, 1)}:
        for zero_point in (True, False):
            packed = random_packed(n, k, bits, groups if k % groups == 0 else 1, seeded(n + k), zero_point)
            expected = dequantize_weight(*packed.arguments, bits).to(dtype)
            for aligned in (64, 4):
                with alignment(aligned, "decode"):
                    decoded = emulated("decode")["int_decode"](*packed.arguments, bits, dtype)
                assert_identical(decoded, expected)


@pytest.fixture(params=[1, 1 << 14])
def many_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of tokens are many, and slices small: of a tile, and of a few."""
    monkeypatch.setattr(cuda_dense, "FROM_TOKENS", {op: {4: 1, 2: 1} for op in cuda_dense.FROM_TOKENS})
    monkeypatch.setattr(cuda_dense, "SLICE_BYTES", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_int_linear_of_many_tokens(many_tokens, bits, dtype):
    for m, n, k, groups in ((1, 1, 2, 1), (33, 300, 64, 2), (20, 129, 30, 3)):
        packed = random_packed(n, k, bits, groups, seeded(m), groups != 2, unit=2**-10)
        x, decoded = torch.randn(m, k, generator=seeded(n)).to(dtype), packed.decoded().to(dtype).double()
        for bias in (None, torch.randn(n, generator=seeded(k)).to(dtype)):
            y = emulated("decode", "int_linear")["int_linear"](x, *packed.arguments, bias, bits)
            added = torch.zeros(n) if bias is None else bias
            exact = x.double() @ decoded.t() + added.double()
            magnitude = x.double().abs() @ decoded.abs().t() + added.double().abs()
            assert_within(y, exact, (k + 4) * UNIT * magnitude + output_rounding(exact, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (300, 20, 8, 256), (67, 90, 4, 300), (129, 33, 9, 2)], ids=str
)
def test_pq_linear_of_many_tokens(many_tokens, shape, dtype):
    ops, generator = emulated("decode", *SOURCES), seeded(sum(shape))
    for m, transposed in ((1, True), (33, False)):
        codes, codebook, decoded = weight(*shape, dtype, transposed, generator)
        x, grad = (torch.randn(m, size, generator=generator).to(dtype) for size in (len(decoded.T), shape[0]))
        bias = torch.randn(shape[0], generator=generator).to(dtype) if transposed else None
        y = ops["pq_linear"](x, codes, codebook, bias)
        added = torch.zeros(1) if bias is None else bias
        exact = x.double() @ decoded.T + added.double()
        magnitude = x.double().abs() @ decoded.abs().T + added.double().abs()
        assert_near(y, exact, magnitude, x.shape[1], dtype)
        arguments = (grad, x, codes, codebook, True)
        grad_x, grad_codebook = ops["pq_linear_backward"](*arguments, True, True)
        assert_near(grad_x, grad.double() @ decoded, grad.double().abs() @ decoded.abs(), shape[0], dtype)
        nothing, same = ops["pq_linear_backward"](*arguments, False, True)
        assert nothing.shape == (0,)
        assert_identical(same, grad_codebook)
        only_x, nothing = ops["pq_linear_backward"](*arguments, True, False)
        assert_identical(only_x, grad_x)
        assert nothing.shape == (0,)


def test_empty(many_tokens):
    packed = random_packed(4, 32, 4, 1, seeded(0))
    int_linear = emulated("decode", "int_linear")["int_linear"]
    assert int_linear(torch.empty(0, 32), *packed.arguments, None, 4).shape == (0, 4)
    none = torch.empty(3, 0, dtype=torch.uint8), torch.ones(3, 1), None
    assert_identical(
        int_linear(torch.empty(2, 0), *none, torch.arange(3.0), 8), torch.arange(3.0).repeat(2, 1)
    )
    ops, codebook = emulated("decode", *SOURCES), torch.ones(2, 4)
    for rows, blocks in ((0, 3), (3, 0)):
        codes = torch.zeros(rows, blocks, dtype=torch.uint8)
        assert ops["pq_decode"](codes, codebook).shape == (rows, blocks * 4)
        assert not ops["pq_linear"](torch.ones(2, blocks * 4), codes, codebook, None).any()


def test_slices():
    """Of 32 MB where tokens are many; larger where they are few, up to a limit; whole tiles; never none."""
    assert cuda_dense.slice_size(4096, 8192, 1, 2) == 2048
    assert cuda_dense.slice_size(4096, 8192, 8, 2) == 256
    assert cuda_dense.slice_size(1024, 28672, 1, 2) == 2048
    assert cuda_dense.slice_size(32, 8192, 1, 4) == 4096
    assert cuda_dense.slice_size(4096, 3000, 9, 2) % 15 == 0
    assert cuda_dense.slice_size(100_000, 1 << 20, 1, 4) == 128
