"""Mixed precision: each layer of a model in codes of its own."""

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .layers import Layers, Steps, naming
from .nn.compressed import become_
from .nn.noisy import NOISY
from .ops.checks import fail
from .pq import PQConfig
from .ptq import IntWeightOnlyConfig

LayerConfig = IntWeightOnlyConfig | PQConfig


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """Each nn.Linear, nn.Embedding and nn.Conv2d named in `layers`, noisy or not, becomes what that says.

        qnk.MixedPrecisionConfig({"fc1": qnk.IntWeightOnlyConfig(bits=3), "head": qnk.PQConfig()})

    layers: by the names of model.named_modules(), all of which the model must have; the others stay as they
    are. Layers that share a weight must have the same config. Raises TypeError naming the layer.
    """

    layers: Mapping[str, LayerConfig]

    CONVERTS: ClassVar[tuple[type[nn.Module], ...]] = (*NOISY, *NOISY.values())

    def __post_init__(self) -> None:
        for name, config in self.layers.items():
            if not isinstance(config, LayerConfig):
                expected = "an integer weight config or PQConfig"
                raise TypeError(f"layers: expected {expected} for {name!r}, got {config!r}")

    def plan(self, layers: Layers) -> Steps:
        """One step per layer, made after every layer was checked and quantized; a step cannot fail."""
        if missing := self.layers.keys() - dict(layers).keys():
            fail("layers", "names of layers that the model has, and the filter lets through", sorted(missing))
        chosen = [(name, layer, self.layers[name]) for name, layer in layers if name in self.layers]
        for name, layer, config in chosen:
            with naming(name):
                config.check(layer)
        self._check_shared(layers)
        quantized: dict[LayerConfig, dict] = defaultdict(dict)  # the weights that are done
        steps = []
        for name, layer, config in chosen:
            with naming(name):
                converted = config.convert(layer, quantized[config])
            steps.append(functools.partial(become_, layer, converted))
        return steps

    def _check_shared(self, layers: Layers) -> None:
        first: dict[int, str] = {}
        for name, layer in layers:
            other = first.setdefault(id(layer._parameters.get("weight", layer)), name)
            if self.layers.get(name) != self.layers.get(other):
                with naming(name):
                    received = f"{self.layers.get(name)} and {self.layers.get(other)}"
                    fail("layers", f"the config of {other!r}, whose weight it shares", received)
