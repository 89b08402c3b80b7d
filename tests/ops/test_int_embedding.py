"""int_embedding: rows of a packed integer table, bit for bit those of the decoded one."""

import pytest
import torch
from helpers_int_linear import random_packed
from numeric import DTYPES, assert_identical, integer
from pairs import covering, name

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.reference.int_linear import dequantize_weight

SIZES = {
    "count": (0, 1, 2, 17, 100),
    "rows": (1, 3, 64),
    "k": (2, 6, 14, 16, 18, 30, 31, 32, 34, 62, 64, 66, 127, 200, 258, 1030, 4098),
    "group": (None, None, 1, 2, 3, 5, 15, 16, 17, 25, 31, 32, 33, 64, 103, 129),
    "bits": (8, 4),
    "zero_point": (True, False),
    "dtype": DTYPES,
}


def possible(k, group, bits, **rest) -> bool:
    return k * bits % 8 == 0 and (group is None or k % group == 0)


def table(rows, k, bits, groups, seed=0):
    return random_packed(rows, k, bits, groups, torch.Generator().manual_seed(seed)).arguments


@pytest.mark.parametrize("case", list(covering(SIZES, possible)), ids=name)
def test_rows_have_the_bits_of_the_decoded_table(case):
    count, rows, k, group, bits, zero_point, dtype = case.values()
    generator = torch.Generator().manual_seed(hash((count, rows, k)) % 2**31)
    packed = random_packed(rows, k, bits, k // (group or k), generator, zero_point)
    indices = torch.randint(rows, (count,), generator=generator)
    expected = dequantize_weight(*packed.arguments, bits)[indices].to(dtype)
    assert_identical(F.int_embedding(indices, *packed.arguments, bits, dtype=dtype), expected)


NAN, INF = float("nan"), float("inf")
SCALES = (-0.3, 0.0, -0.0, 1e-45, 3e-41, 2.0**-126, 1e-38, 6e-8, 1e-5, 300.0, 3e36, INF, -INF, NAN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_whose_values_are_no_normal_numbers(bits, dtype):
    weight, _, zero_point = table(len(SCALES), 70, bits, 2)
    scale = torch.tensor(SCALES)[:, None].repeat(1, 2)
    indices = torch.arange(len(SCALES))
    y = F.int_embedding(indices, weight, scale, zero_point, bits, dtype=dtype)
    expected = dequantize_weight(weight, scale, zero_point, bits).to(dtype)
    assert_identical(y.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert_identical(y[number], expected[number])
    assert_identical(y[number].signbit(), expected[number].signbit())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bits", [4, 8])
def test_shapes_of_indices(backend, bits):
    weight, scale, zero_point = table(31, 258, bits, 3)
    decoded = dequantize_weight(weight, scale, zero_point, bits)
    indices = torch.randint(0, 31, (4, 5), generator=torch.Generator().manual_seed(5))
    with qnk.backend(backend):
        for one in (indices, indices.t(), indices[0, 0], indices[:0]):
            y = F.int_embedding(one, weight, scale, zero_point, bits)
            assert_identical(y, decoded[one])


@pytest.mark.parametrize("index", [-1, 31])
def test_index_outside(index):
    weight, scale, zero_point = table(31, 8, 8, 1)
    with pytest.raises(IndexError, match="indices"):
        F.int_embedding(torch.tensor([0, index]), weight, scale, zero_point)


def test_opcheck():
    weight, scale, _ = table(6, 16, 4, 2)
    arguments = (torch.tensor([[1, 0]]), weight, scale, None, 4, torch.bfloat16)
    torch.library.opcheck(torch.ops.qnkernels.int_embedding.default, arguments)


WEIGHT, SCALE, ZERO = table(6, 16, 8, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.int_embedding(torch.ones(3), WEIGHT, SCALE), TypeError, ("indices", "int64", "float32")),
        (lambda: F.int_embedding(integer(0), WEIGHT, SCALE, dtype=torch.int8), TypeError, ("dtype", "int8")),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
