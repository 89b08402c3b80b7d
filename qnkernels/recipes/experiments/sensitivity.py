"""Which part of the model suffers most: attention, feed-forward or embedding, at 2 to 8 bits."""

from collections.abc import Callable
from pathlib import Path

from ...sensitivity import sensitivity
from ..transformer import GROUPS, LanguageModel
from . import pictures
from .study import Bench, Experiment, Rows
from .summary import Summary

BITS = (2, 3, 4, 8)


def of_seed(bench: Bench, seed: int) -> Rows:
    model = bench.full_precision(seed)
    evaluations = len(BITS) * (2 * len(GROUPS) + 1) + 1
    report, count = bench.starts("evaluating", evaluations), 0

    def evaluate(one: LanguageModel) -> float:
        nonlocal count
        count += 1
        perplexity = bench.perplexity(one)
        report(min(count, evaluations), perplexity)
        return perplexity

    found = sensitivity(model, evaluate, BITS, GROUPS, metric="perplexity", progress=False)
    rows: Rows = {"full precision": {"only": found.baseline}}
    for row in found.rows:
        rows[row_name(row.group, row.choice)] = {"only": row.only, "all_but": row.all_but}
    for choice, perplexity in found.all_quantized.items():
        rows[row_name("all", choice)] = {"only": perplexity}
    return rows


def row_name(group: str, choice: str) -> str:
    return f"{group}, {choice}"


def draw(summary: Summary, path: Path) -> None:
    lines = {}
    for group in (*GROUPS, "all"):
        found = [(bits, summary.rows.get(row_name(group, f"int{bits}"))) for bits in BITS]
        lines[group] = [(bits, values["only"]) for bits, values in found if values]
    label = "validation perplexity with only this group quantized"
    pictures.curves(summary, path, lines, "bits", label, logarithmic=True)


JOBS: dict[str, Callable[[Bench, int], Rows]] = {"sensitivity": of_seed}
EXPERIMENT = Experiment(
    name="sensitivity",
    title="Sensitivity to quantization after training",
    metrics={"only": "only it quantized", "all_but": "all but it quantized"},
    jobs=JOBS,
    notes="Perplexity of the model trained in full precision; one range per output channel.",
    picture=draw,
)
