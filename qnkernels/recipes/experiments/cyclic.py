"""Cyclic precision training against a static precision, from scratch and in fine-tuning."""

import functools
from dataclasses import dataclass

from ...cpt import BitOperations, CyclicPrecision, bit_operations
from ...nn.precision import FULL_PRECISION
from ...quantize import remove_noise_
from ..transformer import LanguageModel
from . import pictures
from .study import Bench, Experiment, Rows

CYCLES = 32
FINETUNING = 0.2  # steps of fine-tuning, as a part of those of training
FINETUNING_RATE = 1e-3
FINETUNING_CYCLES = 12


@dataclass(frozen=True)
class Plan:
    """A schedule of precisions; low = high for a static one."""

    low: int
    high: int
    shape: str = "cosine"

    def schedule(self, model: LanguageModel, steps: int, cycles: int) -> CyclicPrecision:
        static = self.low == self.high
        return CyclicPrecision(
            model, self.low, self.high, 1 if static else min(cycles, steps), steps, shape=self.shape
        )


def _row(bench: Bench, cpt: CyclicPrecision, steps: int) -> dict[str, float]:
    """Perplexity at the highest precision of the schedule, and of the plain weights; cost of training."""
    for layer in cpt.layers.values():
        layer.set_bits(cpt.max_bits)
    low_precision = bench.perplexity(cpt.model)
    plain = bench.perplexity(remove_noise_(cpt.model))
    return {"perplexity": low_precision, "plain": plain, **_cost(cpt.bitops_of(steps))}


def _cost(bitops: BitOperations) -> dict[str, float]:
    return {"bitops": 100 * bitops.relative_to_full, "saved": 100 * (1 - bitops.relative_to_static)}


def full_precision(bench: Bench, seed: int) -> Rows:
    perplexity = bench.perplexity(bench.full_precision(seed))
    return {"full precision": {"perplexity": perplexity, "plain": perplexity, "bitops": 100.0}}


def from_scratch(name: str, plan: Plan, bench: Bench, seed: int) -> Rows:
    model = bench.new_model(seed)
    cpt = plan.schedule(model, bench.steps, CYCLES)
    trainer = bench.trainer(model, seed, cpt.step)
    trainer.run(bench.starts("", trainer.steps))
    return {name: _row(bench, cpt, bench.steps)}


def fine_tuned(name: str, plan: Plan | None, frozen: bool, bench: Bench, seed: int) -> Rows:
    """The full-precision model trained on at a low rate; frozen: embedding, output and last norm only."""
    model = bench.full_precision(seed)
    steps = max(1, round(FINETUNING * bench.steps))
    model.blocks.requires_grad_(not frozen)
    cpt = None if plan is None else plan.schedule(model, steps, FINETUNING_CYCLES)
    trainer = bench.finetuner(model, seed, steps=steps, rate=FINETUNING_RATE)
    trainer.each_step = (lambda: None) if cpt is None else cpt.step
    trainer.run(bench.starts("", steps))
    if cpt is not None:
        return {name: _row(bench, cpt, steps)}
    perplexity = bench.perplexity(model)
    return {name: {"perplexity": perplexity, "plain": perplexity, "bitops": 100.0}}


TRAININGS = {
    "static 8": Plan(8, 8),
    "static 6": Plan(6, 6),
    "cyclic 3-8": Plan(3, 8),
    "cyclic 4-8": Plan(4, 8),
}
TUNINGS = {
    "fine-tuned, full precision": (None, False),
    "fine-tuned, static 8": (Plan(8, 8), False),
    "fine-tuned, 4↔8": (Plan(4, 8, "step"), False),
    "fine-tuned, 8↔16": (Plan(8, 16, "step"), False),
    "fine-tuned, 4↔8, blocks frozen": (Plan(4, 8, "step"), True),
}

EXPERIMENT = Experiment(
    name="cpt",
    title="Cyclic precision",
    metrics={
        "perplexity": "perplexity",
        "plain": "of the plain weights",
        "bitops": f"bit operations, % of {FULL_PRECISION}-bit",
        "saved": "saved, % of static",
    },
    jobs={
        "full precision": full_precision,
        **{name: functools.partial(from_scratch, name, plan) for name, plan in TRAININGS.items()},
        **{name: functools.partial(fine_tuned, name, *options) for name, options in TUNINGS.items()},
    },
    notes=(
        f"Cyclic: {CYCLES} cosine cycles; gradients have the highest precision of the row. Fine-tuning: "
        f"{FINETUNING:.0%} of the steps of training, at a rate of {FINETUNING_RATE:g}, {FINETUNING_CYCLES} "
        "cycles of two precisions. Perplexity is that of weights and inputs at the highest precision of the "
        "row, weights over a range per output channel. Bit operations are (n² + 2 n n_g) / 3 for a "
        f"multiply-add, {bit_operations(FULL_PRECISION, FULL_PRECISION):.0f} in full precision."
    ),
    picture=pictures.bars,
)
