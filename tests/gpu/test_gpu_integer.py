"""The integer layers on a GPU, against float64 and the reference on the CPU."""

import contextlib

import pytest
import torch
from helpers_int_linear import Packed, assert_within, exact_quantized
from numeric import assert_identical

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.backends.cuda import use_wgmma
from qnkernels.reference.int_linear import dequantize_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative error of the result's dtype; the fp32 accumulation over k adds k * 2^-24 at most
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(1, 1, 2), (1, 33, 64), (3, 17, 96), (17, 130, 776), (130, 65, 32)]  # m, n, k


def packed_layer(n, k, bits, groups, generator, with_zero_point=True):
    codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, groups, generator=generator) + 0.1
    zero_point = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    return codes, scale, zero_point if with_zero_point else None


def assert_within_bound(actual, x, decoded, bias, dtype):
    """|error| <= (operand rounding + accumulation) * sum |x||w| + output rounding, per element.

    x is exact; a kernel may round the decoded weight to the dtype of x before the product.
    """
    exact = x.double() @ decoded.double().t()
    magnitude = x.double().abs() @ decoded.double().abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    k = x.shape[-1]
    weight_rounding = 0.0 if dtype == torch.float32 else EPSILON[dtype]
    bound = (weight_rounding + (k + 4) * 2.0**-24) * magnitude + 2 * EPSILON[dtype] * exact.abs()
    error = (actual.to(exact.device).double() - exact).abs()
    assert actual.dtype == dtype
    assert (error <= bound + 1e-30).all(), f"error {(error / bound).max():.2f} times the bound"


def moved(device, *tensors):
    return [None if one is None else one.to(device) for one in tensors]


@pytest.mark.of("int_linear")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int_linear(device, backend, dtype, bits, m, n, k):
    generator = torch.Generator().manual_seed(m * n + k)
    x = (torch.randn(m, k, generator=generator) / 8).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    for groups, with_zero_point, with_bias in ((1, True, True), (1, False, False), (k // 2, True, False)):
        codes, scale, zero_point = packed_layer(n, k, bits, groups, generator, with_zero_point)
        used = bias if with_bias else None
        with qnk.backend(backend):
            x_, codes_, scale_, zero_point_, bias_ = moved(device, x, codes, scale, zero_point, used)
            actual = F.int_linear(x_, codes_, scale_, zero_point_, bias_, bits)
        assert_within_bound(actual, x, dequantize_weight(codes, scale, zero_point, bits), used, dtype)


@pytest.mark.of("int_linear")
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m", [1, 5, 16, 40, 200])
def test_int_linear_of_a_layer(device, backend, dtype, bits, m):
    """Aligned rows of several tiles and groups of 128, twice: sums are added in a fixed order."""
    generator = torch.Generator().manual_seed(m + bits)
    x = (torch.randn(m, 2048, generator=generator) / 8).to(dtype)
    bias = torch.randn(520, generator=generator)
    for groups in (1, 16):
        layer = packed_layer(520, 2048, bits, groups, generator)
        with qnk.backend(backend):
            x_, bias_, *layer_ = moved(device, x, bias, *layer)
            first, second = (F.int_linear(x_, *layer_, bias_, bits) for _ in range(2))
        assert_within_bound(first, x, dequantize_weight(*layer, bits), bias, dtype)
        assert torch.equal(first, second)


@pytest.mark.of("int_linear")
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m", [1, 3, 16, 17, 64, 300])
@pytest.mark.parametrize(
    ("n", "k", "groups"),
    [pytest.param(8192, 8192, 1, marks=pytest.mark.large), (8200, 1024, 8), (1016, 4096, 32)],
)
def test_int_linear_of_a_large_layer(device, backend, dtype, bits, m, n, k, groups):
    """Enough outputs for every multiprocessor, with wgmma and without."""
    generator = torch.Generator().manual_seed(m + bits + n)
    x = (torch.randn(m, k, generator=generator) / 8).to(dtype)
    layer = packed_layer(n, k, bits, groups, generator)
    x, *layer = moved(device, x, *layer)
    decoded = dequantize_weight(*layer, bits)
    for where in ("never", "best") if backend == "cuda" else ("best",):
        with qnk.backend(backend), use_wgmma(where) if backend == "cuda" else contextlib.nullcontext():
            actual = F.int_linear(x, *layer, None, bits)
        assert_within_bound(actual, x, decoded, None, dtype)


@pytest.mark.of("int_linear")
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("n", "k", "groups"), [(1, 2, 1), (65, 30, 3), (130, 776, 1), (520, 2048, 16), (1016, 264, 1)]
)
def test_int_linear_by_slices(device, backend, small_slices, dtype, bits, n, k, groups):
    """Multiplied by cuBLAS, where the backend does so, in one slice and in several."""
    generator = torch.Generator().manual_seed(n + bits)
    x = (torch.randn(1100, k, generator=generator) / 8).to(dtype)
    for bias_dtype, with_zero_point in ((None, True), (torch.float32, False), (dtype, True)):
        layer = packed_layer(n, k, bits, groups, generator, with_zero_point)
        bias = None if bias_dtype is None else torch.randn(n, generator=generator).to(bias_dtype)
        with qnk.backend(backend):
            x_, bias_, *layer_ = moved(device, x, bias, *layer)
            actual = F.int_linear(x_, *layer_, bias_, bits)
        assert_within_bound(actual, x, dequantize_weight(*layer, bits), bias, dtype)


@pytest.mark.of("int_linear_backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int_linear_backward(device, backend, dtype, bits, m, n, k):
    generator = torch.Generator().manual_seed(m + n * k)
    codes, scale, zero_point = packed_layer(n, k, bits, 1, generator)
    grad = (torch.randn(m, n, generator=generator) / 8).to(dtype)
    x = torch.randn(m, k, generator=generator).to(dtype).to(device).requires_grad_()
    with qnk.backend(backend):
        y = F.int_linear(x, *moved(device, codes, scale, zero_point), bits=bits)
        actual = torch.autograd.grad(y, x, grad.to(device))[0]
    decoded = dequantize_weight(codes, scale, zero_point, bits)
    assert_within_bound(actual, grad, decoded.t(), None, dtype)


@pytest.mark.of("int_embedding")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_int_embedding(device, backend, dtype, bits):
    generator = torch.Generator().manual_seed(bits)
    codes, scale, zero_point = packed_layer(53, 48, bits, 3, generator)
    for shape in ((), (0,), (1,), (5, 7), (301,)):
        indices = torch.randint(0, 53, shape, generator=generator)
        with qnk.backend("reference"):
            expected = F.int_embedding(indices, codes, scale, zero_point, bits, dtype=dtype)
        with qnk.backend(backend):
            moved_arguments = moved(device, indices, codes, scale, zero_point)
            actual = F.int_embedding(*moved_arguments, bits, dtype=dtype)
        assert actual.shape == expected.shape and torch.equal(actual.cpu(), expected)


@pytest.mark.of("int_linear")
def test_int_linear_on_no_rows(device, backend):
    codes, scale, zero_point = packed_layer(9, 16, 8, 1, torch.Generator().manual_seed(0))
    with qnk.backend(backend):
        y = F.int_linear(torch.empty(0, 16, device=device), *moved(device, codes, scale, zero_point))
    assert y.shape == (0, 9) and y.device.type == device.type


@pytest.mark.of("int_linear_quantized")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int_linear_quantized(device, backend, dtype, bits, m, n, k):
    """The bits that exact integers give with one group, within the bound of fp32 sums otherwise."""
    generator = torch.Generator().manual_seed(m + n * k + bits)
    x = (torch.randn(m, k, generator=generator) + torch.randn(m, 1, generator=generator)).to(dtype)
    x[0, k // 2] = float("nan") if m > 1 else 0.0
    bias = torch.randn(n, generator=generator).to(dtype)
    for groups, with_zero_point, quantizer in ((1, True, None), (1, False, (0.013, 90.0)), (2, True, None)):
        codes, scale, zero_point = packed_layer(n, k, bits, groups, generator, with_zero_point)
        packed = Packed(codes, scale * 2**-9, zero_point, bits)
        exact = exact_quantized(x, packed, bias, quantizer)
        given = {} if quantizer is None else dict(zip(("x_scale", "x_zero_point"), quantizer, strict=True))
        with qnk.backend(backend):
            x_, *packed_, bias_ = moved(device, x, *packed.arguments, bias)
            actual = F.int_linear_quantized(x_, *packed_, bias_, bits, **given).cpu()
        if exact.rounded is not None:
            assert_identical(actual, exact.rounded)
        rows = ~exact.value.isnan().any(1)
        assert_within(actual[rows], exact.value[rows], exact.bound[rows])


@pytest.mark.of("int_linear_quantized")
def test_int_linear_quantized_over_long_rows(device, backend):
    """The largest sums that 32 bits hold; longer groups are taken in pieces."""
    for k in (32_768, 40_000):
        x = torch.stack((torch.ones(k), -torch.ones(k), torch.tensor([1.0, -1.0]).repeat(k // 2)))
        codes = torch.full((3, k), 255, dtype=torch.uint8)
        packed = Packed(codes, torch.full((3, 1), 0.01), torch.tensor([[0], [255], [1]]).to(torch.uint8), 8)
        exact = exact_quantized(x, packed, None)
        with qnk.backend(backend):
            actual = F.int_linear_quantized(*moved(device, x, *packed.arguments)).cpu()
        assert_within(actual, exact.value, exact.bound)
        if exact.rounded is not None:
            assert_identical(actual, exact.rounded)
