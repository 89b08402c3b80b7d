"""The rate of the noise from none to all, for int4 and product quantization (Quant-Noise, figure 3)."""

import functools
from pathlib import Path

from ...quantize import quantize_, remove_noise_
from ..laboratory import noised_
from ..methods import INT4, PRODUCT, QUANT_NOISE, STAGES, Variant
from ..transformer import LanguageModel
from . import pictures
from .study import Bench, Experiment, Rows
from .summary import Summary

RATES = {INT4: (0.0, 0.1, 0.25, 0.5, 0.75, 1.0), PRODUCT: (0.0, 0.05, 0.1, 0.2, 0.4)}


def row_name(precision: str, rate: float) -> str:
    return f"{precision}, p = {rate:g}"


def _trained(bench: Bench, seed: int, variant: Variant) -> LanguageModel:
    """With the variant's noise, which is then removed, in eval mode; at rate 0 the plain training."""
    if variant.p == 0.0:
        return bench.full_precision(seed)
    trainer = bench.trainer(noised_(bench.new_model(seed), variant), seed)
    trainer.run(bench.starts("", trainer.steps))
    return remove_noise_(trainer.model).eval()


def at_rate(precision: str, rate: float, bench: Bench, seed: int) -> Rows:
    variant = Variant(QUANT_NOISE, precision, rate)
    model = _trained(bench, seed, variant)
    plain = bench.perplexity(model)
    if precision == PRODUCT:
        report = bench.starts("finetuning", bench.finetuning_steps * len(STAGES))
        bench.product_quantize(model, precision, seed, report)
    else:
        quantize_(model, variant.export())
    return {row_name(precision, rate): {"perplexity": bench.perplexity(model), "plain": plain}}


def draw(summary: Summary, path: Path) -> None:
    lines = {}
    for precision, rates in RATES.items():
        found = [(rate, summary.rows.get(row_name(precision, rate))) for rate in rates]
        lines[precision] = [(rate, values["perplexity"]) for rate, values in found if values]
    label = "validation perplexity, quantized (lower is better)"
    pictures.curves(summary, path, lines, "rate of the noise in training", label)


EXPERIMENT = Experiment(
    name="noise",
    title="Rate of the noise",
    metrics={"perplexity": "perplexity, quantized", "plain": "of the plain weights"},
    jobs={
        row_name(precision, rate): functools.partial(at_rate, precision, rate)
        for precision, rates in RATES.items()
        for rate in rates
    },
    notes=(
        "int4: one range per weight matrix; p = 1 is quantization-aware training. iPQ: the noise sets blocks "
        "to zero; the models are then quantized in stages and finetuned after each, all alike."
    ),
    picture=draw,
)
