"""Precisions by ways to train, perplexity and size on disk: the first table of Quant-Noise."""

import functools
from pathlib import Path

from .. import demo
from ..methods import FP32, INT4, INT8, PRODUCT, PRODUCT_INT8
from ..results import Row
from . import pictures
from .study import Bench, Experiment, Rows

METHODS = tuple(name.lower() for name in (FP32, INT8, INT4, PRODUCT, PRODUCT_INT8))


class _Listener:
    """Passes on what the demo of one seed tells."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.watcher = bench, bench.watcher

    def said(self, message: str) -> None:
        pass

    def started(self, label: str, number: int, trainings: int, steps: int) -> None:
        self.bench.starts(f"{label}, {number} of {trainings}", steps)

    def stepped(self, step: int, loss: float) -> None:
        self.watcher.stepped(step, loss)

    def found(self, row: Row) -> None:
        pass


def of_seed(bench: Bench, seed: int) -> Rows:
    """The demo with this seed, in a folder of its own."""
    chosen = bench.settings
    folder: Path = chosen.out / f"seed{seed}"
    settings = demo.Settings(
        folder, bench.preset_name, chosen.steps, seed, chosen.device, chosen.data, METHODS
    )
    results = demo.run(settings, _Listener(bench))
    if results.note:
        raise KeyboardInterrupt
    rows: Rows = {}
    for row in results.sorted_rows():
        name = row.method if row.precision == FP32 else f"{row.precision}, {row.method}"
        rows[name] = {"perplexity": row.perplexity, "megabytes": row.bytes / 1e6}
        if row.finetuning:
            rows[name]["untuned"] = row.finetuning.perplexity_without
    return rows


EXPERIMENT = Experiment(
    name="table1",
    title="Precision by way of training",
    metrics={"perplexity": "perplexity", "untuned": "without finetuning", "megabytes": "MB on disk"},
    jobs={"demo": of_seed},
    notes=(
        "As qnkernels demo: int8 and int4 over one range per matrix; QAT quantizes all weights in training, "
        "Quant-Noise half of them, and for iPQ sets a tenth of the blocks to zero."
    ),
    picture=functools.partial(pictures.scatter, x="megabytes", y="perplexity"),
)
