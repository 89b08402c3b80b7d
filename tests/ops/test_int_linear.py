"""int_linear and int_embedding over packed weights, against float64 and exact decoding."""

import pytest
import torch
from numeric import DTYPES, assert_identical, integer, relative_error

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.reference.int_linear import dequantize_weight, pack, unpack

# fp32 sums of k terms: k * 2^-24 at worst, far less in the mean; then one rounding to the output dtype
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def packed(n, k, bits, groups, generator):
    """weight, scale, zero point and the decoded weight in float64."""
    weight = pack(torch.randint(0, 2**bits, (n, k), generator=generator), bits)
    scale = torch.rand(n, groups, generator=generator) + 0.1
    zero_point = torch.randint(0, 2**bits, (n, groups), generator=generator).to(torch.uint8)
    return weight, scale, zero_point


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_and_unpack(bits):
    codes = torch.randint(0, 2**bits, (7, 10)).to(torch.uint8)
    weight = pack(codes, bits)
    assert weight.shape == (7, 10 * bits // 8)
    assert_identical(unpack(weight, bits), codes)


def test_four_bits_low_nibble_first():
    assert pack(torch.tensor([[1, 2, 15, 0]]), 4).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("m", "k", "n", "groups"), [(1, 2, 1, 1), (3, 66, 5, 3), (17, 256, 33, 2), (2, 130, 40, 1)]
)
def test_against_float64(backend, bits, m, k, n, groups):
    generator = torch.Generator().manual_seed(m * k)
    weight, scale, zero_point = packed(n, k, bits, groups, generator)
    bias = torch.randn(n, generator=generator)
    for dtype in DTYPES:
        for z in (zero_point, None):
            decoded = dequantize_weight(weight, scale, z, bits).double()
            x = torch.randn(m, k, generator=generator).to(dtype).requires_grad_()
            b = bias.clone().requires_grad_()
            grad = torch.randn(m, n, generator=generator).to(dtype)
            with qnk.backend(backend):
                y = F.int_linear(x, weight, scale, z, b, bits, group_size=k // groups)
                y.backward(grad)
            assert y.dtype == x.grad.dtype == dtype
            assert relative_error(y, x.detach().double() @ decoded.t() + bias.double()) < BOUND[dtype]
            assert relative_error(x.grad, grad.double() @ decoded) < BOUND[dtype]
            assert relative_error(b.grad, grad.double().sum(0)) < BOUND[torch.float32]


def test_shapes_of_x():
    weight, scale, zero_point = packed(6, 16, 8, 1, torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 4, 16)
    expected = F.int_linear(x.reshape(-1, 16), weight, scale, zero_point).reshape(2, 3, 4, 6)
    assert_identical(F.int_linear(x, weight, scale, zero_point), expected)
    assert_identical(F.int_linear(x[0, 0, 0], weight, scale[:, 0], zero_point[:, 0]), expected[0, 0, 0])
    strided = x.transpose(0, 1)
    assert_identical(F.int_linear(strided, weight, scale, zero_point), expected.transpose(0, 1))
    assert F.int_linear(torch.empty(0, 16), weight, scale).shape == (0, 6)


@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_decodes_rows_exactly(bits):
    generator = torch.Generator().manual_seed(5)
    weight, scale, zero_point = packed(31, 258, bits, 3, generator)
    indices = torch.randint(0, 31, (4, 5), generator=generator)
    for dtype in DTYPES:
        for z in (zero_point, None):
            expected = dequantize_weight(weight, scale, z, bits)[indices].to(dtype)
            assert_identical(F.int_embedding(indices, weight, scale, z, bits, dtype=dtype), expected)
    assert F.int_embedding(indices[:0], weight, scale, zero_point, bits).shape == (0, 5, 258)


@pytest.mark.parametrize("index", [-1, 31])
def test_embedding_index_outside(index):
    weight, scale, zero_point = packed(31, 8, 8, 1, torch.Generator().manual_seed(0))
    with pytest.raises(IndexError, match="indices"):
        F.int_embedding(torch.tensor([0, index]), weight, scale, zero_point)


def test_opcheck():
    weight, scale, zero_point = packed(6, 16, 4, 2, torch.Generator().manual_seed(0))
    x, bias = torch.randn(3, 16, requires_grad=True), torch.randn(6, requires_grad=True)
    torch.library.opcheck(torch.ops.qnkernels.int_linear.default, (x, weight, scale, zero_point, bias, 4))
    torch.library.opcheck(
        torch.ops.qnkernels.int_linear_backward.default, (torch.randn(3, 6), weight, scale, zero_point, 4)
    )
    arguments = (torch.tensor([[1, 0]]), weight, scale, None, 4, torch.bfloat16)
    torch.library.opcheck(torch.ops.qnkernels.int_embedding.default, arguments)


def test_gradcheck_in_x():
    """The gradient is linear in x, so differences of fp32 outputs at unit steps check it."""
    weight, scale, zero_point = packed(5, 8, 4, 2, torch.Generator().manual_seed(1))
    x = torch.randn(2, 8, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: F.int_linear(x, weight, scale, zero_point, bits=4), x
    )
    decoded = dequantize_weight(weight, scale, zero_point, 4)
    for i in range(2):
        torch.testing.assert_close(jacobian[i, :, i], decoded, rtol=1e-6, atol=1e-6)
        assert (jacobian[i, :, 1 - i] == 0).all()


WEIGHT, SCALE, ZERO = packed(6, 16, 8, 2, torch.Generator().manual_seed(0))
X = torch.randn(3, 16)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.int_linear(X[:, :8], WEIGHT, SCALE), ValueError, ("x", "16", "(3, 8)")),
        (lambda: F.int_linear(X.long(), WEIGHT, SCALE), TypeError, ("x", "int64")),
        (lambda: F.int_linear(X, WEIGHT.to(torch.int8), SCALE), TypeError, ("weight", "uint8", "int8")),
        (lambda: F.int_linear(X, WEIGHT, SCALE, bits=3), ValueError, ("bits", "3")),
        (lambda: F.int_linear(X, WEIGHT, SCALE[:5]), ValueError, ("scale", "[6, groups]", "(5, 2)")),
        (lambda: F.int_linear(X, WEIGHT, SCALE.double()), TypeError, ("scale", "float64")),
        (lambda: F.int_linear(X, WEIGHT, SCALE, ZERO[:, :1]), ValueError, ("zero_point", "(6, 2)", "(6, 1)")),
        (lambda: F.int_linear(X, WEIGHT, SCALE, ZERO, torch.ones(5)), ValueError, ("bias", "(6,)", "(5,)")),
        (lambda: F.int_linear(X, WEIGHT, SCALE, ZERO, group_size=4), ValueError, ("group_size", "4")),
        (lambda: F.int_embedding(X, WEIGHT, SCALE), TypeError, ("indices", "int64", "float32")),
        (lambda: F.int_embedding(integer(0), WEIGHT, SCALE, dtype=torch.int8), TypeError, ("dtype", "int8")),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
