"""Layers over product-quantized weights: codes of ceil(log2 K) bits and a codebook in the file."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..bitstream import pack_bits, unpack_bits
from ..nn.noisy import NoisyConv2d, NoisyEmbedding, NoisyLinear
from ..nn.pq import PQConv2d, PQEmbedding, PQLinear, check_pq_embedding
from ..nn.pq_weight import CODEBOOK_DTYPES, PQLayer, PQWeight, code_dtype, lay_out
from ..ops.checks import fail
from ..ops.pq import GRADIENTS, MAX_CENTROIDS, MAX_DIMENSION
from .base import DTYPES, LayerSpec, Tensors, dtype_name, is_integer

STORED = {dtype_name(dtype): dtype for dtype in CODEBOOK_DTYPES}
RANGE = {
    "activation_noise.low": torch.float32,
    "activation_noise.high": torch.float32,
    "activation_noise.step": torch.int64,
}


@dataclass(frozen=True)
class PQSpec(LayerSpec):
    """PQLinear, PQEmbedding or PQConv2d.

    In the file: codes, one stream of codes of `bits` bits, row by row, low bits first; codebook, in
    codebook_dtype (null: in dtype), and with int8 its scale. codebooks: codes of a block, whose codewords
    would be summed; only 1 exists. activations: the output is fake-quantized over a saved range.
    """

    codebooks: int
    block_size: int
    n_centroids: int
    codebook_grad: str
    codebook_dtype: str | None
    zero_padding: bool
    activations: bool

    PLAIN: ClassVar = {
        "PQLinear": (nn.Linear, NoisyLinear),
        "PQEmbedding": (nn.Embedding, NoisyEmbedding),
        "PQConv2d": (nn.Conv2d, NoisyConv2d),
    }

    @classmethod
    def of(cls, layer: PQLayer) -> "PQSpec":
        """Raises ValueError for a codebook in a dtype that files do not have."""
        if layer.codebook.dtype not in DTYPES.values():
            fail("codebook", f"one of {tuple(DTYPES)} to save", layer.codebook.dtype)
        embedding, conv = isinstance(layer, PQEmbedding), isinstance(layer, PQConv2d)
        rows, blocks = layer.codes.shape
        shape = [rows, blocks * layer.block_size]
        if conv:
            shape = [rows, layer.in_channels // layer.groups, *layer.kernel_size]
        return cls(
            type="PQEmbedding" if embedding else "PQConv2d" if conv else "PQLinear",
            shape=shape,
            dtype=dtype_name(layer.codebook.dtype),
            bias=not embedding and layer.bias is not None,
            padding_idx=layer.padding_idx if embedding else None,
            codebooks=1,
            block_size=layer.block_size,
            n_centroids=layer.n_centroids,
            codebook_grad=layer.codebook_grad,
            codebook_dtype=None if layer.codebook_dtype is None else dtype_name(layer.codebook_dtype),
            zero_padding=embedding and layer.zero_padding,
            activations=layer.activations,
        )

    @property
    def bits(self) -> int:
        """Of a code in the file."""
        return max(1, (self.n_centroids - 1).bit_length())

    @property
    def codes_shape(self) -> tuple[int, int]:
        return self.shape[0], math.prod(self.shape[1:]) // self.block_size

    def _check_fields(self) -> None:
        if not is_integer(self.codebooks, 1, 1):
            fail("codebooks", "1, as no other number is known", repr(self.codebooks))
        columns = math.prod(self.shape[1:])
        if not is_integer(self.block_size, 1, MAX_DIMENSION) or columns % self.block_size:
            fail("block_size", f"a divisor of {columns} up to {MAX_DIMENSION}", repr(self.block_size))
        largest = min(MAX_CENTROIDS, math.prod(self.codes_shape))
        if not is_integer(self.n_centroids, 1, largest):
            fail("n_centroids", f"an integer in [1, {largest}]", repr(self.n_centroids))
        if not isinstance(self.codebook_grad, str) or self.codebook_grad not in GRADIENTS:
            fail("codebook_grad", f"one of {GRADIENTS}", repr(self.codebook_grad))
        name = self.codebook_dtype
        if name is not None and (not isinstance(name, str) or name not in STORED):
            fail("codebook_dtype", f"null or one of {tuple(STORED)}", repr(name))
        for flag in ("zero_padding", "activations"):
            if type(getattr(self, flag)) is not bool:
                fail(flag, "true or false", repr(getattr(self, flag)))
        if self.zero_padding and self.padding_idx is None:
            fail("zero_padding", "false without padding_idx", True)

    def _check_embedding(self, embedding: nn.Embedding) -> None:
        check_pq_embedding(embedding)

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        dtype = DTYPES[self.dtype] if self.codebook_dtype is None else STORED[self.codebook_dtype]
        parts = {
            "codes": (torch.uint8, (-(-math.prod(self.codes_shape) * self.bits // 8),)),
            "codebook": (dtype, (self.n_centroids, self.block_size)),
        }
        if dtype == torch.int8:
            parts["codebook_scale"] = (torch.float32, ())
        if self.activations:
            parts |= {name: (dtype, ()) for name, dtype in RANGE.items()}
        return parts

    def needs(self, part: str) -> tuple[str, ...]:
        if part == "codebook" and self.codebook_dtype == "int8":
            return "codebook", "codebook_scale"
        return (part,)

    def form(self, part: str) -> tuple:
        return {"codes": (*self.codes_shape, self.bits), "codebook": (self.dtype,)}.get(part, ())

    def encode(self, part: str, layer: PQLayer) -> torch.Tensor:
        if part == "codes":
            return pack_bits(layer.codes.cpu().contiguous().view(-1), self.bits)
        if part != "codebook":
            return layer.get_buffer(part)
        dtype, codebook = self.parts()["codebook"][0], layer.codebook.detach()
        if dtype != torch.int8:
            return codebook.to(dtype)
        # the arithmetic of fake_quantize, whose levels these are
        levels = torch.round(codebook.float() / layer.codebook_scale + 128).clamp(0, 255)
        return (levels - 128).to(torch.int8)

    def decode(self, part: str, tensors: Tensors) -> torch.Tensor:
        if part == "codes":
            count = math.prod(self.codes_shape)
            codes = unpack_bits(tensors["codes"], count, self.bits, code_dtype(self.n_centroids))
            return lay_out(codes.view(self.codes_shape))
        if part != "codebook":
            return tensors[part]
        codebook = tensors["codebook"]
        if self.codebook_dtype == "int8":
            codebook = codebook.float() * tensors["codebook_scale"]
        return nn.Parameter(codebook.to(DTYPES[self.dtype]))

    def check_values(self, tensors: Tensors) -> None:
        largest = int(tensors["codes"].int().max())
        if largest >= self.n_centroids:
            fail("codes", f"values below the {self.n_centroids} centroids", largest)
        scale = tensors.get("codebook_scale")
        if scale is not None and not (bool(scale.isfinite()) and float(scale) > 0):
            fail("codebook_scale", "a finite positive value", scale.item())
        for part, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                fail(part, "finite values", tensor.detach()[~tensor.isfinite()][0].item())

    def build(self, tensors: Tensors, layer: nn.Module) -> PQLayer:
        codebook = tensors["codebook"].requires_grad_(layer.weight.requires_grad)
        dtype = None if self.codebook_dtype is None else STORED[self.codebook_dtype]
        pq = PQWeight(tensors["codes"], codebook, self.codebook_grad, dtype, tensors.get("codebook_scale"))
        if self.type == "PQEmbedding":
            built = PQEmbedding(pq, self.padding_idx, self.zero_padding)
        else:
            built = PQConv2d(pq, layer) if self.type == "PQConv2d" else PQLinear(pq, layer.bias)
        if self.activations:
            built.quantize_activations_()
        return built.train(layer.training)
