"""The precision range test: the lowest precision that a model learns at (arXiv 2101.09868, section 3.3)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import nn

from .files import replacing
from .nn.noise import check_integer, check_number
from .nn.precision import TrainingPrecision
from .ops.checks import fail

# Okabe and Ito's colours, told apart by all kinds of colour vision.
CURVE, FOUND = "#0072b2", "#d55e00"


@dataclass
class RangeTest:
    """What a precision range test saw.

    min_bits: the lowest precision at which the accuracy moved by more than the threshold, None if none did.
    bits: the precisions tried, in turn; start: the mean accuracy of the first `window` steps; levels: that
    of the last `window` steps of each; accuracies: of every step.
    """

    min_bits: int | None
    bits: list[int]
    start: float
    levels: list[float]
    accuracies: list[list[float]] = field(repr=False)

    def plot(self, path: str | Path) -> None:
        """Write a picture: accuracy step by step, and where it first moved."""
        figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        first = 0
        for bits, values, level in zip(self.bits, self.accuracies, self.levels, strict=True):
            last = first + len(values)
            color = FOUND if bits == self.min_bits else CURVE
            axes.plot(range(first, last), values, color=color, linewidth=0.6, alpha=0.5)
            axes.plot((first, last), (level, level), color=color, linewidth=2)
            axes.annotate(f"{bits} bits", (first, level), (2, 4), textcoords="offset points", fontsize=8)
            first = last
        found = "none found" if self.min_bits is None else f"min_bits = {self.min_bits}"
        axes.set_title(f"precision range test: {found}", fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("training accuracy")
        axes.spines[["top", "right"]].set_visible(False)
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary)


def precision_range_test(
    model: nn.Module,
    train_step: Callable[[], float],
    bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    steps: int = 100,
    threshold: float = 0.01,
    window: int = 10,
    progress: bool = True,
) -> RangeTest:
    """Train for `steps` steps at each precision, from the lowest up, until the accuracy moves.

    model: with layers that train in low precision, by `quantize_` with a CyclicPrecisionConfig. train_step:
    does one step of training and returns its accuracy (or another number that grows as the model learns).
    The accuracy of a precision is the mean of its last `window` steps; the first one at which it exceeds that
    of the precision before (for the first, that of its own first `window` steps) by more than `threshold` is
    min_bits, and the test ends. The model's parameters, buffers and precision are then what they were;
    what train_step holds by itself, an optimizer, is not reset: use one for the test alone.
    Raises ValueError naming the argument, and FloatingPointError for an accuracy that is not finite.
    """
    layers = [module for module in model.modules() if isinstance(module, TrainingPrecision)]
    if not layers:
        fail("model", "layers that train in low precision (quantize_ with a CyclicPrecisionConfig)", "none")
    check_integer("steps", steps, 1)
    check_integer("window", window, 1, steps)
    check_number("threshold", threshold)
    if not bits or sorted(set(bits)) != list(bits):
        fail("bits", "increasing precisions", repr(bits))
    for one in bits:
        check_integer("bits", one, 2, 16)
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        return _climb(layers, train_step, bits, steps, threshold, window, progress)
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
                tensor.grad = None


def _climb(layers, train_step, bits, steps, threshold, window, progress) -> RangeTest:
    result = RangeTest(None, [], math.nan, [], [])
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("precision range test", total=len(bits) * steps)
        for one in bits:
            for layer in layers:
                layer.set_bits(one)
            values = []
            for step in range(steps):
                values.append(float(train_step()))
                if not math.isfinite(values[-1]):
                    raise FloatingPointError(
                        f"train_step: expected a finite accuracy, got {values[-1]} at {one} bits, step {step}"
                    )
                bar.update(task, advance=1, description=f"precision range test: {one} bits")
            if not result.bits:
                result.start = sum(values[:window]) / window
            previous = result.levels[-1] if result.levels else result.start
            result.bits.append(one)
            result.accuracies.append(values)
            result.levels.append(sum(values[-window:]) / window)
            if result.levels[-1] - previous > threshold:
                result.min_bits = one
                break
    return result
