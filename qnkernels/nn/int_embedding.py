"""Embeddings over a table in codes of 2 to 8 bits."""

import torch
from torch import nn

from .. import functional
from ..ops.checks import fail
from .noisy import check_weight
from .packed import PackedLayer, PackedWeight, pack_weight


class IntEmbedding(PackedLayer):
    """Rows of a table [num_embeddings, embedding_dim] in 2 to 8 bits; only the rows asked for are decoded.

    padding_idx has no effect on the forward; it is kept for those who read it.
    """

    def __init__(self, packed: PackedWeight, padding_idx: int | None = None) -> None:
        super().__init__(packed)
        self.num_embeddings, self.embedding_dim = packed.codes.shape[0], packed.columns
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = False,
        observer: str = "minmax",
        per: str = "channel",
    ) -> "IntEmbedding":
        """A new layer from `embedding`; options as `pack_weight`, a row of the table being a channel.

        Raises ValueError naming the option; max_norm, which rewrites the table, is not supported.
        """
        check_embedding(embedding)
        packed = pack_weight(embedding.weight.detach(), bits, group_size, symmetric, observer, per)
        return cls(packed, embedding.padding_idx).train(embedding.training)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices [...], int64 or int32 -> [..., embedding_dim] in the dtype of the weight."""
        table = (self.weight_packed, self.scale, self.zero_point)
        return functional.int_embedding(indices.long(), *table, self.bits, dtype=self.weight_dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._packing_repr()}"


def check_embedding(embedding: nn.Embedding) -> None:
    """What can be packed; raises ValueError or TypeError naming what cannot."""
    if embedding.max_norm is not None:
        fail("max_norm", "None, since it rewrites the table in each forward", embedding.max_norm)
    check_weight(embedding.weight)
