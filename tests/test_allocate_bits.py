"""allocate_bits: within the budget, as good as brute force, and a config with the sizes of the file."""

import io
import itertools
import json
import math
import os
import random

import pytest
import torch
from helpers_reload import TOKENS, Model
from numeric import assert_identical
from rich.console import Console
from torch import nn

import qnkernels as qnk
from qnkernels.nn.compressed import CompressedLayer
from qnkernels.sensitivity.result import Group, Row

PRODUCT = qnk.PQConfig(block_size=6, n_centroids=16, n_iter=2, codebook_dtype=torch.float16)


def build(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype).eval()


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """Distance of the logits to those in full precision."""
    expected = build(model.norm.weight.dtype)(TOKENS)
    return (model(TOKENS) - expected).float().norm().item()


def measured(dtype: torch.dtype = torch.float32, **options) -> qnk.Sensitivity:
    options = {"filter_fn": lambda _, name: name != "conv", **options}
    return qnk.sensitivity(build(dtype), loss, (2, 3, 5, 8), pq=[PRODUCT], progress=False, **options)


def invented(seed: int, groups: int = 4, lower_is_better: bool = True) -> qnk.Sensitivity:
    """A result with made-up numbers, losses being halves so that sums are exact."""
    rng = random.Random(seed)
    choices = {f"int{bits}": qnk.IntWeightOnlyConfig(bits) for bits in (2, 4, 8)} | {"pq6x16": PRODUCT}
    tables, rows = {}, []
    for group in map(str, range(groups)):
        count = rng.randint(10, 400)
        tables[group] = Group([f"{group}.a", f"{group}.b"], count, 4 * count)
        for choice in choices:
            only, all_but = (rng.randint(90, 180) / 2 for _ in range(2))
            rows.append(Row(group, choice, count, rng.randint(1, 4 * count), only, all_but))
    everything = {choice: rng.randint(150, 250) / 2 for choice in choices}
    return qnk.Sensitivity("quality", lower_is_better, 50.0, choices, everything, tables, rows, 77, [])


def brute_force(s: qnk.Sensitivity, budget: int, loss: str) -> tuple[float, int] | None:
    """Least sum of losses, and its least size."""
    sign = 1 if s.lower_is_better else -1
    options = []
    for name, group in s.groups.items():
        found = [(0.0, group.bytes)]
        for row in (row for row in s.rows if row.group == name):
            cost = row.only - s.baseline if loss == "only" else s.all_quantized[row.choice] - row.all_but
            found.append((sign * cost, row.bytes))
        options.append(found)
    sums = (tuple(map(sum, zip(*each, strict=True))) for each in itertools.product(*options))
    return min((each for each in sums if each[1] + s.other_bytes <= budget), default=None)


@pytest.mark.parametrize("loss", ["only", "all_but"])
@pytest.mark.parametrize("lower_is_better", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_no_selection_is_better(seed, lower_is_better, loss):
    s = invented(seed, lower_is_better=lower_is_better)
    smallest = 77 + sum(
        min(group.bytes, *(row.bytes for row in s.rows if row.group == name))
        for name, group in s.groups.items()
    )
    full = 77 + sum(group.bytes for group in s.groups.values())
    for budget in (smallest, smallest + 1, *range(smallest + 2, full, 61), full, full + 10**9):
        cost, size = brute_force(s, budget, loss)
        found = qnk.allocate_bits(s, budget, loss=loss)
        assert found.bytes == 77 + size == 77 + sum(found.sizes.values()) and found.bytes <= budget
        assert found.predicted == 50.0 + (cost if lower_is_better else -cost)
        layers = {n: s.choices[c] for g, c in found.groups.items() if c != "full" for n in s.groups[g].layers}
        assert found.layers == layers and found.budget_bytes == budget
    for budget in (smallest - 1, 0, -5):
        message = f"budget_bytes: expected at least {smallest}, the smallest possible size, got {budget}$"
        with pytest.raises(ValueError, match=message):
            qnk.allocate_bits(s, budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_takes_what_was_claimed(dtype, tmp_path):
    """compressed_size is that of the allocation, to the byte; the file adds its header; logits come back."""
    s = measured(dtype)
    whole = qnk.compressed_size(build(dtype))
    sizes = []
    for share in (0.15, 0.2, 0.3, 0.5, 0.9, 1.0):
        model, budget = build(dtype), int(whole * share)
        allocation = qnk.allocate_bits(s, budget)
        assert qnk.quantize_(model, allocation) is model
        assert qnk.compressed_size(model) == allocation.bytes <= budget
        sizes.append(allocation.bytes)
        for group, choice in allocation.groups.items():
            for name in s.groups[group].layers:
                assert isinstance(model.get_submodule(name), CompressedLayer) == (choice != "full")
        if allocation.groups["embedding"] != "full":
            parts = (
                ("codes",) if allocation.groups["embedding"].startswith("pq") else ("weight_packed", "scale")
            )
            assert all(getattr(model.head, part) is getattr(model.embedding, part) for part in parts)
        path = tmp_path / "m"
        qnk.save_compressed(model, path)
        with open(path, "rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        assert allocation.bytes == os.path.getsize(path) - header
        loaded = qnk.load_compressed(build(dtype), path).eval()
        with torch.no_grad():
            assert_identical(loaded(TOKENS), model(TOKENS))
    assert sizes == sorted(sizes) and len(set(sizes)) > 3


def test_choices_that_may_be_taken():
    s = measured()
    for choices, expected in (
        ((8,), {"int8"}),
        ((2, 16), {"int2", "full"}),
        ((2, 32), {"int2", "full"}),
        (("pq6x16",), {"pq6x16"}),
        ((5, "pq6x16", "int3", "full"), {"int5", "pq6x16", "int3", "full"}),
    ):
        for budget in (25_000, 40_000, 10**6):
            assert set(qnk.allocate_bits(s, budget, choices).groups.values()) <= expected
    assert set(qnk.allocate_bits(s, 10**6).groups.values()) & {"full", "int8", "int5", "int3", "int2"}
    for choices, received in (((4,), "4"), ((8, "int7"), "'int7'"), ((True,), "True"), ((64,), "64")):
        with pytest.raises(ValueError, match=f"choices: expected some of .*, or bits, got {received}"):
            qnk.allocate_bits(s, 10**6, choices)
    for choices in ((), "int8", 8):
        with pytest.raises(ValueError, match="choices: expected a list of some of"):
            qnk.allocate_bits(s, 10**6, choices)


def test_quality_that_is_not_finite_is_never_chosen():
    s = measured()
    rows = [
        Row(row.group, row.choice, row.parameters, row.bytes, math.nan, row.all_but)
        if (row.group, row.choice) in (("body.0", "int2"), ("body.0", "int3"))
        else row
        for row in s.rows
    ]
    s = qnk.Sensitivity(**{**vars(s), "rows": rows})
    allocation = qnk.allocate_bits(s, 10**6, (2, 3, 5))
    assert allocation.groups["body.0"] == "int5"
    with pytest.raises(ValueError, match=r"choices: expected one of finite quality for group 'body.0'"):
        qnk.allocate_bits(s, 10**6, (2, 3))


def test_mistakes():
    s = invented(0)
    for budget in (1e6, "1000", None, True):
        with pytest.raises(TypeError, match="budget_bytes: expected an integer, got"):
            qnk.allocate_bits(s, budget)
    with pytest.raises(ValueError, match=r"loss: expected one of \('only', 'all_but'\), got 'both'"):
        qnk.allocate_bits(s, 10**6, loss="both")
    with pytest.raises(ValueError, match="layers: expected names of layers that the model has"):
        qnk.quantize_(build(), qnk.allocate_bits(s, 1500))


def test_layers_left_out_stay_and_count():
    with pytest.warns(UserWarning, match="left in full precision: embedding, head, conv, grouped"):
        s = measured(groups={"ffn": "body"}, filter_fn=None)
    model = build()
    allocation = qnk.allocate_bits(s, 20_000)
    qnk.quantize_(model, allocation)
    assert qnk.compressed_size(model) == allocation.bytes <= 20_000
    assert type(model.head) is nn.Linear and type(model.conv) is nn.Conv2d


def test_a_loaded_result_gives_the_same_allocation(tmp_path):
    s = measured()
    s.save(tmp_path / "s.json")
    assert qnk.allocate_bits(qnk.Sensitivity.load(tmp_path / "s.json"), 20_000) == qnk.allocate_bits(
        s, 20_000
    )


def test_forms_of_the_result():
    allocation = qnk.allocate_bits(measured(), 20_000)
    console = Console(width=80, file=io.StringIO())
    console.print(allocation.table())
    text = console.file.getvalue()
    for word in (f"{allocation.bytes:,} bytes of 20,000", *allocation.groups, *allocation.groups.values()):
        assert word in text
    assert "…" not in text
    value = json.loads(json.dumps(allocation.to_json()))
    assert value["groups"] == allocation.groups and value["bytes"] == allocation.bytes
    assert value["layers"].keys() == allocation.layers.keys()
    sizes = {group: allocation.bits[group] * allocation.parameters[group] / 8 for group in allocation.groups}
    assert sizes == pytest.approx(allocation.sizes)
