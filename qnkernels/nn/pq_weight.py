"""Weights in blocks that are rows of a codebook, and what the layers that hold one share."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from .. import functional
from ..kmeans import kmeans
from ..ops.checks import fail
from ..ops.pq import GRADIENTS, MAX_CENTROIDS, MAX_DIMENSION
from .compressed import CompressedLayer
from .noise import ActivationNoise, check_integer
from .noisy import check_weight

CODEBOOK_DTYPES = (torch.float16, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class PQWeight:
    """A weight [rows, n_blocks * d]: block b of row o is codebook[codes[o, b]].

    codes: uint8 (K up to 256) or uint16, [rows, n_blocks], laid out by `lay_out`. codebook: parameter [K, d].
    codebook_grad: the gradient of a codeword is the "mean" or the "sum" over its blocks. codebook_dtype:
    what the codewords are rounded to wherever they are used and saved, or None; the parameter keeps its
    own dtype. scale: fp32, 0-d, of the int8 codewords (None for the other dtypes).
    """

    codes: torch.Tensor
    codebook: nn.Parameter
    codebook_grad: str = "mean"
    codebook_dtype: torch.dtype | None = None
    scale: torch.Tensor | None = None


def code_dtype(n_centroids: int) -> torch.dtype:
    return torch.uint8 if n_centroids <= 256 else torch.uint16


def lay_out(codes: torch.Tensor) -> torch.Tensor:
    """The same values [rows, n_blocks] with those of a block adjacent in memory, as the kernels read them."""
    return codes.t().contiguous().t()


def check_pq_options(
    block_size: int,
    n_centroids: int,
    n_iter: int,
    seed: int,
    codebook_grad: str,
    codebook_dtype: torch.dtype | None,
) -> None:
    """What `quantize_product` accepts, apart from the weight; raises ValueError naming the argument."""
    check_integer("block_size", block_size, 1, MAX_DIMENSION)
    check_integer("n_centroids", n_centroids, 2, MAX_CENTROIDS)
    check_integer("n_iter", n_iter, 1)
    check_integer("seed", seed, 0, 2**63 - 1)
    if codebook_grad not in GRADIENTS:
        fail("codebook_grad", f"one of {GRADIENTS}", repr(codebook_grad))
    if codebook_dtype is not None and codebook_dtype not in CODEBOOK_DTYPES:
        fail("codebook_dtype", f"None or one of {CODEBOOK_DTYPES}", repr(codebook_dtype))


@torch.no_grad()
def quantize_product(
    weight: torch.Tensor,
    block_size: int = 8,
    n_centroids: int = 256,
    n_iter: int = 20,
    seed: int = 0,
    codebook_grad: str = "mean",
    codebook_dtype: torch.dtype | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> tuple[PQWeight, list[float]]:
    """Cluster the blocks of weight [rows, ...], cut along its rows; the objectives are those of kmeans.

    n_centroids is reduced to the number of blocks where there are fewer. The codebook takes the dtype of the
    weight. group: processes that share the k-means; all get the codes of the weight that its first one holds.
    Raises ValueError and TypeError naming the argument.
    """
    check_pq_options(block_size, n_centroids, n_iter, seed, codebook_grad, codebook_dtype)
    check_weight(weight)
    check_block_size(weight, block_size)
    rows = weight.detach().flatten(1)
    if group is not None:
        rows = rows.clone(memory_format=torch.contiguous_format)
        dist.broadcast(rows, dist.get_global_rank(group, 0), group=group)
    blocks = rows.reshape(-1, block_size)
    result = kmeans(blocks, min(n_centroids, len(blocks)), n_iter, seed=seed, group=group)
    codebook = nn.Parameter(result.centroids.to(weight.dtype), requires_grad=weight.requires_grad)
    codes = result.codes.to(code_dtype(len(codebook))).reshape(len(rows), -1)
    scale = codebook_scale(codebook) if codebook_dtype == torch.int8 else None
    return PQWeight(lay_out(codes), codebook, codebook_grad, codebook_dtype, scale), result.objective


def check_block_size(weight: torch.Tensor, block_size: int) -> None:
    columns = weight.flatten(1).shape[1]
    if columns % block_size:
        fail("block_size", f"a divisor of the {columns} weights of a row", block_size)


def codebook_scale(codebook: torch.Tensor) -> torch.Tensor:
    """Scale (fp32, 0-d) of symmetric 8-bit codewords."""
    low, high = functional.minmax(codebook.detach())
    return functional.quantization_parameters(low, high, 8, symmetric=True)[0]


class PQLayer(CompressedLayer):
    """A layer over a product-quantized weight: buffer codes [rows, n_blocks], parameter codebook [K, d].

    The codebook is trained; casting the model casts it, and never the codes. With codebook_dtype int8 there
    is a buffer codebook_scale, too: that of the last training forward, or of the last one before eval.
    """

    FIXED = ("codes", "codebook_scale")

    def __init__(self, pq: PQWeight) -> None:
        super().__init__()
        self.codebook_grad, self.codebook_dtype = pq.codebook_grad, pq.codebook_dtype
        self.register_parameter("codebook", pq.codebook)
        self.register_buffer("codes", pq.codes)
        if pq.codebook_dtype == torch.int8:
            self.register_buffer("codebook_scale", pq.scale)
        self.activations = False

    def quantize_activations_(self) -> None:
        """Fake-quantize the output to 8 bits: in training over a moving range, in eval over the range that
        training left (before any training: over its own). The range is part of the state_dict.
        """
        options = dict(bits=8, p=1.0, observer="ema_minmax", update_every=1, persistent=True)
        self.activations = True
        self.activation_noise = ActivationNoise(device=self.codes.device, **options).train(self.training)

    def _output(self, y: torch.Tensor) -> torch.Tensor:
        return self.activation_noise(y) if self.activations else y

    @property
    def block_size(self) -> int:
        return self.codebook.shape[1]

    @property
    def n_centroids(self) -> int:
        return self.codebook.shape[0]

    @property
    def pq(self) -> PQWeight:
        """Codes and codebook as one value (shared, not copied), for another layer of the same weight."""
        scale = self._buffers.get("codebook_scale")
        return PQWeight(self.codes, self.codebook, self.codebook_grad, self.codebook_dtype, scale)

    def codewords(self) -> torch.Tensor:
        """The codebook [K, d] as the layer computes with it: rounded to codebook_dtype, in its own dtype.

        The gradient is straight-through.
        """
        codebook, dtype = self.codebook, self.codebook_dtype
        if dtype is None or dtype == codebook.dtype:
            return codebook
        if dtype != torch.int8:
            return functional.round_to(codebook, dtype)
        if self.training:
            scale = codebook_scale(codebook)
            self.codebook_scale.copy_(scale)
        else:
            scale = self.codebook_scale.clone()
        return functional.fake_quantize(codebook, scale, 128.0, 8)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight, a new tensor in each call; its gradient goes to the codebook."""
        return self._decoded()

    def _decoded(self) -> torch.Tensor:
        """[rows, n_blocks * d]. A method, since torch.compile does not follow super() to a property."""
        return functional.pq_decode(self.codes, self.codewords(), self.codebook_grad)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        codes = state_dict.get(prefix + "codes")
        if codes is not None and (problem := self._problem(codes)):
            errors.append(f"{prefix}codes: {problem}")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if metadata.get("assign_to_params_buffers", False):
            self.codes = lay_out(self.codes)

    def _problem(self, codes: torch.Tensor) -> str | None:
        """Why codes cannot be loaded; the kernels do not check them."""
        if codes.dtype != self.codes.dtype:
            return f"expected {self.codes.dtype}, got {codes.dtype}"
        if codes.device.type == "meta" or codes.numel() == 0 or int(codes.int().max()) < self.n_centroids:
            return None
        return f"expected values below the {self.n_centroids} centroids, got {int(codes.int().max())}"

    def _pq_repr(self) -> str:
        gradient = "" if self.codebook_grad == "mean" else f", codebook_grad={self.codebook_grad!r}"
        dtype = "" if self.codebook_dtype is None else f", codebook_dtype={self.codebook_dtype}"
        return f"block_size={self.block_size}, n_centroids={self.n_centroids}{gradient}{dtype}"
