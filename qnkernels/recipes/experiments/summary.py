"""Means and standard deviations over seeds, as a table to look at, CSV and Markdown."""

import csv
import io
import math
import statistics
from dataclasses import dataclass

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Value:
    """mean ± deviation (of the sample; 0 for a single seed) of `count` seeds."""

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return str(self.mean)
        digits = 2 if abs(self.mean) < 100 else 1
        mean = f"{self.mean:.{digits}f}"
        return mean if self.count == 1 or not self.deviation else f"{mean} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Summary:
    """rows: values by row and metric; metrics: label of each column, by name."""

    title: str
    metrics: dict[str, str]
    rows: dict[str, dict[str, Value]]
    notes: str

    @classmethod
    def of(cls, title: str, metrics: dict[str, str], by_seed: dict[str, dict], notes: str) -> "Summary":
        """by_seed: seed -> row -> metric -> value; rows in the order in which they first come."""
        names = list(dict.fromkeys(row for rows in by_seed.values() for row in rows))
        summary = {}
        for name in names:
            found = [rows[name] for rows in by_seed.values() if name in rows]
            summary[name] = {
                metric: _value([row[metric] for row in found if metric in row])
                for metric in metrics
                if any(metric in row for row in found)
            }
        return cls(title, metrics, summary, notes)

    @property
    def labels(self) -> list[str]:
        return list(self.metrics.values())

    def _cells(self, name: str) -> list[str]:
        return [str(self.rows[name].get(metric, "")) for metric in self.metrics]

    def table(self) -> Table:
        text = Table(title=self.title, caption=self.notes, box=box.SIMPLE_HEAD, title_justify="left")
        text.caption_justify = "left"
        text.add_column("", no_wrap=True)
        for label in self.labels:
            text.add_column(label, justify="right")
        for name in self.rows:
            text.add_row(name, *self._cells(name))
        return text

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| | " + " | ".join(self.labels) + " |"]
        lines += ["|---" * (len(self.labels) + 1) + "|"]
        lines += ["| " + " | ".join([name, *self._cells(name)]) + " |" for name in self.rows]
        return "\n".join([*lines, "", self.notes, ""])

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "metric", "mean", "deviation", "seeds"])
        for name, values in self.rows.items():
            for metric, value in values.items():
                writer.writerow([name, metric, value.mean, value.deviation, value.count])
        return text.getvalue()


def _value(values: list[float]) -> Value:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Value(statistics.fmean(values), deviation, len(values))
