"""int_linear_quantized under the interpreter: exact integers, and the reference's bits with one group."""

import pytest
import torch
from helpers_int_linear import Packed, assert_within, exact_quantized, quantized_rows, random_packed
from numeric import DTYPES, assert_identical

from qnkernels.backends import kernels
from qnkernels.backends.triton import quantize_rows
from qnkernels.reference.int_linear import quantize_rows as reference_rows

STATIC = (0.031, 77.0)  # clamps some activations at both ends
# m, n, k, groups: one of each; odd tails; one past the tiles, split; many rows; odd groups of several tiles
# and of one; aligned groups of one tile and of several, few rows and many
SIZES = (
    (1, 1, 2, 1),
    (3, 5, 12, 4),
    (17, 65, 274, 1),
    (1, 33, 1040, 1),
    (65, 129, 48, 1),
    (34, 33, 66, 2),
    (2, 7, 30, 10),
    (5, 3, 30, 6),
    (1, 65, 256, 2),
    (16, 64, 96, 3),
    (2, 3, 640, 2),
    (17, 3, 320, 2),
    (17, 3, 256, 2),
)


def product(x, packed, bias=None, quantizer=None, backend="triton"):
    given = (None, None) if quantizer is None else tuple(torch.tensor(value) for value in quantizer)
    call = kernels(backend)["int_linear_quantized"]
    return call(x, *packed.arguments, bias, packed.bits, *given)


def check(x, packed, bias=None, quantizer=None) -> None:
    y, exact = product(x, packed, bias, quantizer), exact_quantized(x, packed, bias, quantizer)
    assert y.dtype == x.dtype
    assert_within(y, exact.value, exact.bound)
    if exact.rounded is not None:
        assert_identical(y, exact.rounded)
        assert_identical(y, product(x, packed, bias, quantizer, "reference"))


def activations(m, k, generator, dtype=torch.float32):
    """Rows of all offsets, so that zero points from 0 to 255 occur."""
    return (torch.randn(m, k, generator=generator) + 4 * torch.randn(m, 1, generator=generator)).to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k", "groups"), SIZES)
def test_exact(m, n, k, groups, bits):
    generator = torch.Generator().manual_seed(m * n + k)
    for index, dtype in enumerate(DTYPES):
        # of many rows, which take long, each dtype and each of the other two values once
        for has_zero in (False, True) if m <= 16 else (index == 0,):
            packed = random_packed(n, k, bits, groups, generator, has_zero, unit=2**-9)
            x = activations(m, k, generator, dtype)
            bias = torch.randn(n, generator=generator).to(dtype) if has_zero else None
            check(x, packed, bias, STATIC if has_zero == (index % 2 == 0) else None)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_in_one_part_have_the_bits_of_the_reference(bits):
    """So many tiles that the groups are not split among programs: their sums are added in order."""
    generator = torch.Generator().manual_seed(3)
    packed = random_packed(520, 48, bits, 3, generator, unit=2**-9)
    x, bias = activations(2, 48, generator), torch.randn(520, generator=generator)
    assert_identical(product(x, packed, bias), product(x, packed, bias, backend="reference"))


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_in_long_rows(bits):
    """Sums near 2^31 and, at k = 40,000, beyond, where a group is taken in pieces."""
    top = 2**bits - 1
    for k in (32_768, 40_000):
        x = torch.stack((torch.ones(k), -torch.ones(k), torch.tensor([1.0, -1.0]).repeat(k // 2)))
        for code in (0, top):
            codes = torch.full((3, k * bits // 8), code * (17 if bits == 4 else 1), dtype=torch.uint8)
            zeros = torch.tensor([[top], [0], [top // 2]], dtype=torch.uint8)
            packed = Packed(codes, torch.full((3, 1), 0.01), zeros, bits)
            check(x, packed, quantizer=None if code else (1 / 255, 255.0))


def special_rows(k):
    largest, noise = torch.finfo(torch.float32).max, torch.randn(k)
    rows = [torch.full((k,), value) for value in (0.0, -0.0, 3.7, -3.7, 1e-45, 1e38, largest)]
    rows += [noise * size for size in (1e-45, 1e-40, 1e-38, 1.0, 1e30)]
    rows += [torch.where(noise > 0, largest, -largest)]  # a range beyond fp32
    for poison in (float("nan"), float("inf"), float("-inf")):
        rows += [torch.where(torch.arange(k) == place, poison, noise) for place in (0, k // 2, k - 1)]
    return torch.stack(rows)


def test_special_rows():
    torch.manual_seed(4)
    x = special_rows(66)
    for bits in (4, 8):
        packed = random_packed(5, 66, bits, 1, torch.Generator().manual_seed(bits))
        for quantizer in (None, STATIC, (1e-38, 3.0), (1e36, 250.0)):
            y = product(x, packed, None, quantizer)
            assert_identical(y, exact_quantized(x, packed, None, quantizer).rounded)
    assert product(x, packed)[-10:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_quantized_as_in_the_reference(dtype):
    """Codes, scales and zero points; rows longer than a block, odd ones, even columns before odd ones."""
    generator = torch.Generator().manual_seed(5)
    for m, k in ((3, 1), (2, 4099), (5, 34)):
        x = activations(m, k, generator, dtype)
        x[0, k // 2] = float("nan")
        for quantizer in (None, tuple(map(torch.tensor, STATIC))):
            for pairs in (False, True) if k % 2 == 0 else (False,):
                codes, scale, zero = quantize_rows.quantize_rows(x, *(quantizer or (None, None)), pairs)
                if pairs:
                    codes = codes.reshape(m, 2, k // 2).transpose(1, 2).reshape(m, k)
                shifted, expected_scale, expected_zero = reference_rows(x, *(quantizer or (None, None)))
                assert_identical(scale[:, None], expected_scale)
                assert scale.isnan().tolist() == [True] + [False] * (m - 1)
                assert_identical(zero[1:, None] + 128, expected_zero[1:].int())
                assert_identical((codes.int() - zero[:, None])[1:].float(), shifted[1:])
                plain = None if quantizer is None else STATIC
                assert torch.equal(shifted[1:].double(), torch.from_numpy(quantized_rows(x, plain)[0])[1:])


def test_rows_alone_and_among_others_have_the_same_bits():
    generator = torch.Generator().manual_seed(6)
    packed, x = random_packed(9, 64, 8, 1, generator), activations(20, 64, generator)
    together = product(x, packed)
    for row in (0, 13, 19):
        assert_identical(product(x[row : row + 1], packed), together[row : row + 1])


def test_empty():
    packed = random_packed(4, 8, 4, 1, torch.Generator().manual_seed(0))
    assert product(torch.empty(0, 8), packed).shape == (0, 4)
    none = Packed(packed.codes[:0], packed.scale[:0], packed.zero_point[:0], 4)
    assert product(torch.ones(3, 8), none).shape == (3, 0)
