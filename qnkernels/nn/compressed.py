"""What the layers over packed and product-quantized weights share, and how a plain layer becomes one."""

import torch
from torch import nn

from .fixed import FixedBuffers
from .input_range import record_
from .noisy import NoisyLayer, remove_noise_from_


class CompressedLayer(FixedBuffers):
    """A layer that stands for a plain one whose weight is stored in few bits.

    `.weight` decodes the weight; it cannot be assigned. Casting the model never changes codes.
    """

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight, a new tensor in each call."""
        raise NotImplementedError


def become_(layer: nn.Module, compressed: CompressedLayer) -> None:
    """Turn `layer` into `compressed` in place, so that references to it, its hooks, its training flag
    and whatever else was attached to it stay. A range that calibration recorded has served.
    """
    if isinstance(layer, NoisyLayer):
        remove_noise_from_(layer)
    del layer._parameters["weight"]
    record_(layer, None)
    state = layer.__dict__
    for kind in ("_parameters", "_buffers", "_modules"):
        state[kind] = {**state[kind], **compressed.__dict__[kind]}
    for name, value in compressed.__dict__.items():
        if not name.startswith("_") and name != "training":
            state[name] = value
    layer.__class__ = type(compressed)
