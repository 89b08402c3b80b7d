"""A model in groups of layers, and what the tests of its sensitivity share."""

import pytest
import torch
from helpers_reload import TOKENS, Model
from torch import nn

import qnkernels as qnk

GROUPS = {"attention": r"grouped", "ffn": r"body\.\d", "embedding": ["embedding"]}
LAYERS = {"attention": ["grouped"], "ffn": ["body.0", "body.2"], "embedding": ["embedding", "head"]}
OPTIONS = {
    "channel": {},
    "tensor, symmetric": {"per": "tensor", "symmetric": True},
    "groups": {"group_size": 6, "observer": "histogram"},
}
PRODUCT = qnk.PQConfig(block_size=6, n_centroids=8, n_iter=3)


def build(seed: int = 0, tied: bool = True) -> Model:
    torch.manual_seed(seed)
    return Model(tied=tied).eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: layer.weight.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv2d))
    }


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return model(TOKENS).logsumexp(-1).mean().item()


def exported(groups: tuple[str, ...], config, names: dict[str, list[str]] = LAYERS) -> Model:
    """A model whose layers of these groups are stored, really."""
    wanted = [name for group in groups for name in names[group]]
    model = build()
    return qnk.quantize_(model, config, lambda _, name: name in wanted) if wanted else model


class Evaluation:
    """Counts its calls, keeps what weights it saw, and may raise at one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.seen = stop, []

    def __call__(self, model: nn.Module) -> float:
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append(weights(model))
        return loss(model)


def measure(model=None, evaluate=loss, **options) -> qnk.Sensitivity:
    options = {"bits": (3, 8), "groups": GROUPS, "progress": False, **options}
    with pytest.warns(UserWarning, match="in no group, and left in full precision: conv$"):
        return qnk.sensitivity(model or build(), evaluate, **options)
