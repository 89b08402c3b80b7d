"""What conftest.py checks of memory, by kernels that are wrong."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from qnkernels.backends.triton import launch

BLOCK = 8


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, shift, wrap, BLOCK: tl.constexpr):
    """y[i % wrap] = x[i + shift] for i < n."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i % wrap, tl.load(x_ptr + i + shift, mask=i < n), mask=i < n)


@triton.jit
def count_kernel(counts_ptr, x_ptr, place, BLOCK: tl.constexpr):
    """counts[place] += 1, from every lane."""
    lanes = tl.arange(0, BLOCK)
    tl.atomic_add(counts_ptr + place + lanes * 0, lanes * 0 + 1, sem="relaxed")


@triton.jit
def scalar_kernel(x_ptr, y_ptr, i, j):
    """y[j] = x[i]."""
    tl.store(y_ptr + j, tl.load(x_ptr + i))


def copy(x, y, n, shift=0, wrap=1000):
    launch.run(copy_kernel, (launch.cdiv(n, BLOCK),), x, y, n, shift, wrap, BLOCK=BLOCK)
    return y


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_what_is_within_tensors_passes(dtype):
    x = torch.arange(40).to(dtype)
    assert torch.equal(copy(x[3:24], torch.zeros(21, dtype=dtype), 21), x[3:24])
    assert torch.equal(copy(x[:24], x[24:37], 13, 11), x[11:24])  # one storage, and the last element
    counts = torch.zeros(2, dtype=torch.int32)
    launch.run(count_kernel, (3,), counts, x, 1, BLOCK=BLOCK)
    assert counts.tolist() == [0, 3 * BLOCK]


@pytest.mark.parametrize(
    ("n", "shift"), [(13, 1), (13, -1), (14, 0), (13, 8), (13, 1 << 20), (13, -(1 << 20))]
)
def test_a_load_outside_is_seen(n, shift):
    """By one element, on either side, and far away, where no memory may be."""
    with pytest.raises(InterpreterError, match=r"bytes .* of torch.float32 \[13\], which has 52"):
        copy(torch.zeros(40)[10:23], torch.zeros(40), n, shift)


def test_a_load_from_the_tensor_of_another_argument_is_seen():
    """Both in one storage: the address is that of an argument, but not of the one it was computed from."""
    x = torch.zeros(40)
    with pytest.raises(InterpreterError, match=r"of torch.float32 \[20\], which has 80"):
        copy(x[:20], x[20:], 13, 20)


def test_a_store_outside_is_seen():
    y = torch.zeros(40)
    with pytest.raises(InterpreterError, match=r"bytes 32 to 56 of torch.float32 \[13\], which has 52"):
        copy(torch.ones(40), y[:13], 14)
    assert not y[8:].any()  # of the first program's tile alone there are values


@pytest.mark.parametrize("place", [-1, 2])
def test_an_atomic_outside_is_seen(place):
    counts = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(InterpreterError, match=r"of torch.int32 \[2\], which has 8"):
        launch.run(count_kernel, (1,), counts[1:3], counts, place, BLOCK=BLOCK)
    assert not counts.any()


@pytest.mark.parametrize(("i", "j"), [(4, 0), (-1, 0), (0, 4), (0, -1)])
def test_a_scalar_outside_is_seen(i, j):
    x, y = torch.zeros(6), torch.zeros(6)
    launch.run(scalar_kernel, (1,), x[1:5], y[1:5], 3, 3)
    with pytest.raises(InterpreterError, match="which has 16"):
        launch.run(scalar_kernel, (1,), x[1:5], y[1:5], i, j)


def test_any_access_of_an_empty_tensor_is_seen():
    with pytest.raises(InterpreterError, match="which has 0"):
        copy(torch.ones(40), torch.empty(0), 1)


@pytest.mark.parametrize("wrap", [7, 8, 12])
def test_an_element_stored_twice_is_seen(wrap):
    """By lanes of one store, and by two programs; in two launches it is not."""
    for _ in range(2):
        copy(torch.ones(40), torch.zeros(40), wrap, 0, wrap)
    with pytest.raises(InterpreterError, match="stored twice"):
        copy(torch.ones(40), torch.zeros(40), 13, 0, wrap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_element_never_stored_is_not_a_number(dtype):
    x = torch.ones(40, dtype=dtype)
    for y in (torch.empty_like(x), x.new_empty(40), torch.empty(2, 20, dtype=dtype).view(40)):
        copy(x, y, 39)
        assert y[:39].eq(1).all() and y[39].isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_an_integer_never_stored_is_the_largest(dtype):
    x = torch.ones(40, dtype=dtype)
    for y in (torch.empty_like(x), x.new_empty(40)):
        copy(x, y, 39)
        assert y[:39].eq(1).all() and y[39] == torch.iinfo(dtype).max
