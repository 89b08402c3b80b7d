"""bench_int_embedding.py: the contenders do the same work."""

import importlib

import pytest
import torch

bench = importlib.import_module("bench_int_embedding")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_contenders_decode_the_same_rows(bits, dtype):
    inputs = bench.make_inputs((40, 256), bits, 9, dtype, torch.device("cpu"), 3)
    results = {
        one.name: one.prepare(inputs)() for one in bench.contenders(dtype, "cpu") if one.role != "ceiling"
    }
    assert len(results) == 4
    for name, result in results.items():
        assert torch.equal(result, inputs.table[inputs.indices]), name


def test_moved_bytes_of_a_case():
    case = bench.case((100, 256), 4, 7, torch.bfloat16)
    assert case.moved_bytes == 7 * (128 + 2 * 5 + 256 * 2)
