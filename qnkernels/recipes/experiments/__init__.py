"""Experiments on the demo's model, each over several seeds: the tables of the papers in miniature."""

from . import cyclic, layer_drop, noise_rate, sensitivity, table1
from .study import Experiment, Settings, Study, run

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        table1.EXPERIMENT,
        cyclic.EXPERIMENT,
        sensitivity.EXPERIMENT,
        layer_drop.EXPERIMENT,
        noise_rate.EXPERIMENT,
    )
}

__all__ = ["EXPERIMENTS", "Experiment", "Settings", "Study", "run"]
