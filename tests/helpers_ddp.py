"""One of two DDP processes of test_training.py: `helpers_ddp.py RANK FOLDER`; writes FOLDER/RANK.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qnkernels as qnk

STEPS = 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    config = qnk.ScalarNoiseConfig(
        bits=3, observer="ema_minmax", update_every=2, activations=True, p_activations=0.5
    )
    return qnk.quantize_(model, config)


def data_of(rank: int) -> torch.Tensor:
    return torch.randint(0, 20, (5, 3), generator=torch.Generator().manual_seed(rank))


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    return model(data_of(rank)).square().mean()


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    model = make_model()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(100 + rank)
    result = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(parallel, rank)
        if step > 0:
            # a second forward before the backward, in which DDP overwrites the buffers of the first
            loss = loss + loss_of(parallel, rank)
        loss.backward()
        if step == 0:
            result["gradients"] = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
    result["parameters"] = [parameter.detach() for parameter in model.parameters()]
    result["step"] = model[1].noise.step
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
