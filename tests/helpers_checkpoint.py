"""A model of every layer that files hold, and what its tests share."""

import copy

import pytest
import torch
from torch import nn

import qnkernels as qnk
from qnkernels import container

CONFIGS = {
    "plain": None,
    "noisy": qnk.ScalarNoiseConfig(activations=True),
    "int8": qnk.Int8WeightOnlyConfig(),
    "int8 groups, symmetric": qnk.Int8WeightOnlyConfig(group_size=16, symmetric=True),
    "int4": qnk.Int4WeightOnlyConfig(group_size=32),
    "int4 per tensor": qnk.Int4WeightOnlyConfig(group_size=None, per="tensor"),
}


class Model(nn.Module):
    """A tied language model with a convolution, a shared module, and buffers of both sorts."""

    def __init__(self, dim: int = 32, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, dim, padding_idx=0)
        self.conv = nn.Conv1d(dim, dim, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim, bias=False))
        self.twice = self.body[0]
        self.norm = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("transient", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embedding(tokens).transpose(1, 2))
        return self.head(self.body(self.norm(x).transpose(1, 2)))


def build(config: str = "int8", dim: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(seed)
    model = Model(dim).to(dtype)
    model(torch.randint(0, 50, (3, 7)))  # moves the running statistics
    if CONFIGS[config] is not None:
        qnk.quantize_(model, CONFIGS[config])
    return model.eval()


def fresh(dim: int = 32, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(99)
    return Model(dim).to(dtype).eval()


def snapshot(model: nn.Module) -> tuple[list[type], dict[str, torch.Tensor]]:
    return [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())


def assert_refused(model: nn.Module, path, message: str, error: type[Exception] = ValueError) -> None:
    """Loading raises, and the model is as it was."""
    types, state = snapshot(model)
    with pytest.raises(error, match=message):
        qnk.load_compressed(model, path)
    assert [type(module) for module in model.modules()] == types
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def rewrite(path, edit) -> None:
    """Let `edit(specification, tensors)` change a file, and give it a digest that matches."""
    specification, tensors = container.read(path)
    edit(specification, tensors)
    container.write(path, tensors, specification)
