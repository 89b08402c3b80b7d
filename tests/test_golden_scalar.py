"""The scalar quantizers against those of the original Quant-Noise code, on a weight [96, 64].

tests/data/fairseq_scalar.npz holds the weight and what fairseq's int8 quantizers made of it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qnkernels as qnk


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    file = np.load(Path(__file__).parent / "data" / "fairseq_scalar.npz")
    return {name: torch.from_numpy(file[name]) for name in file}


def test_minmax_quantizer_is_that_of_fairseq_bit_for_bit(golden):
    low, high = qnk.functional.minmax(golden["weight"])
    scale, zero_point = qnk.functional.quantization_parameters(low, high, 8)
    assert torch.equal(scale, golden["tensor_scale"][0])
    assert torch.equal(zero_point, golden["tensor_zero_point"][0])
    quantized = qnk.functional.fake_quantize(golden["weight"], scale, zero_point, 8)
    assert torch.equal(quantized, golden["tensor_dequantized"])


def test_noisy_layer_in_eval_and_its_export_are_that_quantizer(golden):
    linear = nn.Linear(64, 96)
    with torch.no_grad():
        linear.weight.copy_(golden["weight"])
    noisy = qnk.nn.NoisyLinear.from_linear(linear, bits=8).eval()
    assert torch.equal(noisy.noise(noisy.weight), golden["tensor_dequantized"])
    exported = qnk.nn.Int8Linear.from_linear(noisy, per="tensor")
    assert torch.equal(exported.weight, golden["tensor_dequantized"])


def test_histogram_range_is_no_worse_than_fairseq(golden):
    weight = golden["weight"]
    low, high = qnk.functional.histogram_range(weight, 8)
    scale, zero_point = qnk.functional.quantization_parameters(low, high, 8)
    ours = qnk.functional.fake_quantize(weight, scale, zero_point, 8)
    theirs = golden["histogram_dequantized"]
    assert (ours - weight).double().square().sum() <= (theirs - weight).double().square().sum()
