"""Product-quantization noise: blocks of weights are noised in training (Quant-Noise, arXiv 2004.07320)."""

import functools
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import nn

from .layers import Layers, Steps, naming
from .nn.noise import check_block_options
from .nn.noisy import NOISY, add_noise_, make_noise


@dataclass(frozen=True)
class ProductNoiseConfig:
    """nn.Linear, nn.Embedding and nn.Conv2d become noisy: training replaces blocks of weights at rate p.

    block_size: consecutive weights of a row (of a filter, in * kh * kw, for a convolution). kind: "zero"
    (the other blocks are multiplied by 1 / (1 - p) with `rescale`), "mean" of the block, or "centroid", the
    nearest of `n_centroids` codewords, which the blocks of the weight are clustered into in the first
    training forward; `n_iter` steps of k-means follow every `update_every` forwards (0: never). In eval the
    weight is used as it is, and with "centroid" with every block at its nearest codeword.
    Raises ValueError naming the field.
    """

    block_size: int = 8
    p: float = 0.1
    kind: str = "zero"
    rescale: bool = True
    n_centroids: int = 256
    update_every: int = 100
    n_iter: int = 3

    CONVERTS: ClassVar[tuple[type[nn.Module], ...]] = (*NOISY, *NOISY.values())

    def __post_init__(self) -> None:
        options = (self.n_centroids, self.update_every, self.n_iter)
        check_block_options(self.block_size, self.p, self.kind, *options)

    def plan(self, layers: Layers) -> Steps:
        """One step per layer, made after every layer was checked; a step cannot fail."""
        steps = []
        for name, layer in layers:
            with naming(name):
                noise = make_noise(layer, "block", **asdict(self))
                steps.append(functools.partial(add_noise_, layer, *noise))
        return steps
