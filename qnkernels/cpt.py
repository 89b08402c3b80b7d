"""Cyclic precision training: a precision that goes up and down while a model trains (arXiv 2101.09868)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .functional import MAX_BITS, MIN_BITS
from .nn.noise import check_integer
from .nn.precision import FULL_PRECISION, TrainingPrecision, check_grad_bits
from .ops.checks import fail
from .precision import CyclicPrecisionConfig
from .quantize import quantize_

SHAPES = ("cosine", "triangular", "step")


def bit_operations(bits: int, grad_bits: int) -> float:
    """Cost of a multiply-add in training, in squared bits: a forward product of two values of `bits` and two
    backward products of one with a gradient, (n^2 + 2 n n_g) / 3 on average.
    """
    return (bits * bits + 2 * bits * grad_bits) / 3


@dataclass(frozen=True)
class BitOperations:
    """Bit operations of training, in those of one step at 1 bit: `total`, and what as many steps take in
    `full` precision (32 bits) or at the highest of the cycle (`static`).
    """

    total: float
    full: float
    static: float

    @property
    def relative_to_full(self) -> float:
        return self.total / self.full if self.full else 0.0

    @property
    def relative_to_static(self) -> float:
        return self.total / self.static if self.static else 0.0


class CyclicPrecision:
    """A schedule of precisions for the layers of a model, which are made to train in low precision.

    Within each of `cycles` cycles of T = total_steps // cycles steps the precision of weights and inputs
    climbs from min_bits to max_bits and starts anew: the one of step t is
    round(min_bits + (max_bits - min_bits) * (1 - cos(pi * (t % T) / T)) / 2) with shape "cosine".
    "triangular" climbs evenly for half of the cycle and comes down again; "step" spends the first half at
    min_bits and the second at max_bits. With min_bits = max_bits the precision is constant.
    Gradients keep grad_bits (max_bits by default; 32 leaves them as they are).

    Turns the layers that `filter_fn(module, name)` is true for, as `quantize_` with a CyclicPrecisionConfig
    of the other options does; call step() after each step of the optimizer. The model may be compiled,
    moved and wrapped before or after. `remove_noise_` ends it all.
    Raises ValueError naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        min_bits: int = 3,
        max_bits: int = 8,
        cycles: int = 32,
        total_steps: int | None = None,
        grad_bits: int | None = None,
        shape: str = "cosine",
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        input_range: str | None = "moving",
        per: str = "channel",
        momentum: float = 0.1,
    ) -> None:
        check_integer("min_bits", min_bits, MIN_BITS, MAX_BITS)
        check_integer("max_bits", max_bits, min_bits, MAX_BITS)
        check_integer("cycles", cycles, 1)
        check_integer("total_steps", total_steps, cycles)
        grad_bits = max_bits if grad_bits is None else grad_bits
        check_grad_bits(grad_bits)
        if shape not in SHAPES:
            fail("shape", f"one of {SHAPES}", repr(shape))
        self.min_bits, self.max_bits, self.grad_bits = min_bits, max_bits, grad_bits
        self.cycles, self.total_steps, self.shape = cycles, total_steps, shape
        self.steps_done = 0
        config = CyclicPrecisionConfig(self.bits, grad_bits, input_range, per, momentum)
        quantize_(model, config, filter_fn)
        self.model = model
        self.layers = {
            name: layer.noise
            for name, layer in model.named_modules()
            if isinstance(getattr(layer, "noise", None), TrainingPrecision)
            and (filter_fn is None or filter_fn(layer, name))
        }
        if not self.layers:
            fail("filter_fn", f"at least one layer of {type(model).__name__} to turn", "none")

    @property
    def period(self) -> int:
        """Steps of a cycle."""
        return self.total_steps // self.cycles

    @property
    def bits(self) -> int:
        """The precision of the coming step."""
        return self.bits_at(self.steps_done)

    def bits_at(self, step: int) -> int:
        """The precision of a step, counted from 0; steps after the last cycle begin another one."""
        position = step % self.period / self.period
        if self.shape == "cosine":
            height = 0.5 * (1.0 - math.cos(math.pi * position))
        elif self.shape == "triangular":
            height = 1.0 - abs(2.0 * position - 1.0)
        else:
            height = float(position >= 0.5)
        return round(self.min_bits + (self.max_bits - self.min_bits) * height)

    def step(self) -> None:
        """Count a training step that was done, and set the precision of the next one."""
        before = self.bits
        self.steps_done += 1
        if self.bits != before:
            self._apply()

    def _apply(self) -> None:
        for precision in self.layers.values():
            precision.set_bits(self.bits)

    @property
    def bitops(self) -> BitOperations:
        """Of the steps done so far."""
        return self.bitops_of(self.steps_done)

    def bitops_of(self, steps: int) -> BitOperations:
        """Of the first `steps` steps of the schedule."""
        whole, rest = divmod(steps, self.period)
        costs = [bit_operations(self.bits_at(step), self.grad_bits) for step in range(self.period)]
        return BitOperations(
            total=whole * sum(costs) + sum(costs[:rest]),
            full=steps * bit_operations(FULL_PRECISION, FULL_PRECISION),
            static=steps * bit_operations(self.max_bits, self.grad_bits),
        )

    def state_dict(self) -> dict:
        """Where the schedule stands, and which one it is."""
        return {"steps_done": self.steps_done, **self._identity()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from where a schedule of the same arguments stood; raises ValueError naming what differs."""
        for name, value in self._identity().items():
            if name not in state or state[name] != value:
                fail(f"state[{name!r}]", repr(value), repr(state.get(name)))
        check_integer("state['steps_done']", state.get("steps_done"), 0)
        self.steps_done = state["steps_done"]
        self._apply()

    def _identity(self) -> dict:
        names = ("min_bits", "max_bits", "grad_bits", "cycles", "total_steps", "shape")
        return {name: getattr(self, name) for name in names}
