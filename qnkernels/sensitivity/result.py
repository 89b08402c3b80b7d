"""What was measured, as a table, CSV, JSON and picture."""

import csv
import io
import json
import math
import os
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from ..files import write_text
from .choices import Choices, from_json, to_json
from .journal import none_or_number, number_or_none

FORMAT = "qnkernels sensitivity"


@dataclass(frozen=True)
class Group:
    """layers: names; parameters: weights, shared ones once; bytes: of them in full precision."""

    layers: list[str]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Row:
    """A group and what it was stored as. bytes: of its weights then. only: quality with this group quantized
    and nothing else; all_but: with all groups but this one. NaN where the quality was not finite.
    """

    group: str
    choice: str
    parameters: int
    bytes: int
    only: float
    all_but: float


@dataclass(frozen=True)
class Sensitivity:
    """The result of `sensitivity`.

    metric, lower_is_better: as there. baseline: quality in full precision. choices: configs by label, "int4"
    or "pq8x256". all_quantized: quality by choice. groups: by name. rows: each group with each choice.
    other_bytes: of what is in no group (biases, norms, layers left out), as `compressed_size` counts it.
    left_out: names of the layers in no group.
    """

    metric: str
    lower_is_better: bool
    baseline: float
    choices: Choices
    all_quantized: dict[str, float]
    groups: dict[str, Group]
    rows: list[Row]
    other_bytes: int
    left_out: list[str]

    def loss(self, quality: float) -> float:
        """How much worse than in full precision; below 0 where it is better."""
        return quality - self.baseline if self.lower_is_better else self.baseline - quality

    @property
    def title(self) -> str:
        better = "lower" if self.lower_is_better else "higher"
        return f"{self.metric} ({better} is better), {show(self.baseline)} in full precision"

    def table(self) -> Table:
        """One row for each group and choice, and one for all groups; a section for each group."""
        text = Table(title=self.title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        text.add_column("group", overflow="fold")
        for name in ("parameters", "stored as", "MB", "only it", "all but it"):
            text.add_column(name, justify="left" if name == "stored as" else "right", no_wrap=True)
        previous = None
        for row in self.rows:
            first = row.group != previous
            if first and previous is not None:
                text.add_section()
            name, count = (row.group, f"{row.parameters:,}") if first else ("", "")
            size = f"{row.bytes / 1e6:.3f}"
            text.add_row(name, count, row.choice, size, show(row.only), show(row.all_but))
            previous = row.group
        text.add_section()
        parameters = sum(group.parameters for group in self.groups.values())
        for choice, quality in self.all_quantized.items():
            first = choice == next(iter(self.choices))
            size = sum(row.bytes for row in self.rows if row.choice == choice)
            name, count = ("all groups", f"{parameters:,}") if first else ("", "")
            text.add_row(name, count, choice, f"{size / 1e6:.3f}", show(quality), "")
        if self.left_out:
            text.caption = f"in no group, and in full precision: {', '.join(self.left_out)}"
            text.caption_justify = "left"
        return text

    def to_csv(self, path: str | os.PathLike) -> None:
        """One line for each group and choice; baseline and all_quantized stand in each."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*Row.__dataclass_fields__, "all_quantized", "baseline", "metric"])
        for row in self.rows:
            writer.writerow([*astuple(row), self.all_quantized[row.choice], self.baseline, self.metric])
        write_text(Path(path), text.getvalue())

    def to_json(self) -> dict:
        """Quality that is not finite is None."""
        rows = [
            asdict(row) | {"only": number_or_none(row.only), "all_but": number_or_none(row.all_but)}
            for row in self.rows
        ]
        return {
            "format": FORMAT,
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "baseline": self.baseline,
            "choices": {choice: to_json(config) for choice, config in self.choices.items()},
            "all_quantized": {choice: number_or_none(each) for choice, each in self.all_quantized.items()},
            "groups": {name: asdict(group) for name, group in self.groups.items()},
            "rows": rows,
            "other_bytes": self.other_bytes,
            "left_out": self.left_out,
        }

    def save(self, path: str | os.PathLike) -> None:
        """The JSON, for `load`; the file appears whole or not at all."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Sensitivity":
        """From a file of `save`, or of what `qnkernels sensitivity --json` printed; raises ValueError for
        another one.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            if value.pop("format") != FORMAT:
                raise ValueError("format")
            value.pop("allocation", None)  # the command adds one with --budget
            quality = {name: none_or_number(each) for name, each in value.pop("all_quantized").items()}
            rows = [
                Row(**row | {key: none_or_number(row[key]) for key in ("only", "all_but")})
                for row in value.pop("rows")
            ]
            choices = {name: from_json(each) for name, each in value.pop("choices").items()}
            groups = {name: Group(**each) for name, each in value.pop("groups").items()}
            result = cls(**value, all_quantized=quality, rows=rows, choices=choices, groups=groups)
            _check(result)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: expected a saved Sensitivity, got another file ({error!r})") from error
        return result

    def plot(self, path: str | os.PathLike) -> None:
        """A PNG (or what the suffix says) of two heat maps, groups against choices."""
        from .picture import (
            draw,  # not on top: importing matplotlib takes longer than the rest of the package
        )

        choices = list(self.choices)
        qualities = [
            [[getattr(row, kind) for row in self.rows if row.group == group] for group in self.groups]
            for kind in ("only", "all_but")
        ]
        losses = [[[self.loss(each) for each in line] for line in panel] for panel in qualities]
        texts = [[[show(each) for each in line] for line in panel] for panel in qualities]
        draw(Path(path), self.title, list(self.groups), choices, losses, texts)


def show(quality: float) -> str:
    """Five digits; qualities of a model differ late."""
    return f"{quality:.5g}" if math.isfinite(quality) else "not finite"


def _check(result: Sensitivity) -> None:
    """Every group with every choice, in order; raises ValueError."""
    expected = [(group, choice) for group in result.groups for choice in result.choices]
    if [(row.group, row.choice) for row in result.rows] != expected:
        raise ValueError("rows")
    if result.all_quantized.keys() != result.choices.keys() or not math.isfinite(result.baseline):
        raise ValueError("all_quantized or baseline")
