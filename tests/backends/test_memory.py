"""Memory for large results: in large pages where the system has them."""

import re
from pathlib import Path

import pytest
import torch

from qnkernels import functional as F
from qnkernels.backends import memory
from qnkernels.backends.memory import LARGE, empty

MAPS, LARGE_PAGES = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in MAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="the system has no transparent large pages")
def test_large_results_ask_for_large_pages():
    y = F.fake_quantize(torch.ones(LARGE // 4), 0.1, 8.0, p=0.5, seed=1)
    assert "hg" in flags_at(y.data_ptr() + y.nbytes // 2)


def test_small_results_ask_for_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_advise_large_pages", lambda *range_: asked.append(range_))
    F.fake_quantize(torch.ones(LARGE // 4 - 1), 0.1, 8.0, p=0.5, seed=1)
    assert not asked
    y = F.fake_quantize(torch.ones(LARGE // 4), 0.1, 8.0, p=0.5, seed=1)
    assert asked == [(y.data_ptr(), LARGE)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bytes_more", [-4, 0, 4, 4096])
def test_shape_and_values(dtype, bytes_more):
    """Just below and above the limit, every element can be written and read."""
    count = (LARGE + bytes_more) // dtype.itemsize
    tensor = empty((1, count), dtype)
    assert tensor.shape == (1, count) and tensor.dtype == dtype and tensor.is_contiguous()
    assert tensor.fill_(2.0).eq(2.0).all()
