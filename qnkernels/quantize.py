"""quantize_: one verb for every layer swap; the config says what a layer becomes."""

import warnings
from collections.abc import Callable

from torch import nn

from .mixed import MixedPrecisionConfig
from .nn.distributed import keep_codes_from_ddp_
from .nn.encoder import choose_encoder_path_
from .nn.noisy import NoisyLayer, remove_noise_from_
from .pq import PQConfig
from .precision import CyclicPrecisionConfig
from .product import ProductNoiseConfig
from .ptq import IntWeightOnlyConfig
from .scalar import ScalarNoiseConfig

# IntWeightOnlyConfig is the base of the other integer ones
Config = (
    ScalarNoiseConfig
    | ProductNoiseConfig
    | CyclicPrecisionConfig
    | IntWeightOnlyConfig
    | PQConfig
    | MixedPrecisionConfig
)


def quantize_(
    model: nn.Module, config: Config, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Turn the layers of `model` into what `config` says, in place; returns the model.

    Only nn.Linear, nn.Embedding, nn.Conv2d and their noisy forms
    are turned, not other subclasses of them, and only those for which `filter_fn(module, name)` is true.
    A noisy layer takes the new config. Parameters, ties, hooks and references to a layer stay.
    nn.MultiheadAttention computes with its weights itself and stays as it is. All layers are checked
    before any is changed. Raises ValueError or TypeError naming the layer; warns if there is none to turn.
    """
    if not isinstance(config, Config):
        raise TypeError(f"config: expected one of the config classes of qnkernels, got {config!r}")
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in config.CONVERTS and (filter_fn is None or filter_fn(module, name))
    ]
    if not layers:
        message = f"{type(config).__name__} found no layer to turn in {type(model).__name__}"
        warnings.warn(message, stacklevel=2)
    for step in config.plan(layers):
        step()
    choose_encoder_path_(model)
    keep_codes_from_ddp_(model)
    return model


def remove_noise_(model: nn.Module) -> nn.Module:
    """Turn every noisy layer of `model` back into its plain class, in place; returns the model."""
    for module in list(model.modules()):
        if isinstance(module, NoisyLayer):
            remove_noise_from_(module)
    choose_encoder_path_(model)
    return model
