"""int_linear over packed weights, against float64; gradients in test_int_linear_backward.py."""

import contextlib
import itertools

import pytest
import torch
from helpers_int_linear import (
    UNIT,
    Packed,
    assert_within,
    output_rounding,
    possible,
    random_packed,
    seeded,
)
from numeric import DTYPES, assert_identical, relative_error
from pairs import covering, name

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.reference.int_linear import dequantize_weight, pack, unpack

# fp32 sums of k terms: k * 2^-24 at worst, far less in the mean; then one rounding to the output dtype
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def packed(n, k, bits, groups, generator):
    """weight, scale and zero point."""
    return random_packed(n, k, bits, groups, generator).arguments


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


EVEN_BF16 = 2.0**-14.99

SIZES = {
    "m": (0, 1, 2, 3, 4, 5, 8, 12, 13, 15, 16, 17, 33, 64, 100),
    "k": (2, 30, 31, 64, 66, 127, 128, 200, 256, 1000, 4098),
    "n": (1, 3, 15, 16, 17, 31, 33, 64, 100),
    "group": (None, None, 2, 3, 5, 6, 25, 32, 33, 64, 128),
    "bits": (8, 4),
    "zero_point": (True, False),
    "bias": (None, "fp32", "as x"),
    "dtype": DTYPES,
    "x": ("plain", "offset", "1000x", "1e6x", "zeros"),
}


@pytest.fixture(params=["served", "reference"])
def backend(request):
    return contextlib.nullcontext if request.param == "served" else lambda: qnk.backend("reference")


def activations(m: int, k: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Rows in [-1, 1] or so, some of them of the kind; one value 1e6 times the others in all of float16."""
    x = torch.randn(m, k, generator=generator)
    some = torch.rand(m, generator=generator) < 0.5
    if kind == "offset":
        x[some] += 8
    elif kind == "zeros":
        x[some] = 0
    elif kind != "plain":
        ratio = float(kind[:-1])
        x /= max(1.0, ratio / 3e3)
        x[some, torch.randint(k, (int(some.sum()),), generator=generator)] *= ratio
    return x


def exact_and_bound(x, packed: Packed, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer in float64, and what `check` allows each element to be off."""
    weight = packed.decoded()
    exact = x.double() @ weight.t() + (0.0 if bias is None else bias.double())
    magnitude = x.double().abs()
    largest = magnitude.amax(1, keepdim=True)
    resolution = torch.full_like(largest, 4 * UNIT)
    if x.dtype == torch.bfloat16 and packed.bits == 4 and len(x) <= 24:
        even = largest * 512 <= magnitude.sum(1, keepdim=True)
        resolution = torch.where(even, EVEN_BF16, resolution)
    bound = resolution * largest * weight.abs().sum(1) + 4 * UNIT * exact.abs()
    return exact, bound + output_rounding(exact, x.dtype)


def check(x, packed: Packed, bias=None) -> None:
    """Each element: |y - exact| <= 2^-22 max|x_row| sum|w_row| + 4 roundings of y, and that to its dtype.

    2^-14.99 instead of 2^-22 for few rows of bf16 over 4-bit codes, where 2^-15 of the largest value is no
    more than 2^-24 of the sum of the row, which is what each addition of an fp32 sum may be off.
    2^-22 is 4 roundings of the largest product for each one. Unlike an error of the norm, this leaves no row
    and no output out.
    """
    y = F.int_linear(x, *packed.arguments, bias, packed.bits)
    assert y.dtype == x.dtype
    assert_within(y, *exact_and_bound(x, packed, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 128), (4, None), (4, 64), (4, 128), (4, 512)])
def test_each_number_of_tokens(bits, group, dtype):
    """A few are multiplied where the weight lies, by ones and by twos, more of them in tiles."""
    generator = seeded(bits + (group or 0))
    for m in (*range(1, 16), 23, 33, 40):
        for n, zero_point in ((37, True), (20, False)):
            packed = random_packed(n, 1024, bits, 1024 // (group or 1024), generator, zero_point, unit=2**-10)
            check(activations(m, 1024, "offset", generator).to(dtype), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 128), (4, 384)])
def test_blocks_of_tokens(bits, group, dtype):
    """More tokens than tiles take at once; rows of the weight and tiles of tokens that are not whole."""
    generator = seeded(bits + (group or 1))
    for m, n, k in ((130, 65, 6144), (257, 40, 384), (300, 33, 768)):
        packed = random_packed(n, k, bits, k // (group or k), generator, m != 300, unit=2**-10)
        check(activations(m, k, "offset", generator).to(dtype), packed, torch.randn(n, generator=generator))


@pytest.mark.parametrize("case", list(covering(SIZES, possible)), ids=name)
def test_every_element_is_within_the_bound(case):
    m, k, n, group, bits, zero_point, bias, dtype, kind = case.values()
    generator = seeded(hash((m, k, n)) % 2**31)
    weight = random_packed(n, k, bits, k // (group or k), generator, zero_point, unit=2**-10)
    if bias is not None:
        bias = torch.randn(n, generator=generator).to(torch.float32 if bias == "fp32" else dtype)
    check(activations(m, k, kind, generator).to(dtype), weight, bias)


@pytest.mark.parametrize("bits", [8, 4])
def test_long_rows_of_one_sign(bits):
    """Where the errors of many roundings, and sums of integers beyond 32 bits, would show. Each group may
    add a rounding of the sum so far.
    """
    for k, groups in ((32_768, 1), (40_000, 1), (40_000, 625)):
        weight = torch.full((17, k * bits // 8), 255, dtype=torch.uint8)
        for zero in (0, 2**bits - 1):
            zeros = torch.full((17, groups), zero, dtype=torch.uint8)
            zeros[1::2] = 0
            packed = Packed(weight, torch.full((17, groups), 2**-8 / 3), zeros, bits)
            x = torch.rand(19, k, generator=seeded(k)) + 0.5
            x[1] = 1.0
            for m in (1, 2, 19):
                for rows in (x[:m], -x[:m]):
                    exact, bound = exact_and_bound(rows, packed)
                    y = F.int_linear(rows, *packed.arguments, bits=bits)
                    assert_within(y, exact, bound + groups * UNIT * exact.abs())


def test_small_values_beside_large_ones_that_cancel():
    """All that two bytes for an activation may lose is lost at once: powers of two have the coarsest unit."""
    k = 4096
    packed = Packed(torch.full((8, k // 2), 255, dtype=torch.uint8), torch.ones(8, 1), None, 4)
    for largest, small in ((1.0, 2.0**-14), (1.0, 2.0**-15), (1.9921875, 2.0**-14)):
        x = torch.full((24, k), small)
        x[:, :514] = torch.tensor([largest, -largest]).repeat(257)
        for m in (1, 5, 24):
            check(x[:m].bfloat16(), packed)


@pytest.mark.parametrize("group", [64, 128, 192, 256, 320, 512, 768])
def test_bytes_of_the_largest_magnitude(group):
    """Fixed point whose lower bytes are all -128, or all 127, and codes farthest from their zero point: sums
    as large as they get, of one sign."""
    for columns in (-(128 << 8) - 128, (127 << 8) + 127):
        fixed = torch.full((3, 2 * group), float(columns + (63 << 16)))
        fixed[:, 0] = 2**22 - 1
        fixed[1:, ::3] *= -1
        x = fixed * 2.0**-22
        for code in (0, 15):
            weight = torch.full((9, group), code * 17, dtype=torch.uint8)
            zeros = torch.full((9, 2), 15 - code, dtype=torch.uint8)
            for zero_point in (zeros, None):
                packed = Packed(weight, torch.rand(9, 2, generator=seeded(4)) * 2**-10, zero_point, 4)
                for m in (1, 2, 3):
                    exact, bound = exact_and_bound(x[:m], packed)
                    y = F.int_linear(x[:m], *packed.arguments, bits=4)
                    assert_within(y, exact, bound + 16 * UNIT * exact.abs())  # sums in fp32 only grow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("x_scale", "scale"),
    [
        *((1e-36, 1.0), (1e-30, 1.0), (1e-12, 1e-12), (1.0, 1e-30)),
        *((1e30, 1.0), (1e30, 1e-20), (3e37, 1e-20), (1.0, 1e20)),
    ],
)
def test_other_magnitudes(x_scale, scale, dtype):
    for bits, groups in ((8, 1), (4, 4), (4, 2)):
        packed = random_packed(33, 256, bits, groups, seeded(31))
        scaled = Packed(packed.codes, packed.scale * scale, packed.zero_point, bits)
        for m in (1, 4, 17, 70):
            x = torch.randn(m, 256, generator=seeded(m))
            check((x * x_scale).to(dtype), scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0, 2, 40])
@pytest.mark.parametrize("group", [32, 64, 128, 384])
def test_scales_of_a_row_far_apart(group, spread, dtype):
    """Quotients of neighbours of up to 2^spread; some scales are 0, and all of a group beside others of 1."""
    generator = seeded(group + spread)
    k = 6 * group
    packed = random_packed(70, k, 4, 6, generator)
    packed.scale.copy_(torch.exp2(-10 - spread * torch.rand(70, 6, generator=generator)))
    packed.scale[33:40, 2] = 0
    packed.scale[::9, 3] = 0
    packed.scale[5, 1:5] = 1
    for m in (1, 5, 16, 40, 70, 257):
        check(activations(m, k, "plain", generator).to(dtype), packed)


@pytest.mark.parametrize("least", [90, 95, 100, 110])
def test_tiny_sums_under_scales_that_grow(least):
    """Sums of the first group, of a value 2^-18 of the largest, are all there is."""
    codes = torch.full((32, 512), 8, dtype=torch.uint8)
    codes[:, 0] = 9
    scale = torch.tensor([1.0, 8.0, 64.0, 512.0]).expand(32, 4).contiguous()
    x = torch.zeros(64, 512)
    x[:, 0], x[:, -1] = 2.0 ** -(least + 18), 2.0**-least
    check(x.bfloat16(), Packed(pack(codes, 4), scale, None, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite_leave_the_others_alone(backend, dtype):
    """They are not finite anywhere, as in a plain product; zeros and huge rows beside them are exact."""
    for bits, groups in ((8, 1), (4, 4), (4, 2)):
        packed = random_packed(33, 256, bits, groups, seeded(32), unit=2**-10)
        decoded = packed.decoded().float()
        for m in (1, 2, 5, 17, 64):
            x = torch.randn(m, 256, generator=seeded(m)).to(dtype)
            x[m // 3] *= 1000
            x[m // 4] = 0
            for poison in (float("nan"), float("inf"), float("-inf")):
                poisoned = x.clone()
                for row, column in {(0, 127), (m // 2, 5)}:
                    poisoned[row, column] = poison
                clean = poisoned.isfinite().all(1)
                with backend():
                    y = F.int_linear(poisoned, *packed.arguments, bits=bits)
                    finite = torch.nn.functional.linear(poisoned.float(), decoded).isfinite()
                    assert torch.equal(y.isfinite(), finite)
                    assert_within(y[clean], *exact_and_bound(x[clean], packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [64, 128, 256])
def test_zero_points_need_not_be_codes(group, dtype):
    """Of 4 bits with zero points of up to 255, on the paths of few tokens and of many."""
    generator = seeded(group)
    packed = random_packed(37, 256, 4, 256 // group, generator, unit=2**-10)
    packed.zero_point.copy_(torch.randint(0, 256, packed.zero_point.shape, generator=generator))
    for m in (1, 3, 12, 14, 15, 40):
        check(activations(m, 256, "plain", generator).to(dtype), packed)


def test_zeros_give_the_bias(backend):
    packed, bias = random_packed(33, 66, 8, 1, seeded(33)), torch.randn(33, generator=seeded(34))
    for m in (1, 3, 17, 64):
        with backend():
            y = F.int_linear(torch.zeros(m, 66), *packed.arguments, bias)
            assert_identical(y, bias.expand(m, 33))


@pytest.fixture
def use_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_do_not_change_the_bits(use_threads):
    for bits, groups in ((8, 1), (8, 8), (4, 1), (4, 4), (4, 8)):
        packed = random_packed(257, 512, bits, groups, seeded(35))
        for m, dtype in itertools.product((1, 4, 7, 13, 40), DTYPES):
            x, results = torch.randn(m, 512, generator=seeded(m)).to(dtype), []
            for count in (1, 2, 3):
                use_threads(count)
                results.append(F.int_linear(x, *packed.arguments, bits=bits))
            assert_identical(results[0], results[1])
            assert_identical(results[0], results[2])


def test_shapes_of_x():
    weight, scale, zero_point = packed(6, 16, 8, 1, torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 4, 16)
    expected = F.int_linear(x.reshape(-1, 16), weight, scale, zero_point).reshape(2, 3, 4, 6)
    assert_identical(F.int_linear(x, weight, scale, zero_point), expected)
    one = F.int_linear(x[0, 0, :1], weight, scale, zero_point)[0]
    assert_identical(F.int_linear(x[0, 0, 0], weight, scale[:, 0], zero_point[:, 0]), one)
    strided = x.transpose(0, 1)
    assert_identical(F.int_linear(strided, weight, scale, zero_point), expected.transpose(0, 1))
    assert F.int_linear(torch.empty(0, 16), weight, scale).shape == (0, 6)


def test_opcheck():
    weight, scale, zero_point = packed(6, 16, 4, 2, torch.Generator().manual_seed(0))
    x, bias = torch.randn(3, 16, requires_grad=True), torch.randn(6, requires_grad=True)
    torch.library.opcheck(torch.ops.qnkernels.int_linear.default, (x, weight, scale, zero_point, bias, 4))
    torch.library.opcheck(
        torch.ops.qnkernels.int_linear_backward.default, (torch.randn(3, 6), weight, scale, zero_point, 4)
    )


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
        (lambda: F.int_linear(X, WEIGHT, SCALE[:, :0]), ValueError, ("scale", "[6, groups]", "(6, 0)")),
        (lambda: F.int_linear(X, WEIGHT, SCALE.double()), TypeError, ("scale", "float64")),
        (lambda: F.int_linear(X, WEIGHT, SCALE, ZERO[:, :1]), ValueError, ("zero_point", "(6, 2)", "(6, 1)")),
        (lambda: F.int_linear(X, WEIGHT, SCALE, ZERO, torch.ones(5)), ValueError, ("bias", "(6,)", "(5,)")),
        (lambda: F.int_linear(X, WEIGHT, SCALE, ZERO, group_size=4), ValueError, ("group_size", "4")),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
