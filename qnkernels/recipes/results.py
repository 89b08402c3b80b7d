"""What the demo found out, as numbers."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .files import write_text
from .methods import METHODS, PRECISIONS


@dataclass
class Finetuning:
    """What followed each stage of iterative product quantization.

    stages: the pattern of each, the size in bytes of the model after it, and the relative error of its
    layers. steps: after each stage. seconds, ratio: of a step, and over a training step in full precision.
    perplexity_without: of all stages with nothing in between.
    """

    stages: list[dict]
    steps: int
    seconds: float
    ratio: float
    perplexity_without: float


@dataclass
class Row:
    """One compressed model, or the full-precision one (precision "fp32", method "full precision").

    p: rate of the noise in training. perplexity: on the validation text, of the model as reloaded from
    `file`. bytes: of `file` on disk. training_ratio: seconds of a training step over those of full precision.
    tokens_per_second: greedy generation, one text at a time; generation_ratio: over full precision in the
    same minute.
    """

    method: str
    precision: str
    p: float | None
    perplexity: float
    bytes: int
    training_ratio: float
    training_seconds: float
    tokens_per_second: float
    generation_ratio: float
    file: str
    finetuning: Finetuning | None = None


@dataclass
class Results:
    """All rows so far, and what is needed to run it again. `note` says what is missing, if anything is."""

    settings: dict
    environment: dict
    text: dict
    rows: list[Row] = field(default_factory=list)
    note: str = ""

    def sorted_rows(self) -> list[Row]:
        """Full precision first, then by falling precision, in the order of METHODS."""
        order = lambda row: (PRECISIONS.index(row.precision), METHODS.index(row.method))  # noqa: E731
        return sorted(self.rows, key=order)

    @property
    def title(self) -> str:
        shape = self.settings["shape"]
        return (
            f"{shape['layers']} layers of width {shape['width']}, {self.settings['steps']} steps, "
            f"seed {self.settings['seed']}: {self.text['source']}"
        )

    def to_json(self) -> dict:
        return asdict(self)

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(self.to_json(), indent=2) + "\n")
