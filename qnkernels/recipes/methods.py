"""The trainings that the demo compares, and the compressed models that each gives.

All from the same initial weights on the same data in the same order, and all compressed alike: the scalar
ones with one range per weight matrix, from its smallest to its largest value (Quant-Noise, arXiv 2004.07320,
section 4.2), the product-quantized ones in the same stages with the same finetuning (section 3.2). int8 is
served in three ways: weights only, and with activations in 8 bits over ranges of their own (dynamic) or
over those of some training text (static).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..calibrate import calibrate
from ..ipq import IPQ
from ..product import ProductNoiseConfig
from ..ptq import (
    Int4WeightOnlyConfig,
    Int8DynamicConfig,
    Int8StaticConfig,
    Int8WeightOnlyConfig,
    IntWeightOnlyConfig,
)
from ..scalar import ScalarNoiseConfig
from .training import windows
from .transformer import LanguageModel

METHODS = FULL_PRECISION, AFTER_TRAINING, QAT, QUANT_NOISE = (
    "full precision",
    "after training",
    "QAT",
    "Quant-Noise",
)
PRECISIONS = FP32, INT8, INT8_DYNAMIC, INT8_STATIC, INT4, PRODUCT, PRODUCT_INT8 = (
    *("fp32", "int8", "int8-dynamic", "int8-static", "int4"),
    *("iPQ", "iPQ+int8"),
)
PRODUCTS = (PRODUCT, PRODUCT_INT8)  # the second with codewords and activations in int8
NAMES = tuple(name.lower() for name in PRECISIONS)  # as --methods takes them
EXPORTS = {
    INT8: Int8WeightOnlyConfig,
    INT8_DYNAMIC: Int8DynamicConfig,
    INT8_STATIC: Int8StaticConfig,
    INT4: Int4WeightOnlyConfig,
}
CALIBRATION_WINDOWS, OBSERVER = 256, "ema_minmax"  # of training text, for the ranges of int8-static
UPDATE_EVERY = 10  # training forwards between two looks at a weight's range

STAGES = (r"fc[12]", r"embedding", r"attention")
BLOCK_SIZE = 8
EMBEDDING, REST = "embedding|head", "blocks"
# in the preset "small", one codeword for 24 blocks of the embedding, and for 8 to 32 of the other matrices
CENTROIDS = {"embedding": 256, "*": 64}
PROXY_RATE = 0.1
CODEBOOK_UPDATE_EVERY = 50  # training forwards between two moves of the codewords of QAT


@dataclass(frozen=True)
class Variant:
    """A row of the table: how a model was trained and stored. p: rate of the noise in training."""

    method: str
    precision: str
    p: float | None = None

    @property
    def label(self) -> str:
        return self.method if self.precision == FP32 else f"{self.precision} {self.method}"

    @property
    def file_name(self) -> str:
        return self.label.lower().replace(" ", "-") + ".safetensors"

    def noise(self) -> dict[str, ScalarNoiseConfig | ProductNoiseConfig]:
        """What the layers are trained with, by a pattern found in their names; empty for plain training.

        Noise for product quantization sets blocks to zero, and QAT, where no block would be left, sets them
        to their nearest codewords, of which it has as many as product quantization will.
        """
        if self.p is None:
            return {}
        if self.precision not in PRODUCTS:
            bits = {INT8: 8, INT4: 4}[self.precision]
            return {"": ScalarNoiseConfig(bits=bits, p=self.p, per="tensor", update_every=UPDATE_EVERY)}
        if self.method == QUANT_NOISE:
            return {"": ProductNoiseConfig(BLOCK_SIZE, self.p, kind="zero")}
        options = dict(kind="centroid", update_every=CODEBOOK_UPDATE_EVERY)
        return {
            EMBEDDING: ProductNoiseConfig(BLOCK_SIZE, self.p, n_centroids=CENTROIDS["embedding"], **options),
            REST: ProductNoiseConfig(BLOCK_SIZE, self.p, n_centroids=CENTROIDS["*"], **options),
        }

    def export(self) -> IntWeightOnlyConfig | None:
        """What the layers are stored as; None for full precision and for those that go through `stages`."""
        if self.precision not in EXPORTS:
            return None
        return EXPORTS[self.precision](per="tensor", group_size=None)


def stages(model: nn.Module, precision: str, seed: int) -> IPQ:
    """The loop that product-quantizes a plain model of the demo; precision: of PRODUCTS."""
    return IPQ(model, STAGES, BLOCK_SIZE, CENTROIDS, seed=seed, int8=precision == PRODUCT_INT8)


@torch.no_grad()
def calibrate_on(model: LanguageModel, tokens: torch.Tensor, batch: int) -> None:
    """Record the ranges of activations in windows spread evenly over the training text, `batch` at a time."""
    context = model.shape.context
    count = min(CALIBRATION_WINDOWS, len(tokens) // context)
    starts = torch.linspace(0, len(tokens) - context, count, device=tokens.device).long()
    with calibrate(model, OBSERVER):
        for some in starts.split(batch):
            model(windows(tokens, some, context))


FULL = Variant(FULL_PRECISION, FP32)

# A training, and the variants that its weights are stored as.
Training = tuple[Variant, tuple[Variant, ...]]

# The most telling come first, for those who do not wait for all.
TRAININGS: tuple[Training, ...] = (
    (FULL, (FULL, *(Variant(AFTER_TRAINING, precision) for precision in (*EXPORTS, *PRODUCTS)))),
    *((variant, (variant,)) for variant in (Variant(QUANT_NOISE, INT4, 0.5), Variant(QAT, INT4, 1.0))),
    (
        Variant(QUANT_NOISE, PRODUCT, PROXY_RATE),
        tuple(Variant(QUANT_NOISE, precision, PROXY_RATE) for precision in PRODUCTS),
    ),
    (Variant(QAT, PRODUCT, 1.0), tuple(Variant(QAT, precision, 1.0) for precision in PRODUCTS)),
    *((variant, (variant,)) for variant in (Variant(QUANT_NOISE, INT8, 0.5), Variant(QAT, INT8, 1.0))),
)


def chosen(names: Sequence[str]) -> tuple[Training, ...]:
    """The trainings for the precisions named; that in full precision always, since the others start from it
    or are compared to it. Raises ValueError for an unknown name.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        received = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"methods: expected some of {', '.join(NAMES)}, got {received}")
    wanted = {precision for precision in PRECISIONS if precision.lower() in names} | {FP32}
    some = [(trained, tuple(v for v in variants if v.precision in wanted)) for trained, variants in TRAININGS]
    return tuple((trained, variants) for trained, variants in some if variants)
