"""allocate_bits: what each group of layers is stored as, for a size of the whole model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from . import knapsack
from .mixed import MixedPrecisionConfig
from .ops.checks import fail
from .sensitivity import Sensitivity
from .sensitivity.choices import to_json
from .sensitivity.result import show

FULL = "full"
FULL_BITS = (16, 32)
LOSSES = ("only", "all_but")


@dataclass(frozen=True)
class BitAllocation(MixedPrecisionConfig):
    """The result of `allocate_bits`, a config for `quantize_`.

    layers: as MixedPrecisionConfig. groups: what each is stored as, a label of the measurement or "full".
    parameters: of each group. sizes: bytes of each group. bytes: of the whole model, as `compressed_size`
    will count them; budget_bytes: what was asked for. predicted: the quality if the losses of the groups add
    up, which is an estimate.
    """

    groups: dict[str, str]
    parameters: dict[str, int]
    sizes: dict[str, int]
    bytes: int
    budget_bytes: int
    predicted: float

    @property
    def bits(self) -> dict[str, float]:
        """Of a weight, on average over each group, scales and codebooks included."""
        return {group: 8 * self.sizes[group] / self.parameters[group] for group in self.groups}

    def table(self) -> Table:
        title = f"{self.bytes:,} bytes of {self.budget_bytes:,}, predicted quality {show(self.predicted)}"
        text = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        text.add_column("group", overflow="fold")
        text.add_column("stored as", no_wrap=True)
        text.add_column("MB", justify="right", no_wrap=True)
        text.add_column("bits per weight", justify="right", no_wrap=True)
        for group, choice in self.groups.items():
            text.add_row(group, choice, f"{self.sizes[group] / 1e6:.3f}", f"{self.bits[group]:.2f}")
        return text

    def to_json(self) -> dict:
        return {
            "budget_bytes": self.budget_bytes,
            "bytes": self.bytes,
            "predicted": self.predicted,
            "groups": self.groups,
            "sizes": self.sizes,
            "bits": self.bits,
            "layers": {name: to_json(config) for name, config in self.layers.items()},
        }


def allocate_bits(
    sensitivity: Sensitivity,
    budget_bytes: int,
    choices: Sequence[int | str] | None = None,
    loss: str = "only",
) -> BitAllocation:
    """For each measured group the choice that costs least quality in all, within a size of the whole model.

        qnk.quantize_(model, qnk.allocate_bits(s, budget_bytes=2_000_000))

    budget_bytes: of all that `save_compressed` writes, as `compressed_size` counts it: codes, scales, zero
    points and codebooks, and all else in full; the file adds its header. choices: 2 to 8 bits, 16 or 32 (both
    for unquantized, in the dtype that the weights have), and labels such as "pq8x256"; None for all that were
    measured, and unquantized. loss: of a choice, how much worse the quality is with "only" that group
    quantized, or how much "all_but" it is better than all quantized. Losses are taken to add up; among all
    selections within the budget none has a smaller sum (a knapsack, solved exactly). Where quality was not
    finite a choice is none. Raises ValueError, which names the smallest possible size where the budget is
    below it.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
        raise TypeError(f"budget_bytes: expected an integer, got {budget_bytes!r}")
    if loss not in LOSSES:
        fail("loss", f"one of {LOSSES}", repr(loss))
    labels = _labels(sensitivity, choices)
    options = {group: _options(sensitivity, group, labels, loss) for group in sensitivity.groups}
    items = [[(size, cost) for _, size, cost in each] for each in options.values()]
    selection = knapsack.solve(items, budget_bytes - sensitivity.other_bytes)
    if selection is None:
        smallest = sensitivity.other_bytes + sum(min(size for size, _ in each) for each in items)
        fail("budget_bytes", f"at least {smallest}, the smallest possible size", budget_bytes)
    chosen = {group: each[i] for (group, each), i in zip(options.items(), selection, strict=True)}
    layers = {
        name: sensitivity.choices[label]
        for group, (label, _, _) in chosen.items()
        if label != FULL
        for name in sensitivity.groups[group].layers
    }
    sizes = {group: size for group, (_, size, _) in chosen.items()}
    cost = math.fsum(cost for _, _, cost in chosen.values())
    return BitAllocation(
        layers=layers,
        groups={group: label for group, (label, _, _) in chosen.items()},
        parameters={name: group.parameters for name, group in sensitivity.groups.items()},
        sizes=sizes,
        bytes=sensitivity.other_bytes + sum(sizes.values()),
        budget_bytes=budget_bytes,
        predicted=sensitivity.baseline + (cost if sensitivity.lower_is_better else -cost),
    )


def _labels(sensitivity: Sensitivity, choices: Sequence[int | str] | None) -> list[str]:
    known = [*sensitivity.choices, FULL]
    if choices is None:
        return known
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        fail("choices", f"a list of some of {known}, or of bits", repr(choices))
    labels = []
    for choice in choices:
        label = FULL if choice in FULL_BITS else f"int{choice}" if isinstance(choice, int) else choice
        if label not in known:
            fail("choices", f"some of {known}, as measured, or bits", repr(choice))
        labels.append(label)
    return labels


def _options(
    sensitivity: Sensitivity, group: str, labels: list[str], loss: str
) -> list[tuple[str, int, float]]:
    """Label, bytes and loss of each choice of a group whose quality was finite."""
    options = []
    for label in labels:
        if label == FULL:
            options.append((FULL, sensitivity.groups[group].bytes, 0.0))
            continue
        row = next(row for row in sensitivity.rows if (row.group, row.choice) == (group, label))
        cost = sensitivity.loss(row.only)
        if loss == "all_but":
            cost = sensitivity.loss(sensitivity.all_quantized[label]) - sensitivity.loss(row.all_but)
        if math.isfinite(cost):
            options.append((label, row.bytes, cost))
    if not options:
        fail("choices", f"one of finite quality for group {group!r}", f"none among {labels}")
    return options
