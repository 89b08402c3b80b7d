"""The noise of the Triton kernels, bit for bit that of the reference."""

import pytest
import torch
import triton
import triton.language as tl
from numeric import integer

from qnkernels.backends.triton import launch
from qnkernels.backends.triton.philox import noise_mask
from qnkernels.reference import philox as reference

CALLS = 16


@triton.jit
def mask_kernel(mask_ptr, first_call_ptr, seed_ptr, threshold, CALLS: tl.constexpr):
    mask = noise_mask(tl.load(first_call_ptr), seed_ptr, threshold, CALLS)
    offset = tl.arange(0, CALLS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(mask_ptr + offset, mask.to(tl.int8))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x1234_5678_9ABC_DEF0, 2**63 - 1, -1])
@pytest.mark.parametrize("first_call", [0, 16, 2**32 - 16, 2**32, 5 * 2**40 + 32])
@pytest.mark.parametrize("threshold", [1, 3277, 32768, 65535, 65536])
def test_mask_equals_reference(seed, first_call, threshold):
    mask = torch.empty(8 * CALLS, dtype=torch.int8)
    launch.run(mask_kernel, (1,), mask, integer(first_call), integer(seed), threshold, CALLS=CALLS)
    words = reference.philox(torch.arange(first_call, first_call + CALLS), integer(seed))
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()
    assert torch.equal(mask.bool(), draws < threshold)
