"""PQLinear and PQConv2d compute what fairseq's layers compute."""

from pathlib import Path

import numpy as np
import torch
from numeric import relative_error
from torch import nn

from qnkernels.nn import PQConv2d, PQLinear
from qnkernels.nn.pq_weight import PQWeight, lay_out

DATA = Path(__file__).parent.parent / "data"


def golden(name: str) -> dict[str, torch.Tensor]:
    file = np.load(DATA / name)
    return {key: torch.from_numpy(file[key]) for key in file}


def layer_of_fairseq(centroids, assignments, rows: int) -> PQWeight:
    """fairseq keeps the codes of the first block of all rows, then those of the second, and so on."""
    codes = assignments.reshape(-1, rows).t().to(torch.uint8)
    return PQWeight(lay_out(codes), nn.Parameter(centroids), codebook_grad="sum")


def test_linear_is_that_of_fairseq():
    arrays = golden("fairseq_product.npz")
    bias = nn.Parameter(arrays["layer_bias"])
    layer = PQLinear(layer_of_fairseq(arrays["pq8_centroids"], arrays["pq8_assignments"], 128), bias)
    assert torch.equal(layer.weight, arrays["pq8_decoded"])
    x = arrays["layer_x"].requires_grad_()
    y = layer(x)
    y.backward(arrays["layer_grad_out"])
    assert relative_error(y, arrays["layer_y"]) < 1e-4
    assert relative_error(x.grad, arrays["layer_grad_x"]) < 1e-4
    assert relative_error(layer.codebook.grad, arrays["layer_grad_centroids_sum"]) < 1e-4
    mean = PQLinear(PQWeight(layer.codes, nn.Parameter(layer.codebook.detach().clone())), bias)
    mean(arrays["layer_x"]).backward(arrays["layer_grad_out"])
    expected = arrays["layer_grad_centroids_sum"] / arrays["layer_counts"].clamp(min=1)[:, None]
    assert relative_error(mean.codebook.grad, expected) < 1e-4


def test_conv_is_that_of_fairseq():
    arrays = golden("fairseq_conv.npz")
    conv = nn.Conv2d(8, 16, 3)
    layer = PQConv2d(layer_of_fairseq(arrays["centroids"], arrays["assignments"], 16), conv)
    assert torch.equal(layer.weight, arrays["decoded"])
