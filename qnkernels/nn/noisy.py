"""nn.Linear, nn.Embedding and nn.Conv2d whose forward sees a noised copy of the weight.

A noisy layer is the plain layer under another class, with its noise as a child module: parameters,
state_dict keys, hooks and everything else stay those of the plain layer. The weight is never written.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional
from ..ops.checks import fail
from .noise import ActivationNoise, BlockNoise, ScalarNoise
from .precision import TrainingPrecision


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast runs matrix products in, or None outside autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def to_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that autocast runs matrix products in; x itself outside autocast."""
    device_type = "cpu" if x.is_cpu else x.device.type  # a string that torch makes anew in each call
    if torch.is_autocast_enabled(device_type):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


Noise = ScalarNoise | BlockNoise | TrainingPrecision


class NoisyLayer(nn.Module):
    """What the noisy layers share: noise on the weight and, where wanted, activation_noise on the output.

    The noise may also be a TrainingPrecision, which quantizes the input and the gradient, too.

    A layer built anew, with the arguments of the plain one, has the scalar noise of ScalarNoise's defaults.
    """

    PLAIN: ClassVar[type[nn.Module]]
    noise: Noise
    activation_noise: ActivationNoise | None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        add_noise_(self, *make_noise(self))

    def _output(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.activation_noise is None else self.activation_noise(y)

    @classmethod
    def _from_plain(
        cls, layer: nn.Module, noise: str, activations: bool, p_activations: float, options: dict
    ):
        if type(layer) not in (cls.PLAIN, cls):
            raise TypeError(f"layer: expected {cls.PLAIN.__name__} itself, got {type(layer).__name__}")
        twin = twin_of(layer)
        add_noise_(twin, *make_noise(layer, noise, activations, p_activations, **options))
        return twin


class NoisyLinear(NoisyLayer, nn.Linear):
    """nn.Linear with noise on its weight."""

    PLAIN = nn.Linear

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        noise: str = "scalar",
        activations: bool = False,
        p_activations: float = 0.0,
        **options,
    ) -> "NoisyLinear":
        """A new layer that shares the parameters of `linear`, which is left as it is.

        noise: "scalar", "block" or "precision"; options: those of ScalarNoise (bits, p, ...), BlockNoise
        (block_size, p, ...) or TrainingPrecision (bits, grad_bits, ...). Raises ValueError naming the option.
        """
        return cls._from_plain(linear, noise, activations, p_activations, options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in] -> [..., out]."""
        noise = self.noise
        if isinstance(noise, TrainingPrecision):
            x, bias = to_autocast(input), self.bias
            return noise.linear(x, self.weight, None if bias is None else bias.to(x.dtype))
        dtype = autocast_dtype(self.weight.device.type)
        if isinstance(noise, ScalarNoise) and dtype is None and input.dtype == self.weight.dtype:
            quantizer = noise.quantizer(self.weight)
            if quantizer is None:
                return self._output(super().forward(input))
            return self._output(functional.noisy_linear(input, self.weight, self.bias, **quantizer))
        return self._output(F.linear(input, noise(self.weight, dtype), self.bias))


class NoisyEmbedding(NoisyLayer, nn.Embedding):
    """nn.Embedding with noise on its table. A row of zeros (padding) stays zero."""

    PLAIN = nn.Embedding

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        noise: str = "scalar",
        activations: bool = False,
        p_activations: float = 0.0,
        **options,
    ) -> "NoisyEmbedding":
        """A new layer that shares the parameters of `embedding`; arguments as NoisyLinear.from_linear."""
        return cls._from_plain(embedding, noise, activations, p_activations, options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [...] of row numbers -> [..., embedding_dim]."""
        y = F.embedding(input, self.noise(self.weight), self.padding_idx, None, 2.0, self.scale_grad_by_freq)
        if (
            self.padding_idx is not None
            and isinstance(self.noise, BlockNoise)
            and self.noise.kind == "centroid"
        ):
            # no codeword need be zero
            padding = self.weight[self.padding_idx].detach()
            y = torch.where((input == self.padding_idx)[..., None], padding, y)
        if isinstance(self.noise, TrainingPrecision):
            return self.noise.output(y)
        return self._output(y)


class NoisyConv2d(NoisyLayer, nn.Conv2d):
    """nn.Conv2d with noise on its weight, seen as [out, in / groups * kh * kw]."""

    PLAIN = nn.Conv2d

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        noise: str = "scalar",
        activations: bool = False,
        p_activations: float = 0.0,
        **options,
    ) -> "NoisyConv2d":
        """A new layer that shares the parameters of `conv`; arguments as NoisyLinear.from_linear."""
        return cls._from_plain(conv, noise, activations, p_activations, options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [batch, in, h, w] or [in, h, w] -> the shape of nn.Conv2d."""
        weight = self.noise(self.weight, autocast_dtype(self.weight.device.type))
        if isinstance(self.noise, TrainingPrecision):
            x = self.noise.input(to_autocast(input))
            return self.noise.output(self._conv_forward(x, weight, self.bias))
        return self._output(self._conv_forward(input, weight, self.bias))


NOISES = ("scalar", "block", "precision")
NOISY: dict[type[nn.Module], type[NoisyLayer]] = {
    cls.PLAIN: cls for cls in (NoisyLinear, NoisyEmbedding, NoisyConv2d)
}


def check_weight(weight: torch.Tensor) -> None:
    """A weight that can be quantized: fp32, bf16 or fp16, not empty, finite (unknown on the meta device)."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {weight.dtype}")
    if weight.numel() == 0:
        fail("weight", "at least one element", f"shape {tuple(weight.shape)}")
    if weight.device.type != "meta" and not bool(weight.detach().isfinite().all()):
        count = int((~weight.detach().isfinite()).sum())
        fail("weight", "finite values", f"{count} of {weight.numel()} NaN or infinite")


def make_noise(
    layer: nn.Module, noise: str = "scalar", activations: bool = False, p_activations: float = 0.0, **options
) -> tuple[Noise, ActivationNoise | None]:
    """The noise modules for a layer, after every check; the layer is left as it is."""
    if noise not in NOISES:
        fail("noise", f"one of {NOISES}", repr(noise))
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            fail("max_norm", "None, since it rewrites the table in each forward", layer.max_norm)
        if layer.sparse:
            fail("sparse", "False, since the noise gives each row a gradient", True)
    check_weight(layer.weight)
    if noise != "scalar":
        if activations:
            fail("activations", f"False with {noise} noise", True)
        made = BlockNoise if noise == "block" else TrainingPrecision
        return made(layer.weight, **options), None
    weight_noise = ScalarNoise(layer.weight, **options)
    if not activations:
        return weight_noise, None
    shared = {key: options[key] for key in ("bits", "observer", "update_every", "momentum") if key in options}
    return weight_noise, ActivationNoise(p=p_activations, device=layer.weight.device, **shared)


def twin_of(layer: nn.Module) -> nn.Module:
    """A layer of the same class, attributes, parameters and buffers (shared), without its hooks."""
    twin = type(layer).__new__(type(layer))
    nn.Module.__init__(twin)
    for name, value in layer.__dict__.items():
        if name not in twin.__dict__:
            twin.__dict__[name] = value
    for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        twin.__dict__[kind].update(layer.__dict__[kind])
    twin.training = layer.training
    return twin


def add_noise_(layer: nn.Module, noise: Noise, activation_noise: ActivationNoise | None = None) -> None:
    """Turn a plain layer into its noisy class, in place; the noise of a noisy layer is replaced."""
    if not isinstance(layer, NoisyLayer):
        layer.__class__ = NOISY[type(layer)]
    layer.noise = noise.train(layer.training)
    layer.register_module("activation_noise", activation_noise and activation_noise.train(layer.training))


def remove_noise_from_(layer: NoisyLayer) -> None:
    """Turn a noisy layer back into its plain class, in place."""
    layer.__class__ = layer.PLAIN
    del layer._modules["noise"], layer._modules["activation_noise"]
