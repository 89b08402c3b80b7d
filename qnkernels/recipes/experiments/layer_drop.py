"""Quant-Noise together with LayerDrop: a model that is pruned to half of its layers and quantized."""

import copy
import functools

from torch import nn

from ...quantize import quantize_, remove_noise_
from ..laboratory import noised_
from ..methods import INT4, QUANT_NOISE, Variant
from ..transformer import LanguageModel
from . import pictures
from .study import Bench, Experiment, Rows

RATES = (0.0, 0.1, 0.2)
VARIANT = Variant(QUANT_NOISE, INT4, 0.5)


def pruned(model: LanguageModel) -> LanguageModel:
    """A copy with every second block."""
    half = copy.deepcopy(model)
    half.blocks = nn.ModuleList(list(half.blocks)[::2])
    return half


def at_rate(rate: float, bench: Bench, seed: int) -> Rows:
    model = noised_(bench.new_model(seed), VARIANT)
    model.layer_drop = rate
    trainer = bench.trainer(model, seed)
    trainer.run(bench.starts("", trainer.steps))
    remove_noise_(model).eval()
    rows = {}
    for name, one in (("all layers", model), ("half of them", pruned(model))):
        plain = bench.perplexity(one)
        quantized = bench.perplexity(quantize_(one, VARIANT.export()))
        rows[f"LayerDrop {rate:g}, {name}"] = {"perplexity": quantized, "plain": plain}
    return rows


EXPERIMENT = Experiment(
    name="layerdrop",
    title="Quant-Noise with LayerDrop",
    metrics={"perplexity": "perplexity, int4", "plain": "of the plain weights"},
    jobs={f"LayerDrop {rate:g}": functools.partial(at_rate, rate) for rate in RATES},
    notes=(
        "All trained with int4 Quant-Noise at p = 0.5; a block is left out of a training step at the rate "
        "given. Half of them: every second block is left out afterwards, without further training."
    ),
    picture=pictures.bars,
    preset="deep",
)
