"""A small decoder named as fairseq names its own; as a program, `helpers_ipq.py RANK FOLDER`, one of two
processes that quantize it together and write FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import qnkernels as qnk

STAGES = (r"fc[12]", r"emb", r"attn")


class Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(dim, dim) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
        )
        self.fc1, self.fc2, self.norm = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.self_attn[name](x) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn["out_proj"](
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        )
        return self.norm(x + self.fc2(self.fc1(x).relu()))


class Decoder(nn.Module):
    """Two tables of tokens, the second projected, as of an adaptive input; the output is tied to one."""

    def __init__(self, dim: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Module()
        self.embed_tokens.embeddings = nn.ModuleList(
            [
                nn.Sequential(nn.Embedding(20, dim), nn.Linear(dim, dim, bias=False)),
                nn.Sequential(nn.Embedding(30, dim // 2), nn.Linear(dim // 2, dim, bias=False)),
            ]
        )
        self.layers = nn.ModuleList(Layer(dim) for _ in range(layers))
        self.output = nn.Linear(dim, 20, bias=False)
        self.output.weight = self.embed_tokens.embeddings[0][0].weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = sum(table(tokens) for table in self.embed_tokens.embeddings)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder(tokens)


TOKENS = torch.arange(20).reshape(2, 10)


def make_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def finetune(model: nn.Module, steps: int = 3) -> list[float]:
    """Losses of some steps of an optimizer that is made anew, as the parameters have changed."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def finetuned(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (of 16 bits) and the gradient of the codebook of a layer under DistributedDataParallel."""
    layer = wide_layer()
    parallel = nn.parallel.DistributedDataParallel(layer)
    for _ in range(2):
        parallel(data_of(rank)).square().mean().backward()
    return layer.codes, layer.codebook.grad


def wide_layer() -> nn.Module:
    torch.manual_seed(1)
    return qnk.quantize_(nn.Linear(32, 64), qnk.PQConfig(2, 300, 2))


def data_of(rank: int) -> torch.Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(rank))


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    model = make_model()
    if rank == 1:  # what should not be, and must not matter
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    group = dist.group.WORLD
    stages = [str(stage) for stage in qnk.IPQ(model, STAGES, 8, 16, n_iter=4, group=group)]
    torch.save((stages, model.state_dict(), *finetuned(rank)), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
