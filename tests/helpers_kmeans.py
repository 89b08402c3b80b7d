"""One of two processes of test_kmeans.py: `helpers_kmeans.py RANK FOLDER`; writes FOLDER/RANK.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import qnkernels as qnk


def results(group=None) -> list[tuple[torch.Tensor, torch.Tensor, list[float]]]:
    """Clusterings that exercise the start, weights, refilled clusters, and a process without points."""
    generator = torch.Generator().manual_seed(3)
    points, weights = torch.randn(1999, 5, generator=generator), torch.rand(1999, generator=generator)
    importance = torch.tensor([1.0, 0.0, 4.0, 0.5, 2.0])
    far = torch.cat((torch.zeros(1, 5), torch.full((29, 5), 100.0)))
    many = torch.randn(18_001, 3, generator=generator)  # so many that bounds may be kept
    calls = (
        (many, 40, {}),
        (points, 30, {"seed": 5}),
        (points, 30, {"init": "k-means++", "weights": weights, "importance": importance}),
        (points, 30, {"init": far, "weights": weights}),
        (points[:1], 1, {}),
    )
    found = [qnk.kmeans(given, count, 7, group=group, **options) for given, count, options in calls]
    return [(result.centroids, result.codes, result.objective) for result in found]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    torch.save(results(dist.group.WORLD), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
