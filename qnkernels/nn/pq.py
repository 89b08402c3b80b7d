"""Layers over product-quantized weights (arXiv 1907.05686; Quant-Noise, arXiv 2004.07320, section 3.2)."""

import torch
from torch import nn

from .. import functional
from ..ops.checks import fail
from .convolution import ConvGeometry
from .int_embedding import check_embedding
from .noisy import to_autocast
from .pq_weight import PQLayer, PQWeight, quantize_product


class PQLinear(PQLayer):
    """y = x @ W^T + bias over W [out, in] in codes; differentiable in x, codebook and bias.

    bias: a parameter as in nn.Linear, in its own dtype, or None.
    """

    def __init__(self, pq: PQWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(pq)
        self.out_features, self.in_features = pq.codes.shape[0], pq.codes.shape[1] * self.block_size
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 8,
        n_centroids: int = 256,
        n_iter: int = 20,
        seed: int = 0,
        codebook_grad: str = "mean",
        codebook_dtype: torch.dtype | None = None,
    ) -> "PQLinear":
        """A new layer from `linear`, sharing its bias: `n_iter` steps of k-means over blocks of `block_size`
        consecutive weights of a row. n_centroids: 2 to 65,536, reduced to the number of blocks where there
        are fewer. codebook_grad: "mean" or "sum". codebook_dtype: float16, bfloat16 or int8 to round the
        codewords to, in every forward and in the file. Raises ValueError naming the option.
        """
        options = (block_size, n_centroids, n_iter, seed, codebook_grad, codebook_dtype)
        return cls(quantize_product(linear.weight, *options)[0], linear.bias).train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of x (under autocast, in its dtype)."""
        y = functional.pq_linear(to_autocast(x), self.codes, self.codewords(), self.bias, self.codebook_grad)
        return self._output(y)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._pq_repr()}"
        )


class PQEmbedding(PQLayer):
    """Rows of a table [num_embeddings, embedding_dim] in codes; only the rows asked for are decoded.

    The row padding_idx gives no gradient. Where it was a row of zeros (zero_padding) it stays one; a layer
    that shares the codes, an output layer, sees the codewords nearest to zero instead.
    """

    def __init__(self, pq: PQWeight, padding_idx: int | None = None, zero_padding: bool = False) -> None:
        super().__init__(pq)
        self.num_embeddings, self.embedding_dim = pq.codes.shape[0], pq.codes.shape[1] * self.block_size
        self.padding_idx, self.zero_padding = padding_idx, zero_padding

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        block_size: int = 8,
        n_centroids: int = 256,
        n_iter: int = 20,
        seed: int = 0,
        codebook_grad: str = "mean",
        codebook_dtype: torch.dtype | None = None,
    ) -> "PQEmbedding":
        """A new layer from `embedding`; options as PQLinear.from_linear. max_norm, sparse and
        scale_grad_by_freq, which speak of the rows of a dense table, are not supported.
        """
        check_pq_embedding(embedding)
        options = (block_size, n_centroids, n_iter, seed, codebook_grad, codebook_dtype)
        pq, _ = quantize_product(embedding.weight, *options)
        return cls(pq, embedding.padding_idx, has_zero_padding(embedding)).train(embedding.training)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices [...], int64 or int32 -> [..., embedding_dim] in the dtype of the codebook."""
        indices = indices.long()
        y = functional.pq_embedding(indices, self.codes, self.codewords(), self.codebook_grad)
        if self.padding_idx is not None:
            padding = (indices == self.padding_idx)[..., None]
            y = y.masked_fill(padding, 0) if self.zero_padding else torch.where(padding, y.detach(), y)
        return self._output(y)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded table, a new tensor in each call; its gradient goes to the codebook."""
        table = self._decoded()
        if not self.zero_padding:
            return table
        rows = torch.arange(len(table), device=table.device)
        return table.masked_fill((rows == self.padding_idx)[:, None], 0)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._pq_repr()}"


class PQConv2d(ConvGeometry, PQLayer):
    """nn.Conv2d over filters [out, in / groups * kh * kw] in codes; differentiable in x, codebook and bias.

    While the codebook is trained the input is unfolded and multiplied as by PQLinear, so that no dense weight
    gradient is made. Otherwise, and with groups (whose dense gradient is 1 / groups as large as the filters
    of a plain convolution), the filters are decoded in each forward.
    """

    def __init__(self, pq: PQWeight, conv: nn.Conv2d) -> None:
        """conv: gives the geometry and the bias, which is shared."""
        super().__init__(pq)
        self._take_geometry(conv)
        self.register_parameter("bias", conv.bias)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        block_size: int = 8,
        n_centroids: int = 256,
        n_iter: int = 20,
        seed: int = 0,
        codebook_grad: str = "mean",
        codebook_dtype: torch.dtype | None = None,
    ) -> "PQConv2d":
        """A new layer from `conv`, sharing its bias; options as PQLinear.from_linear, a filter being a row of
        in / groups * kh * kw weights. The paper takes blocks of 9 for 3x3 filters and of 4 for 1x1.
        """
        options = (block_size, n_centroids, n_iter, seed, codebook_grad, codebook_dtype)
        return cls(quantize_product(conv.weight, *options)[0], conv).train(conv.training)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded filters [out, in / groups, kh, kw], a new tensor; its gradient goes to the codebook."""
        return self._decoded().view(self.filter_shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, in, h, w] or [in, h, w] -> the shape of nn.Conv2d."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        x = self._padded(x)
        if self.groups == 1 and torch.is_grad_enabled() and self.codebook.requires_grad:
            patches = self._patches(x)
            y = functional.pq_linear(patches, self.codes, self.codewords(), self.bias, self.codebook_grad)
            return self._output(self._image(y, x))
        return self._output(self._convolved(x, self.weight, self.bias))

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, {self._pq_repr()}"


def check_pq_embedding(embedding: nn.Embedding) -> None:
    """What can be product-quantized; raises ValueError or TypeError naming what cannot."""
    check_embedding(embedding)
    for option in ("sparse", "scale_grad_by_freq"):
        if getattr(embedding, option):
            fail(option, "False, since the gradient goes to the codebook", True)


def has_zero_padding(embedding: nn.Embedding) -> bool:
    index = embedding.padding_idx
    return index is not None and not bool(embedding.weight[index].any())
