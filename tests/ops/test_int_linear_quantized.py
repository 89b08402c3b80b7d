"""int_linear_quantized: exact integers, on the backend that serves and on the reference."""

import contextlib

import pytest
import torch
from helpers_int_linear import (
    Packed,
    assert_within,
    exact_quantized,
    quantized_rows,
    random_packed,
)
from numeric import DTYPES, assert_identical
from pairs import covering, name

import qnkernels as qnk
from qnkernels import functional as F

SIZES = {
    "m": (0, 1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 100),
    "k": (2, 30, 31, 64, 66, 127, 128, 200, 256, 1000, 4098),
    "n": (1, 3, 15, 16, 17, 31, 33, 64, 100),
    "group": (None, None, 2, 3, 5, 6, 25, 32, 33, 64, 128),
    "bits": (8, 4),
    "zero_point": (True, False),
    "bias": (None, "fp32", "as x"),
    "dtype": DTYPES,
    "mode": ("dynamic", "static"),
}
STATIC = (0.031, 77.0)  # a scale and zero point of activations that clamp some of them at both ends


def possible(k, group, bits, **rest) -> bool:
    return k * bits % 8 == 0 and (group is None or k % group == 0)


CASES = list(covering(SIZES, possible))


@pytest.fixture(params=["served", "reference"])
def backend(request):
    return contextlib.nullcontext if request.param == "served" else lambda: qnk.backend("reference")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(m: int, k: int, generator: torch.Generator, dtype=torch.float32) -> torch.Tensor:
    """Rows of all offsets and sizes, so that zero points from 0 to 255 and scales apart occur."""
    x = torch.randn(m, k, generator=generator) + 4 * torch.randn(m, 1, generator=generator)
    return (x * 2.0 ** torch.randint(-4, 3, (m, 1), generator=generator)).to(dtype)


def call(x, packed: Packed, bias=None, quantizer=None, group_size=None) -> torch.Tensor:
    x_scale, x_zero_point = quantizer or (None, None)
    return F.int_linear_quantized(x, *packed.arguments, bias, packed.bits, group_size, x_scale, x_zero_point)


def check(x, packed: Packed, bias=None, quantizer=None) -> None:
    """Bit for bit with one group, within the bound of fp32 sums over the groups otherwise."""
    y = call(x, packed, bias, quantizer)
    exact = exact_quantized(x, packed, bias, quantizer)
    assert y.dtype == x.dtype
    assert_within(y, exact.value, exact.bound)
    if exact.rounded is not None:
        assert_identical(y, exact.rounded)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_exact(backend, case):
    m, k, n, group, bits, zero_point, bias, dtype, mode = case.values()
    generator = seeded(hash((m, k, n)) % 2**31)
    packed = random_packed(n, k, bits, k // (group or k), generator, zero_point, unit=2**-9)
    if bias is not None:
        bias = torch.randn(n, generator=generator).to(torch.float32 if bias == "fp32" else dtype)
    with backend():
        check(activations(m, k, generator, dtype), packed, bias, STATIC if mode == "static" else None)


@pytest.mark.parametrize("bits", [8, 4])
def test_each_number_of_tokens(bits):
    """Up to 32 are multiplied where the weight lies, as many at once as the registers hold."""
    generator = seeded(bits)
    for m in range(1, 36):
        packed = random_packed(37, 256, bits, 1, generator, zero_point=m % 2 == 0, unit=2**-9)
        check(activations(m, 256, generator), packed)


@pytest.mark.parametrize("k", [32_768, 40_000])
@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_codes_in_long_rows(backend, k, bits):
    """Sums up to the end of 32 bits and, in two pieces, beyond: 2.6e9 of one sign; near 0 from both."""
    n, top = 17, 2**bits - 1
    signs = torch.tensor([1.0, -1.0]).repeat(k // 2)
    rows = torch.stack((torch.ones(k), -torch.ones(k), signs, torch.arange(k) / k))
    x = torch.cat((rows, rows[torch.arange(15) % 4]))
    for groups in (1, 2, k // 32):
        for code in (0, top):
            weight = torch.full((n, k * bits // 8), code * (17 if bits == 4 else 1), dtype=torch.uint8)
            for zero in (0, top):
                zeros = torch.full((n, groups), zero, dtype=torch.uint8)
                zeros[1::2] = top - zero
                packed = Packed(weight, torch.full((n, groups), 0.01), zeros, bits)
                with backend():
                    for m in (1, 2, 3, 19) if groups == 1 else (4,):
                        check(x[:m], packed)
                    check(x[:2], packed, quantizer=(1 / 255, 0.0))
                    check(x[:2], packed, quantizer=(1 / 255, 255.0))


def test_extreme_codes_side_by_side(backend):
    """Pairs of products of the largest size, where instructions that add them in 16 bits saturate."""
    generator = seeded(11)
    for k in (2, 64, 66, 200):
        weight = torch.randint(0, 2, (33, k), generator=generator).to(torch.uint8) * 255
        zeros = torch.randint(0, 2, (33, 1), generator=generator).to(torch.uint8) * 255
        packed = Packed(weight, torch.rand(33, 1, generator=generator), zeros, 8)
        for m in (1, 4, 17):
            x = torch.randint(0, 2, (m, k), generator=generator).float()
            with backend():
                for sign in (1, -1):
                    check(sign * x, packed)
                    check(x * 2 - 1, packed, quantizer=(2 / 255, 128.0))


LOST = 13  # the last of special_rows, which no dynamic quantizer fits


def special_rows(k: int) -> torch.Tensor:
    generator = seeded(12)
    noise = torch.randn(k, generator=generator)
    largest = torch.finfo(torch.float32).max
    rows = [torch.full((k,), value) for value in (0.0, -0.0, 3.7, -3.7, 1e-45, -1e-40, 1e38, largest)]
    rows += [noise * scale for scale in (1.0, 1e-45, 1e-42, 1e-40, 1e-38, 1e-36, 1e30, 3e37)]
    rows += [torch.where(torch.arange(k) == k // 2, value, 0.0) for value in (5.0, -5.0, 1e-40, largest)]
    rows += [torch.where(torch.arange(k) == k // 2, value, noise) for value in (1e6, -1e6, 1e30)]
    rows += [torch.where(noise > 0, largest, -largest)]  # a range beyond fp32
    for poison in (float("nan"), float("inf"), float("-inf")):
        rows += [torch.full((k,), poison)]
        rows += [torch.where(torch.arange(k) == place, poison, noise) for place in (0, k // 2, k - 1)]
    return torch.stack(rows)


@pytest.mark.parametrize("k", [8, 66, 1000])
def test_special_rows(backend, k):
    """Rows alone and among others give the same bits; those without a quantizer are NaN, bias or not."""
    x = special_rows(k)
    for bits, zero_point in ((8, True), (8, False), (4, True)):
        packed = random_packed(33, k, bits, 1, seeded(k), zero_point)
        for bias in (None, torch.randn(33)):
            for quantizer in (None, STATIC, (1e-38, 3.0), (1e36, 250.0)):
                exact = exact_quantized(x, packed, bias, quantizer).rounded
                with backend():
                    assert_identical(call(x, packed, bias, quantizer), exact)
                    for row in range(0, len(x), 3):
                        alone = call(x[row : row + 1], packed, bias, quantizer)
                        assert_identical(alone, exact[row : row + 1])
    nan = exact_quantized(x, packed, None).rounded.isnan()
    assert nan[-LOST:].all() and not nan[:-LOST].any()


def test_special_rows_with_groups(backend):
    packed = random_packed(20, 64, 4, 4, seeded(13))
    x = special_rows(64)
    x = x[exact_quantized(x, packed, None).value.isnan().any(1) | (x.abs().amax(1) > 1e-30)]
    exact = exact_quantized(x, packed, None)
    with backend():
        y = call(x, packed, None)
    finite = exact.value.isfinite().all(1) & (exact.value.abs().amax(1) < 1e38)
    assert_within(y[finite], exact.value[finite], exact.bound[finite])
    assert y[exact.value.isnan().any(1)].isnan().all() and finite.sum() >= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_infinity_and_nan_in_half_precision(backend, dtype):
    packed = random_packed(17, 66, 8, 1, seeded(14), unit=2**-9)
    for m in (1, 5, 20):
        x = activations(m, 66, seeded(m), dtype)
        for poison in (float("nan"), float("inf"), float("-inf")):
            x[m // 2, 65] = poison
            with backend():
                check(x.nan_to_num(0.0, 1.0, -1.0), packed)
                y = call(x, packed)
                assert y[m // 2].isnan().all()
                assert_identical(y, exact_quantized(x, packed, None).rounded)
                static = call(x, packed, None, STATIC)
                assert_identical(static, exact_quantized(x, packed, None, STATIC).rounded)


@pytest.mark.parametrize("bits", [8, 4])
def test_near_the_product_that_it_stands_for(backend, bits):
    """A code is within half a step of its activation, and 255 * 2 fp32 roundings in units of the step."""
    generator = seeded(15)
    for m, k in ((1, 128), (17, 200)):
        packed = random_packed(31, k, bits, 1, generator)
        x, weight = activations(m, k, generator), packed.decoded()
        step = torch.from_numpy(quantized_rows(x)[1]).double()
        with backend():
            y = call(x, packed)
        bound = 0.5001 * step * weight.abs().sum(1) + 4 * 2**-24 * y.double().abs()
        assert_within(y, x.double() @ weight.t(), bound)


def test_shapes_and_layouts_of_x(backend):
    generator = seeded(16)
    packed, bias = random_packed(7, 20, 8, 1, generator), torch.randn(7, generator=generator)
    x = activations(42, 20, generator).reshape(2, 3, 7, 20)
    wide = activations(5, 40, generator)
    with backend():
        for quantizer in (None, STATIC):
            expected = exact_quantized(x.reshape(-1, 20), packed, bias, quantizer).rounded.reshape(2, 3, 7, 7)
            for given, wanted in (
                (x, expected),
                (x[0, 0, 0], expected[0, 0, 0]),
                (x.transpose(0, 2), expected.transpose(0, 2)),
                (x[..., ::2, :], expected[..., ::2, :]),
                (x[:0], expected[:0]),
                (x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), expected),
                (wide[:, ::2], exact_quantized(wide[:, ::2], packed, bias, quantizer).rounded),
                (
                    wide[:1, :20].expand(3, 20),
                    exact_quantized(wide[:1, :20].expand(3, 20), packed, bias, quantizer).rounded,
                ),
            ):
                assert_identical(call(given, packed, bias, quantizer), wanted)


def test_layouts_of_the_weight(backend):
    packed = random_packed(9, 24, 8, 4, seeded(17))
    x = activations(3, 24, seeded(18))
    strided = [value.t().contiguous().t() for value in packed.arguments]
    assert not any(value.is_contiguous() for value in strided)
    with backend():
        expected = call(x, packed, group_size=6)
        assert_identical(F.int_linear_quantized(x, *strided), expected)
        single = random_packed(9, 24, 8, 1, seeded(17))
        codes, scale, zeros = single.arguments
        given = F.int_linear_quantized(x, codes, scale[:, 0], zeros[:, 0])
        assert_identical(given, call(x, single))


def test_plain_numbers_and_tensors_for_the_range():
    packed, x = random_packed(9, 24, 8, 1, seeded(19)), activations(3, 24, seeded(20))
    scale, zero = F.quantization_parameters(*F.minmax(x), 8)
    expected = exact_quantized(x, packed, None, (scale.item(), zero.item())).rounded
    assert_identical(call(x, packed, None, (scale, zero)), expected)
    assert_identical(call(x, packed, None, (scale.item(), int(zero))), expected)


@pytest.fixture
def use_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_do_not_change_the_bits(use_threads):
    for bits, groups in ((8, 1), (8, 8), (4, 1), (4, 8)):
        packed = random_packed(257, 512, bits, groups, seeded(21))
        for m in (1, 7, 40):
            x = activations(m, 512, seeded(m))
            results = []
            for count in (1, 2):
                use_threads(count)
                results.append(call(x, packed))
            assert_identical(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 3)])
def test_gradients_pass_straight_through(backend, dtype, bits, groups):
    """As those of int_linear, which a given range stops where x lies outside."""
    generator = seeded(22)
    packed = random_packed(17, 66, bits, groups, generator, unit=2**-6)
    low, high = ((limit - STATIC[1]) * STATIC[0] for limit in (0, 255))
    for quantizer in (None, STATIC):
        x = torch.randn(2, 5, 66, generator=generator) * 4
        x[0, 0, :4] = torch.tensor([low, high, 1.01 * low, 1.01 * high])
        x, bias = (
            x.to(dtype).requires_grad_(),
            torch.randn(17, generator=generator).to(dtype).requires_grad_(),
        )
        grad = torch.randn(2, 5, 17, generator=generator).to(dtype)
        with backend():
            call(x, packed, bias, quantizer).backward(grad)
            plain = torch.ops.qnkernels.int_linear_backward(grad, *packed.arguments, bits)
        assert x.grad.dtype == dtype and bias.grad.dtype == dtype
        if quantizer is not None:
            inside = (x.detach().float() >= low) & (x.detach().float() <= high)
            if dtype == torch.float32:  # the ends belong to the range, up to their own rounding
                inside[0, 0, :2] = x.grad[0, 0, :2] != 0
            assert 0 < (~inside).sum() < inside.numel() / 2
            plain = plain.masked_fill(~inside, 0.0)
        assert_identical(x.grad, plain)
        expected = grad.double().sum((0, 1))
        bound = 2**-22 * grad.double().abs().sum((0, 1)) + torch.finfo(dtype).eps / 2 * expected.abs()
        assert_within(bias.grad, expected, bound)


def test_the_ends_of_a_range_have_a_gradient():
    packed = random_packed(3, 8, 8, 1, seeded(23))
    x = torch.tensor([-1.0, -1.25, -0.5, 0.0, 30.0, 30.875, 31.0, 2.0])[None].requires_grad_()
    call(x, packed, None, (0.125, 8.0)).sum().backward()  # the range is -1 to 30.875
    assert (x.grad == 0).tolist() == [[False, True, False, False, False, False, True, False]]


def test_gradients_of_chosen_inputs():
    packed = random_packed(3, 8, 8, 1, seeded(24))
    bias = torch.zeros(3, requires_grad=True)
    x = torch.randn(4, 8)
    for quantizer in (None, STATIC):
        (grad,) = torch.autograd.grad(call(x, packed, bias, quantizer).sum(), bias)
        assert grad.tolist() == [4.0, 4.0, 4.0]
        y = call(x.requires_grad_(), packed, None, quantizer)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.shape == x.shape
        x = x.detach()


def test_opcheck():
    operator = torch.ops.qnkernels.int_linear_quantized.default
    x, bias = torch.randn(2, 3, 16, requires_grad=True), torch.randn(6, requires_grad=True)
    range_ = torch.tensor(0.02), torch.tensor(100.0)
    for bits, groups in ((8, 1), (4, 2)):
        packed = random_packed(6, 16, bits, groups, seeded(25))
        torch.library.opcheck(operator, (x, *packed.arguments, bias, bits, None, None))
        torch.library.opcheck(operator, (x, *packed.arguments[:2], None, None, bits, *range_))


PACKED, X = random_packed(6, 16, 8, 2, seeded(26)), torch.ones(3, 16)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": X[:, :8]}, ValueError, ("x", "16", "(3, 8)")),
        ({"x": X.double()}, TypeError, ("x", "float64")),
        ({"weight": PACKED.codes.to(torch.int8)}, TypeError, ("weight", "uint8", "int8")),
        ({"bits": 2}, ValueError, ("bits", "2")),
        ({"scale": PACKED.scale[:5]}, ValueError, ("scale", "[6, groups]", "(5, 2)")),
        ({"zero_point": PACKED.zero_point[:, :1]}, ValueError, ("zero_point", "(6, 2)", "(6, 1)")),
        ({"bias": torch.ones(5)}, ValueError, ("bias", "(6,)", "(5,)")),
        ({"group_size": 4}, ValueError, ("group_size", "4")),
        ({"x_scale": 0.1}, ValueError, ("x_zero_point", "x_scale")),
        ({"x_zero_point": 3.0}, ValueError, ("x_zero_point", "x_scale")),
        ({"x_scale": torch.ones(1), "x_zero_point": 3.0}, ValueError, ("x_scale", "()", "(1,)")),
        ({"x_scale": 0.1, "x_zero_point": torch.ones(3, 1)}, ValueError, ("x_zero_point", "()", "(3, 1)")),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"x": X, "weight": PACKED.codes, "scale": PACKED.scale, "zero_point": PACKED.zero_point}
    with pytest.raises(error) as raised:
        F.int_linear_quantized(**(arguments | change))
    for word in words:
        assert word in str(raised.value)
