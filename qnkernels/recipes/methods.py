"""The trainings that the demo compares, and the compressed models that each gives.

All from the same initial weights on the same data in the same order, and all exported by the same
quantizer: one range per weight matrix, from its smallest to its largest value (Quant-Noise, arXiv
2004.07320, section 4.2).
"""

from dataclasses import dataclass

from ..ptq import Int4WeightOnlyConfig, Int8WeightOnlyConfig
from ..scalar import ScalarNoiseConfig

FULL_PRECISION, AFTER_TRAINING, QAT, QUANT_NOISE = METHODS = (
    "full precision",
    "after training",
    "QAT",
    "Quant-Noise",
)
UPDATE_EVERY = 10  # training forwards between two looks at a weight's range


@dataclass(frozen=True)
class Variant:
    """A row of the table: how a model was trained and stored. p: rate of the noise in training."""

    method: str
    bits: int
    p: float | None = None

    @property
    def label(self) -> str:
        return self.method if self.bits == 32 else f"int{self.bits} {self.method}"

    @property
    def file_name(self) -> str:
        return self.label.lower().replace(" ", "-") + ".safetensors"

    def noise(self) -> ScalarNoiseConfig | None:
        """What the layers are trained with; None for plain training."""
        if self.p is None:
            return None
        return ScalarNoiseConfig(bits=self.bits, p=self.p, per="tensor", update_every=UPDATE_EVERY)

    def export(self) -> Int8WeightOnlyConfig | None:
        """What the layers are stored as; None for full precision."""
        if self.bits == 32:
            return None
        config = {8: Int8WeightOnlyConfig, 4: Int4WeightOnlyConfig}[self.bits]
        return config(per="tensor", group_size=None)


FULL = Variant(FULL_PRECISION, 32)

# Each training with the variants that its weights are stored as. The most telling come first, for those
# who do not wait for all.
TRAININGS: tuple[tuple[Variant, tuple[Variant, ...]], ...] = (
    (FULL, (FULL, Variant(AFTER_TRAINING, 8), Variant(AFTER_TRAINING, 4))),
    *(
        (variant, (variant,))
        for bits in (4, 8)
        for variant in (Variant(QUANT_NOISE, bits, 0.5), Variant(QAT, bits, 1.0))
    ),
)
