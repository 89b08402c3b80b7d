"""The CUDA kernels of int_linear in the emulator, against float64."""

import pytest
import torch
from helpers_emulator import TYPES, alignment, capability, emulated, launches, processors, shared_memory
from helpers_int_linear import UNIT, Packed, assert_within, output_rounding, random_packed
from numeric import DTYPES, assert_identical
from pairs import covering, name

SIZES = {
    # no row, one, below, at and past what the kernels for few rows and the tiles take
    "m": (0, 1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 130),
    # odd, unaligned, a load, past it, a chunk, past it, several
    "k": (2, 30, 31, 32, 64, 66, 96, 127, 128, 160, 256, 512, 1056),
    "n": (1, 3, 15, 16, 17, 31, 33, 65, 129),
    "group": (None, None, 2, 3, 5, 16, 32, 64, 128),
    "bits": (8, 4),
    "zero_point": (True, False),
    "bias": (None, "fp32", "as x"),
    "dtype": DTYPES,
    "x": ("plain", "offset", "1000x", "zeros"),
    "processors": (1, 3, 20),
}
# for wgmma: below, at and past a tile of rows, outputs and columns
WIDE = {
    "m": (17, 64, 66, 127, 128, 129, 260),
    "k": (32, 64, 80, 96, 128, 192, 320, 1088),
    "n": (1, 15, 65, 128, 130),
    "group": (None, None, 64, 128),
    "bits": (8, 4),
    "zero_point": (True, False),
    "bias": (None, "fp32", "as x"),
    "dtype": DTYPES[1:],
    "x": ("plain", "offset", "1000x", "zeros"),
    "processors": (1, 3, 20),
}


def possible(k, group, bits, **rest) -> bool:
    return k * bits % 8 == 0 and (group is None or k % group == 0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(m: int, k: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Rows of about unit size, some of them of the kind."""
    x = torch.randn(m, k, generator=generator)
    some = torch.rand(m, generator=generator) < 0.5
    if kind == "offset":
        x[some] += 8
    elif kind == "zeros":
        x[some] = 0
    elif kind == "1000x":
        x[some, torch.randint(k, (int(some.sum()),), generator=generator)] *= 1000
    return x


def int_linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    return emulated("int_linear")["int_linear"](x, *packed.arguments, bias, packed.bits)


def check(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> None:
    """Each element: |y - exact| <= 2^-22 max|x_row| sum|w_row| + 4 roundings of y, and that to its dtype."""
    y, weight = int_linear(x, packed, bias), packed.decoded()
    assert y.dtype == x.dtype
    exact = x.double() @ weight.t() + (0.0 if bias is None else bias.double())
    largest = x.double().abs().amax(1, keepdim=True)
    bound = 4 * UNIT * (largest * weight.abs().sum(1) + exact.abs())
    assert_within(y, exact, bound + output_rounding(exact, x.dtype))


def aligned(k, group, bits, **rest) -> bool:
    return k * bits % 128 == 0 and (group is None or k % group == 0)


@pytest.mark.parametrize("case", list(covering(SIZES, possible)), ids=name)
def test_every_element_is_within_the_bound(case):
    check_case(case)


@pytest.mark.parametrize("case", list(covering(WIDE, aligned)), ids=name)
def test_every_element_is_within_the_bound_with_wgmma(case):
    with capability(90, "int_linear"):
        check_case(case)


def check_case(case: dict) -> None:
    m, k, n, group, bits, zero_point, bias, dtype, kind, count = case.values()
    generator = seeded(m * 7919 + k * 31 + n)
    packed = random_packed(n, k, bits, k // (group or k), generator, zero_point, unit=2**-10)
    if bias is not None:
        bias = torch.randn(n, generator=generator).to(torch.float32 if bias == "fp32" else dtype)
    with processors(count, "int_linear"):
        check(activations(m, k, kind, generator).to(dtype), packed, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_kernel(bits, dtype):
    """Rows for each of them, in one group and in several, columns in one part and in several."""
    for m in (1, 4, 12, 40, 100):
        for groups, count in ((1, 1), (3, 30)):
            packed = random_packed(72, 384, bits, groups, seeded(m), unit=2**-10)
            with processors(count, "int_linear"):
                check(torch.randn(m, 384, generator=seeded(m + 1)).to(dtype), packed)


def check_few(m: int, n: int, k: int, dtype, bits: int, groups: int, count: int) -> tuple[str, int]:
    """(eights of rows, sixteens of outputs, steps of a turn and warps of what served few rows; parts)."""
    packed = random_packed(n, k, bits, groups, seeded(m + k), unit=2**-10)
    with processors(count, "int_linear"):
        check(torch.randn(m, k, generator=seeded(m)).to(dtype), packed)
    first, *sum_of_parts = launches("int_linear")
    start, end = f"int_linear_few_kernel<{TYPES[dtype]}, {bits}, ", ", true>" if groups > 1 else ", false>"
    assert first.kernel.startswith(start) and first.kernel.endswith(end)
    assert len(sum_of_parts) == (first.grid[1] > 1)
    return first.kernel.removeprefix(start).removesuffix(end), first.grid[1]


def few_warps(m: int, dtype, bits: int, tens: int) -> int:
    """Of a block: 4 where 8 need more shared memory than a device of compute capability 8.9 has."""
    return 4 if tens == 89 and bits == 4 and (m > 8 or dtype == torch.float32) else 8


@pytest.mark.parametrize("tens", [80, 89])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_few_rows_in_parts_and_around_the_ring(bits, dtype, tens):
    """More turns than the ring of x has places, with a rest; in several parts and in one."""
    k, many = 51 * 512 // bits, "2, 2, 2" if dtype == torch.float32 else "2, 4, 1"
    for m, groups, form in ((3, 3, "1, 2, 2"), (8, 1, "1, 2, 2"), (12, 3, many), (16, 1, many)):
        expected = f"{form}, {few_warps(m, dtype, bits, tens)}"
        for count in (1, 20):
            with capability(tens, "int_linear"):
                served, parts = check_few(m, 5, k, dtype, bits, groups, count)
            assert served == expected and (parts > 1) == (count > 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_few_rows_with_blocks_of_four_warps(bits, dtype):
    """Where blocks of 16 outputs are enough for all multiprocessors."""
    for groups in (1, 3):
        assert check_few(2, 40, 12 * 512 // bits, dtype, bits, groups, count=1) == ("1, 1, 4, 4", 1)


@pytest.mark.parametrize("tens", [80, 89, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_on_devices_with_less_shared_memory(dtype, tens):
    many = "2, 2, 2" if dtype == torch.float32 else "2, 4, 1"
    for bits, m, form in ((4, 1, "1, 1, 4"), (4, 8, "1, 2, 2"), (4, 12, many), (8, 12, many)):
        for groups in (1, 3):
            with capability(tens, "int_linear"):
                served, _ = check_few(m, 18, 9 * 512 // bits, dtype, bits, groups, count=3)
            assert served == f"{form}, {few_warps(m, dtype, bits, tens)}"


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (4, torch.float16)], ids=str)
def test_wgmma_in_every_group_and_part(bits, dtype):
    """Sums taken over in the middle of a group and at its end, parts that start and end there."""
    for groups, count in ((1, 1), (1, 5), (9, 1), (9, 7), (3, 2)):
        packed = random_packed(20, 576, bits, groups, seeded(groups), unit=2**-10)
        with capability(90, "int_linear"), processors(count, "int_linear"):
            check(torch.randn(70, 576, generator=seeded(count)).to(dtype), packed)


def test_what_takes_wgmma():
    """Told by the shared memory that it needs: more than the tiles for 64 rows, less than the others."""

    def fits(m, tens, size, dtype=torch.bfloat16, groups=1) -> bool:
        packed = random_packed(3, 128, 8, groups, seeded(m))
        with capability(tens, "int_linear"), shared_memory(size, "int_linear"):
            try:
                int_linear(torch.ones(m, 128, dtype=dtype), packed)
            except RuntimeError:
                return False
        return True

    more, less = 66_600, 66_500
    assert fits(17, 90, more) and not fits(17, 90, less) and fits(65, 90, more, groups=2)
    assert fits(17, 80, less) and fits(17, 90, less, groups=4)
    assert not fits(65, 80, more) and not fits(65, 90, more, groups=4)
    assert not fits(65, 90, more, dtype=torch.float32)


@pytest.mark.parametrize(("m", "tens"), [(1, 80), (20, 80), (70, 90)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels_are_exact(m, tens, dtype):
    """All codes with all zero points: x of unit rows gives the levels themselves."""
    with capability(tens, "int_linear"):
        check_levels(m, dtype)


def check_levels(m: int, dtype: torch.dtype) -> None:
    for bits in (4, 8):
        zeros = torch.arange(2**bits, dtype=torch.uint8)[:: 2 ** (bits - 4)]
        codes = torch.arange(256, dtype=torch.uint8).repeat(len(zeros), 1)
        packed = Packed(codes, torch.ones(len(zeros), 1), zeros[:, None].contiguous(), bits)
        k = 256 * 8 // bits
        columns = torch.randperm(k, generator=seeded(bits))
        for start in range(0, k, 128):
            x = torch.zeros(m, k, dtype=dtype)
            chosen = columns[start : start + m].numpy()
            x[range(m), chosen] = 1
            expected = torch.from_numpy(packed.levels().reshape(len(zeros), k)[:, chosen]).t().to(dtype)
            assert_identical(int_linear(x, packed), expected)


@pytest.mark.parametrize("m", [1, 20])
def test_unaligned_tensors_take_another_kernel(m):
    for bits in (4, 8):
        packed = random_packed(17, 128, bits, 2, seeded(bits), unit=2**-10)
        for dtype in DTYPES:
            with alignment(1, "int_linear"):
                check(torch.randn(m, 128, generator=seeded(m)).to(dtype), packed)


def test_fp32_loses_no_bit():
    """A single product is rounded once, not taken in the 11 bits of tf32 or the 16 of two pieces."""
    generator = seeded(2)
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, 1], codes[0, 2] = 1, 255
    packed = Packed(codes, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), 8)
    value = torch.randn(40, generator=generator) * 2.0 ** torch.randint(-30, 30, (40,), generator=generator)
    for rows in (8, 40):
        for column, code in ((1, 1.0), (2, 255.0)):
            x = torch.zeros(rows, 64)
            x[:, column] = value[:rows]
            y, exact = int_linear(x, packed)[:, 0].double(), value[:rows].double() * code
            assert ((y - exact).abs() <= 2**-22 * exact.abs()).all()
            assert code != 1.0 or torch.equal(y, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite_leave_the_others_alone(dtype):
    """They are not finite where a plain product is not; NaN is NaN and infinity, of one sign, infinity."""
    for bits, groups in ((8, 1), (4, 2), (8, 16)):
        packed = random_packed(33, 256, bits, groups, seeded(32), unit=2**-10)
        decoded = packed.decoded().float()
        for m, tens in ((2, 80), (12, 80), (30, 80), (70, 90)):
            with capability(tens, "int_linear"):
                check_poison(m, packed, decoded, dtype)


def check_poison(m: int, packed: Packed, decoded: torch.Tensor, dtype: torch.dtype) -> None:
    x = torch.randn(m, 256, generator=seeded(m)).to(dtype)
    clean = int_linear(x, packed)
    for poison in (float("nan"), float("inf"), float("-inf")):
        poisoned = x.clone()
        poisoned[m // 2, 5] = poison
        y = int_linear(poisoned, packed)
        expected = torch.nn.functional.linear(poisoned.float(), decoded)[m // 2].to(dtype)
        special = ~expected.isfinite()
        assert_identical(y[m // 2][special], expected[special])
        assert y[m // 2][~special].isfinite().all()
        others = torch.arange(m) != m // 2
        assert_identical(y[others], clean[others])


def test_zeros_give_the_bias():
    packed, bias = random_packed(33, 64, 8, 1, seeded(33)), torch.randn(33, generator=seeded(34))
    for m in (1, 12, 17):
        assert_identical(int_linear(torch.zeros(m, 64), packed, bias), bias.expand(m, 33))


@pytest.mark.parametrize("k", [1024, 3072])
def test_long_sums_of_one_sign_keep_their_bits(k):
    """Tensor cores cut off what fp32 rounds, so sums are taken over in fp32 now and then."""
    packed = Packed(torch.full((9, k), 201, dtype=torch.uint8), torch.full((9, 1), 2**-8 / 3), None, 8)
    for m in (1, 12, 20):
        x = torch.rand(m, k, generator=seeded(k)) + 0.5
        with processors(1, "int_linear"):
            y = int_linear(x, packed)
        exact = x.double() @ packed.decoded().t()
        assert ((y - exact).abs() <= 120 * UNIT * exact).all()


def test_empty():
    packed = random_packed(4, 32, 4, 1, seeded(0))
    assert int_linear(torch.empty(0, 32), packed).shape == (0, 4)
    none = Packed(torch.empty(3, 0, dtype=torch.uint8), torch.ones(3, 1), None, 8)
    assert_identical(int_linear(torch.empty(2, 0), none, torch.arange(3.0)), torch.arange(3.0).expand(2, 3))
