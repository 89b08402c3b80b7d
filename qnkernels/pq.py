"""Product quantization after training: codes into a codebook of blocks (arXiv 1907.05686)."""

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn

from .layers import Layers, Steps, check_owns_weight, naming
from .nn.compressed import become_
from .nn.noisy import NOISY, check_weight
from .nn.pq import PQConv2d, PQEmbedding, PQLinear, check_pq_embedding, has_zero_padding
from .nn.pq_weight import PQLayer, PQWeight, check_block_size, check_pq_options, quantize_product

# by id of the weight: its codes, and the objective after each iteration of k-means
Quantized = dict[int, tuple[PQWeight, list[float]]]


@dataclass(frozen=True)
class PQConfig:
    """nn.Linear, nn.Embedding and nn.Conv2d, noisy or not, become PQLinear, PQEmbedding and PQConv2d.

    block_size: consecutive weights of a row (of a filter, in / groups * kh * kw, for a convolution).
    n_centroids: codewords of a layer, 2 to 65,536, reduced to the number of blocks where there are fewer.
    n_iter, seed: of the k-means. codebook_grad: the gradient of a codeword is the "mean" or the "sum" over
    its blocks. codebook_dtype: float16, bfloat16 or int8 to round the codewords to, in every forward and in
    the file; None for the dtype of the weight. activations: the output of each layer is fake-quantized to 8
    bits. group: processes that share the k-means, and get the same codes. Layers that share a weight share
    codes and codebook. Raises ValueError naming the field.
    """

    block_size: int = 8
    n_centroids: int = 256
    n_iter: int = 20
    seed: int = 0
    codebook_grad: str = "mean"
    codebook_dtype: torch.dtype | None = None
    activations: bool = False
    group: "dist.ProcessGroup | None" = field(default=None, repr=False)

    CONVERTS: ClassVar[tuple[type[nn.Module], ...]] = (*NOISY, *NOISY.values())

    def __post_init__(self) -> None:
        check_pq_options(*self._options())

    def _options(self) -> tuple:
        sizes = (self.block_size, self.n_centroids, self.n_iter, self.seed)
        return (*sizes, self.codebook_grad, self.codebook_dtype)

    def plan(self, layers: Layers) -> Steps:
        """One step per layer, made after every layer was checked and quantized; a step cannot fail."""
        for name, layer in layers:
            with naming(name):
                self.check(layer)
        quantized: Quantized = {}
        return [functools.partial(become_, layer, self.convert(layer, quantized)) for _, layer in layers]

    def check(self, layer: nn.Module) -> None:
        """Raises ValueError or TypeError where `convert` would."""
        check_owns_weight(layer)
        if isinstance(layer, nn.Embedding):
            check_pq_embedding(layer)
        check_weight(layer.weight)
        check_block_size(layer.weight, self.block_size)

    def convert(self, layer: nn.Module, quantized: Quantized) -> PQLayer:
        """The PQ layer that `layer` is to become; `quantized` holds, and gets, the weights that are done."""
        weight = layer.weight
        if id(weight) not in quantized:
            quantized[id(weight)] = quantize_product(weight, *self._options(), group=self.group)
        pq, _ = quantized[id(weight)]
        if isinstance(layer, nn.Embedding):
            converted = PQEmbedding(pq, layer.padding_idx, has_zero_padding(layer))
        else:
            converted = PQConv2d(pq, layer) if isinstance(layer, nn.Conv2d) else PQLinear(pq, layer.bias)
        if self.activations:
            converted.quantize_activations_()
        return converted.train(layer.training)
