"""The measurement: a model evaluated with some of its weights quantized, and restored after each time."""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ..checkpoint import compressed_size
from ..layers import Layers, naming
from ..mixed import LayerConfig
from ..ops.checks import fail
from ..pq import PQConfig
from .choices import Choices, make_choices, stored_bytes, to_json
from .groups import Filter, Selector, assign
from .journal import Journal, Key, fingerprint
from .result import Group, Row, Sensitivity

Decoded = list[tuple[nn.Parameter, torch.Tensor]]


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    bits: Sequence[int] = (2, 3, 4, 8),
    groups: Mapping[str, Selector] | None = None,
    *,
    pq: Sequence[PQConfig] = (),
    per: str = "channel",
    observer: str = "minmax",
    group_size: int | None = None,
    symmetric: bool = False,
    lower_is_better: bool = True,
    metric: str = "quality",
    filter_fn: Filter | None = None,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> Sensitivity:
    """How the quality of a model suffers when only one group of its layers is quantized, and when all but it.

        s = qnk.sensitivity(model.eval(), perplexity, groups={"attention": "attn", "ffn": r"fc[12]"})
        print(s.table()); s.plot("sensitivity.png")

    evaluate(model): a number, lower or higher is better; called once in full precision, and once for each
    choice and set of groups. It must not train the model. Quality that is not finite is recorded as NaN,
    which `allocate_bits` never chooses; in full precision it is a ValueError.
    bits, pq: what weights are quantized to, as IntWeightOnlyConfig (with per, observer, group_size and
    symmetric) and these PQConfig would store them: the model computes with the decoded weights.
    groups: by name, a regular expression that is found in the names of layers (re.search), a function of
    (module, name), or a list of names; None: each layer is a group. Linear, Embedding and Conv2d layers
    count, those for which `filter_fn(module, name)` is true. Those that share a weight are one, in the group
    of any of them. What is in no group stays in full precision, and a warning says so.
    metric: what evaluate measures, a title. resume: a JSON file that keeps what is evaluated, replaced after
    each evaluation; one that is there is gone on from. It is refused where model, choices, groups or metric
    are others; that evaluate is the same is for you to see to. progress: a bar on stderr.

    The weights are replaced, not written to, and the same tensors as before when this returns or raises. At
    most one more copy of them is in memory. Raises ValueError and TypeError naming the argument or layer.
    """
    options = dict(per=per, observer=observer, group_size=group_size, symmetric=symmetric)
    choices = make_choices(bits, pq, **options)
    layers, left_out = assign(model, groups, filter_fn)
    for config in choices.values():
        for name, layer in (item for group in layers.values() for item in group):
            with naming(name):
                config.check(layer)
    if left_out:
        message = f"sensitivity: in no group, and left in full precision: {', '.join(left_out)}"
        warnings.warn(message, stacklevel=2)
    keys = _keys(choices, list(layers))
    settings = {
        "metric": metric,
        "choices": {label: to_json(config) for label, config in choices.items()},
        "groups": {group: [name for name, _ in items] for group, items in layers.items()},
        "model": "" if resume is None else fingerprint(model),
    }
    journal = Journal(resume, settings)
    with _bar(keys, journal, progress) as advance:
        _evaluate(model, evaluate, layers, choices, keys, journal, advance)
    return _result(model, layers, choices, journal.known, metric, lower_is_better, left_out)


def _keys(choices: Choices, groups: list[str]) -> dict[Key, str]:
    """All evaluations, each with what the bar says; of two groups, "only one" is "all but the other"."""
    everything = frozenset(groups)
    keys: dict[Key, str] = {(None, frozenset()): "full precision"}
    for choice in choices:
        keys.setdefault((choice, everything), f"{choice}: all")
        for group in groups:
            keys.setdefault(_only(choice, group), f"{choice}: only {group}")
            keys.setdefault(_all_but(choice, group, everything), f"{choice}: all but {group}")
    return keys


def _only(choice: str, group: str) -> Key:
    return choice, frozenset({group})


def _all_but(choice: str, group: str, everything: frozenset[str]) -> Key:
    rest = everything - {group}
    return choice if rest else None, rest


def _evaluate(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    layers: dict[str, Layers],
    choices: Choices,
    keys: dict[Key, str],
    journal: Journal,
    advance: Callable[[str], None],
) -> None:
    """Record what is missing, choice by choice, so that each weight is quantized once for each."""
    for choice in (None, *choices):
        missing = [key for key in keys if key[0] == choice and key not in journal.known]
        decoded: dict[str, Decoded] = {}
        if choice is not None and missing:
            decoded = {group: _decoded(items, choices[choice]) for group, items in layers.items()}
        for key in missing:
            advance(keys[key])
            with _holding([pair for group in key[1] for pair in decoded[group]]):
                quality = _number(evaluate(model))
            if choice is None and not math.isfinite(quality):
                fail("evaluate", "a finite quality in full precision", quality)
            journal.record(key, quality)
    if not math.isfinite(journal.known[None, frozenset()]):
        fail("resume", "a file with a finite quality in full precision", "NaN")


@torch.no_grad()
def _decoded(layers: Layers, config: LayerConfig) -> Decoded:
    """Each weight of the layers, once, and what it decodes to when it is stored, as its first layer sees it.

    (A product-quantized table keeps its padding row of zeros, an output layer of the same codes does not.)
    """
    weights: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    for name, layer in layers:
        if id(layer.weight) not in weights:
            with naming(name):
                weights[id(layer.weight)] = layer.weight, config.convert(layer, {}).weight.detach()
    return list(weights.values())


@contextlib.contextmanager
def _holding(decoded: Decoded) -> Iterator[None]:
    """The parameters hold the decoded weights; their own tensors, never written to, come back at the end."""
    own = [(parameter, parameter.data) for parameter, _ in decoded]
    try:
        for parameter, weight in decoded:
            parameter.data = weight
        yield
    finally:
        for parameter, weight in own:
            parameter.data = weight


def _number(quality: object) -> float:
    try:
        return float(quality)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"evaluate: expected a function that returns a number, got {quality!r}") from error


@contextlib.contextmanager
def _bar(keys: dict[Key, str], journal: Journal, progress: bool) -> Iterator[Callable[[str], None]]:
    """Gives what is to be called, with a description, before each evaluation that is missing."""
    known = sum(key in journal.known for key in keys)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=len(keys), completed=known)
        started = iter(range(known, len(keys)))
        yield lambda description: bar.update(task, description=description, completed=next(started))
        bar.update(task, description="evaluated", completed=len(keys))


def _result(
    model: nn.Module,
    layers: dict[str, Layers],
    choices: Choices,
    known: dict[Key, float],
    metric: str,
    lower_is_better: bool,
    left_out: list[str],
) -> Sensitivity:
    everything = frozenset(layers)
    groups, rows = {}, []
    for group, items in layers.items():
        weights = {id(layer.weight): layer for _, layer in items}.values()
        parameters = sum(layer.weight.numel() for layer in weights)
        size = sum(layer.weight.nbytes for layer in weights)
        groups[group] = Group([name for name, _ in items], parameters, size)
        for choice, config in choices.items():
            size = sum(stored_bytes(layer, config) for layer in weights)
            only, all_but = known[_only(choice, group)], known[_all_but(choice, group, everything)]
            rows.append(Row(group, choice, parameters, size, only, all_but))
    return Sensitivity(
        metric=metric,
        lower_is_better=lower_is_better,
        baseline=known[None, frozenset()],
        choices=choices,
        all_quantized={choice: known[choice, everything] for choice in choices},
        groups=groups,
        rows=rows,
        other_bytes=compressed_size(model) - sum(group.bytes for group in groups.values()),
        left_out=left_out,
    )
