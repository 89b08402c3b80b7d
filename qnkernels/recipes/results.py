"""What the demo found out, as numbers."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .files import write_text


@dataclass
class Row:
    """One compressed model, or the full-precision one (bits 32, method "full precision").

    perplexity: on the validation text, of the model as reloaded from `file`. bytes: of `file` on disk.
    training_ratio: seconds of a training step over those of full precision. tokens_per_second: greedy
    generation, one text at a time; generation_ratio: over full precision in the same minute.
    """

    method: str
    bits: int
    p: float | None
    perplexity: float
    bytes: int
    training_ratio: float
    training_seconds: float
    tokens_per_second: float
    generation_ratio: float
    file: str

    @property
    def precision(self) -> str:
        return "fp32" if self.bits == 32 else f"int{self.bits}"


@dataclass
class Results:
    """All rows so far, and what is needed to run it again. `note` says what is missing, if anything is."""

    settings: dict
    environment: dict
    text: dict
    rows: list[Row] = field(default_factory=list)
    note: str = ""

    def sorted_rows(self, methods: tuple[str, ...]) -> list[Row]:
        """Full precision first, then by falling precision, in the order of `methods`."""
        return sorted(self.rows, key=lambda row: (-row.bits, methods.index(row.method)))

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
