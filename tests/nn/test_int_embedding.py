"""IntEmbedding: rows decoded on demand are the rows of the quantized table."""

import copy

import pytest
import torch
from torch import nn

from qnkernels.nn import IntEmbedding, NoisyEmbedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group_size", "columns"), [(8, None, 7), (8, 4, 8), (4, None, 10), (4, 2, 6)]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_are_those_of_the_decoded_table(dtype, bits, group_size, columns, symmetric):
    torch.manual_seed(columns)
    embedding = nn.Embedding(11, columns, dtype=dtype)
    layer = IntEmbedding.from_embedding(embedding, bits, group_size, symmetric)
    table = layer.weight
    assert table.dtype == dtype and table.shape == (11, columns)
    for indices in (torch.tensor(10), torch.randint(0, 11, (3, 0)), torch.randint(0, 11, (2, 5))):
        assert torch.equal(layer(indices), table[indices])
    assert torch.equal(layer(torch.tensor([1, 2], dtype=torch.int32)), table[1:3])


@pytest.mark.parametrize("bits", [4, 8])
def test_table_is_what_noise_uses_in_eval(bits):
    torch.manual_seed(bits)
    noisy = NoisyEmbedding.from_embedding(nn.Embedding(9, 6), bits=bits, per="channel").eval()
    layer = IntEmbedding.from_embedding(noisy, bits)
    indices = torch.arange(9)
    assert torch.equal(layer(indices), noisy(indices))


def test_padding_row_decodes_to_zero():
    layer = IntEmbedding.from_embedding(nn.Embedding(5, 4, padding_idx=-2), per="tensor")
    assert layer.padding_idx == 3 and torch.equal(layer(torch.tensor(3)), torch.zeros(4))


def test_casting_the_model_casts_the_rows():
    layer = IntEmbedding.from_embedding(nn.Embedding(5, 4))
    scale = layer.scale.clone()
    assert layer.bfloat16()(torch.tensor(0)).dtype == torch.bfloat16 and torch.equal(layer.scale, scale)


def test_index_outside_the_table():
    layer = IntEmbedding.from_embedding(nn.Embedding(5, 4))
    with pytest.raises(IndexError):
        layer(torch.tensor([5]))


def test_deepcopy_and_repr():
    layer = IntEmbedding.from_embedding(
        nn.Embedding(5, 4, padding_idx=1), bits=4, group_size=2, symmetric=True
    )
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    assert repr(layer) == "IntEmbedding(5, 4, padding_idx=1, bits=4, group_size=2, symmetric=True)"


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"max_norm: expected None, since .*, got 1.0"):
        IntEmbedding.from_embedding(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(ValueError, match=r"max_norm: expected None, since .*, got 1.0"):
        NoisyEmbedding.from_embedding(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(ValueError, match=r"sparse: expected False, since .*, got True"):
        NoisyEmbedding.from_embedding(nn.Embedding(5, 4, sparse=True))
