"""A process of test_checkpoint_pq.py: loads FOLDER/model (its one argument), writes FOLDER/logits."""

import sys
from pathlib import Path

import torch
from torch import nn

import qnkernels as qnk


class Model(nn.Module):
    """A tied language model with both kinds of convolution."""

    def __init__(self, dim: int = 48, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, dim, padding_idx=0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, (1, 3), groups=2, padding="same", bias=False)
        self.body = nn.Sequential(nn.Linear(dim, 3 * dim), nn.ReLU(), nn.Linear(3 * dim, dim, bias=False))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.grouped(self.conv(x[:, None])).mean(1)
        return self.head(self.norm(x + self.body(x)))


TOKENS = torch.arange(50).reshape(5, 10)


def main(folder: Path) -> None:
    torch.manual_seed(77)
    model = qnk.load_compressed(Model(), folder / "model").eval()
    with torch.no_grad():
        torch.save(model(TOKENS), folder / "logits")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
