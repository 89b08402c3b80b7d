"""The noise of the Triton kernels, bit for bit that of the reference."""

import pytest
import torch
import triton
import triton.language as tl
from numeric import integer

from qnkernels.backends.triton import launch
from qnkernels.backends.triton.philox import noise_mask
from qnkernels.reference import philox as reference

N = 128


@triton.jit
def mask_kernel(mask_ptr, first_ptr, seed_ptr, threshold, N: tl.constexpr, BITS: tl.constexpr):
    mask = noise_mask(tl.load(first_ptr), seed_ptr, threshold, N, BITS)
    offset = tl.arange(0, N // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(mask_ptr + offset, mask.to(tl.int8))


def mask_of(first: int, seed: int, threshold: int, n: int) -> torch.Tensor:
    mask = torch.empty(n, dtype=torch.int8)
    options = dict(N=n, BITS=reference.draw_bits(threshold))
    launch.run(mask_kernel, (1,), mask, integer(first), integer(seed), threshold, **options)
    return mask.bool()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x1234_5678_9ABC_DEF0, 2**63 - 1, -1])
@pytest.mark.parametrize("first_call", [0, 16, 2**32 - 16, 2**32, 5 * 2**40 + 32])
@pytest.mark.parametrize("threshold", [1, 3277, 65535, 65536])
def test_mask_equals_reference(seed, first_call, threshold):
    words = reference.philox(torch.arange(first_call, first_call + N // 8), integer(seed))
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()
    assert torch.equal(mask_of(8 * first_call, seed, threshold, N), draws < threshold)


@pytest.mark.parametrize("n", [8, 16, 64, 128, 256, 1024])
@pytest.mark.parametrize("seed", [0, 0x1234_5678_9ABC_DEF0, -1])
def test_mask_at_one_half_equals_reference(seed, n):
    """A bit an element, in tiles of one call, of several and of a part of one, past 2^32 calls, too."""
    for first in (0, n, 3 * n, 128 * 2**32 - n, 128 * 2**32 + 5 * n):
        call = first // 128
        words = reference.philox(torch.arange(call, call + max(n // 128, 1)), integer(seed))
        bits = torch.stack([words >> i & 1 for i in range(32)], dim=-1).flatten()
        skip = first - 128 * call
        assert torch.equal(mask_of(first, seed, 32768, n), bits[skip : skip + n] == 0)
