"""Weight, input and gradient of a layer at a precision that changes while it trains.

Its state lives in non-persistent buffers, so such a layer has the state_dict of the plain one.
"""

import torch
from torch import nn

from .. import functional
from ..ops.checks import fail
from .noise import ActivationNoise, check_integer, draw_seed, in_recomputation

GRANULARITIES = ("tensor", "channel")
INPUT_RANGES = ("moving", "sample")
FULL_PRECISION = 32  # as grad_bits: gradients are not quantized


def check_precision_options(
    bits: int, grad_bits: int, input_range: str | None, per: str, momentum: float
) -> None:
    """What `TrainingPrecision` accepts, apart from the weight; raises ValueError naming the argument."""
    check_integer("bits", bits, functional.MIN_BITS, functional.MAX_BITS)
    check_grad_bits(grad_bits)
    if input_range is not None and input_range not in INPUT_RANGES:
        fail("input_range", f"None or one of {INPUT_RANGES}", repr(input_range))
    if per not in GRANULARITIES:
        fail("per", f"one of {GRANULARITIES}", repr(per))
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0.0 < momentum <= 1.0:
        fail("momentum", "a rate in (0, 1]", repr(momentum))


def check_grad_bits(grad_bits: int) -> None:
    if grad_bits != FULL_PRECISION:
        check_integer("grad_bits", grad_bits, functional.MIN_BITS, functional.MAX_BITS)


class MovingInput(ActivationNoise):
    """Fake quantization of a layer's input over a moving average of its range, in one op while training."""

    def __init__(self, bits: int, momentum: float, device: torch.device) -> None:
        super().__init__(bits, 1.0, "ema_minmax", 1, momentum, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape -> the same shape and dtype."""
        if x.numel() == 0:
            return x
        if self.training:
            state = self.low, self.high, self.step
            return functional.moving_fake_quantize(x, *state, self.bits, self.momentum, moves=self._moves())
        low, high = self.stored_range(x.detach())
        bits = self.bits.clone()
        return functional.fake_quantize(x, *functional.quantization_parameters(low, high, bits), bits)

    def linear(self, x, weight, bias, per_channel, grad_bits, seed) -> torch.Tensor:
        """`forward`, and the layer over it: arguments of functional.moving_low_precision_linear."""
        own = self._buffers  # Module.__getattr__ takes as long as a small op
        state = own["low"], own["high"], own["step"], own["bits"], self.momentum, self._moves()
        rest = per_channel, grad_bits, seed
        return functional.moving_low_precision_linear(x, weight, bias, *state, *rest)

    def _moves(self) -> bool:
        return self.training and not in_recomputation()


class TrainingPrecision(nn.Module):
    """Low-precision training of a layer with a weight [out, ...] (arXiv 2101.09868, section 3).

    In each forward the whole weight is fake-quantized, to the range it has, and the input too; in each
    backward the gradient of the output is, over the range of each sample (index of its first dimension) and
    with stochastic rounding, before anything is computed from it. Eval quantizes weight and input as well.

    bits: of weight and input, 2 to 16; `set_bits` changes it at any time, without recompilation. grad_bits:
    constant, 2 to 16, or 32 for gradients as they are. input_range: "moving", an average moved by `momentum`
    in each training forward, "sample", that of each sample, or None for an input that is not quantized. per:
    a range of the weight for each output "channel" (embedding row), or one for the whole "tensor".
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bits: int = 8,
        grad_bits: int = 8,
        input_range: str | None = "moving",
        per: str = "channel",
        momentum: float = 0.1,
    ) -> None:
        check_precision_options(bits, grad_bits, input_range, per, momentum)
        super().__init__()
        self.grad_bits, self.input_range, self.per = grad_bits, input_range, per
        counter = dict(dtype=torch.int64, device=weight.device)
        self.register_buffer("bits", torch.full((), bits, **counter), persistent=False)
        width = None if grad_bits == FULL_PRECISION else torch.full((), grad_bits, **counter)
        self.register_buffer("gradient_bits", width, persistent=False)
        self.moving = MovingInput(bits, momentum, weight.device) if input_range == "moving" else None

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """The precision of weight and input from the next forward on."""
        self.bits.fill_(bits)
        if self.moving is not None:
            self.moving.bits.fill_(bits)

    def forward(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """weight [out, ...] -> its quantized copy, in `dtype` (that of weight by default)."""
        return functional.dynamic_fake_quantize(weight, self.bits, self.per == "channel", dtype=dtype)

    def input(self, x: torch.Tensor) -> torch.Tensor:
        """The input as the layer sees it: same shape and dtype."""
        if self.input_range is None:
            return x
        if self.moving is not None:
            return self.moving(x)
        return functional.dynamic_fake_quantize(x, self.bits, per_sample=True)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """F.linear(input(x), forward(weight), bias) in the dtype of x; its gradient is quantized."""
        grad_bits, seed = self._buffers["gradient_bits"] if self._draws() else None, 0
        if grad_bits is not None:
            seed = draw_seed(x.device)
        moving, per_channel = self.moving, self.per == "channel"
        if moving is not None and x.numel():
            return moving.linear(x, weight, bias, per_channel, grad_bits, seed)
        quantized_x = x.detach()
        if self.input_range == "sample":
            quantized_x = functional.dynamic_fake_quantize(quantized_x, self.bits, per_sample=True)
        operands = quantized_x, self(weight.detach(), x.dtype), None
        return functional.low_precision_linear(x, weight, bias, *operands, grad_bits, seed)

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """The output of the layer, whose gradient is quantized."""
        if not self._draws():
            return y
        return functional.quantize_gradient(y, self.gradient_bits, draw_seed(y.device))

    def _draws(self) -> bool:
        """Whether there may be a gradient to round. In training always, also where none is recorded:
        activation checkpointing repeats such a forward with one, and must draw as many seeds.
        """
        return self._buffers["gradient_bits"] is not None and (self.training or torch.is_grad_enabled())

    def extra_repr(self) -> str:
        return (
            f"bits={self.bits.tolist()}, grad_bits={self.grad_bits}, input_range={self.input_range!r}, "
            f"per={self.per!r}"
        )
