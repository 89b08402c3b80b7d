"""The codebook of centroid noise: a few steps of k-means every so many training forwards."""

import torch

from ..kmeans import kmeans
from ..ops.library import op
from .fixed import FixedBuffers

FIRST_ITERATIONS = 20  # of the k-means that starts from random blocks


def _fake(weight, codebook, step, every, n_iter) -> None:
    return None


@op(
    "refresh_codebook_(Tensor weight, Tensor(a!) codebook, Tensor(b!) step, int every, int n_iter) -> ()",
    _fake,
)
def refresh_codebook_(weight, codebook, step, every, n_iter) -> None:
    """An op, so that torch.compile sees a call and not the loop. step: on the CPU, where it is read without
    waiting for the device.
    """
    forward = int(step)
    step += 1
    if forward == 0 or (every > 0 and forward % every == 0):
        start = "random" if forward == 0 else codebook
        points = weight.detach().reshape(-1, codebook.shape[1])
        iterations = n_iter if forward else FIRST_ITERATIONS
        codebook.copy_(kmeans(points, len(codebook), iterations, start).centroids)


class NoiseCodebook(FixedBuffers):
    """Codewords fp32 [K, d] that follow a weight [rows, n_blocks * d], K at most its number of blocks.

    The first training forward clusters the blocks of the weight (20 steps of k-means from random blocks);
    every `update_every` forwards `n_iter` steps follow from where the codebook is (0: never). The buffer
    codebook is not saved: a model that loads a state starts anew.
    """

    FIXED = ("codebook",)

    def __init__(
        self, weight: torch.Tensor, block_size: int, n_centroids: int, update_every: int, n_iter: int
    ) -> None:
        super().__init__()
        self.update_every, self.n_iter = update_every, n_iter
        shape = (min(n_centroids, weight.numel() // block_size), block_size)
        self.register_buffer("codebook", torch.zeros(shape, device=weight.device), persistent=False)
        self.step = torch.zeros((), dtype=torch.int64, device="cpu")  # no buffer, since it stays on the CPU

    def training_codebook(self, weight: torch.Tensor, counts: bool) -> torch.Tensor:
        """The codebook for a training forward on weight [rows, columns]; with `counts`, refreshed if due."""
        if counts:
            self._refresh(weight, self.codebook, self.step, self.update_every)
        return self.codebook

    def stored_codebook(self, weight: torch.Tensor) -> torch.Tensor:
        """The codebook as training left it; before any training forward, that of weight. Changes no state."""
        codebook = self.codebook.clone()
        self._refresh(weight, codebook, self.step.clone(), 0)
        return codebook

    def _refresh(self, weight, codebook, step, every) -> None:
        torch.ops.qnkernels.refresh_codebook_(weight, codebook, step, every, self.n_iter)

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self.step.zero_()

    def extra_repr(self) -> str:
        k, d = self.codebook.shape
        return f"{k}, {d}, update_every={self.update_every}, n_iter={self.n_iter}"
