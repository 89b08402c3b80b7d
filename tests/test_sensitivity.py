"""sensitivity: which weights each evaluation sees, that they come back, resumption, mistakes."""

import json
import math

import pytest
import torch
from helpers_sensitivity import (
    GROUPS,
    LAYERS,
    OPTIONS,
    PRODUCT,
    Evaluation,
    build,
    exported,
    loss,
    measure,
    weights,
)
from numeric import assert_identical
from torch import nn

import qnkernels as qnk
from qnkernels.sensitivity import journal


@pytest.mark.parametrize("options", OPTIONS)
def test_each_evaluation_sees_the_weights_that_would_be_served(options):
    options, evaluate = OPTIONS[options], Evaluation()
    measure(evaluate=evaluate, pq=[PRODUCT], **options)
    configs = [*(qnk.IntWeightOnlyConfig(bits, **options) for bits in (3, 8)), PRODUCT]
    expected = [exported((), None)]
    for config in configs:
        expected.append(exported(tuple(GROUPS), config))
        for group in GROUPS:
            expected.append(exported((group,), config))
            expected.append(exported(tuple(other for other in GROUPS if other != group), config))
    assert len(evaluate.seen) == len(expected) == 1 + 3 * 7
    for seen, model in zip(evaluate.seen, expected, strict=True):
        for name, weight in seen.items():
            decoded = model.get_submodule(name).weight.detach()
            if name == "head":  # the padding row of zeros is one in the table alone
                decoded, weight = decoded[1:], weight[1:]
            assert_identical(weight, decoded)


def test_the_result_holds_what_was_evaluated():
    s = measure(pq=[PRODUCT], lower_is_better=False, metric="mean")
    assert (s.metric, s.lower_is_better, s.left_out) == ("mean", False, ["conv"])
    assert list(s.choices) == ["int3", "int8", "pq6x8"]
    assert s.baseline == loss(build()) and s.loss(s.baseline - 2) == pytest.approx(2)
    assert {name: group.layers for name, group in s.groups.items()} == LAYERS
    for choice, config in s.choices.items():
        assert s.all_quantized[choice] == pytest.approx(loss(exported(tuple(GROUPS), config)), rel=1e-4)
    whole = qnk.compressed_size(build())
    assert s.other_bytes + sum(group.bytes for group in s.groups.values()) == whole
    assert [(row.group, row.choice) for row in s.rows] == [(g, c) for g in GROUPS for c in s.choices]
    for row in s.rows:
        others = tuple(group for group in GROUPS if group != row.group)
        model = exported((row.group,), s.choices[row.choice])
        assert row.only == pytest.approx(loss(model), rel=1e-4)
        assert row.all_but == pytest.approx(loss(exported(others, s.choices[row.choice])), rel=1e-4)
        assert row.bytes - s.groups[row.group].bytes == qnk.compressed_size(model) - whole
    parameters = {"attention": 4 * 2 * 3, "ffn": 2 * 48 * 144, "embedding": 50 * 48}
    assert {row.group: row.parameters for row in s.rows} == parameters


@pytest.mark.parametrize("codebook_dtype", [None, torch.float16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_a_file(dtype, codebook_dtype):
    """More codewords asked for than there are blocks, odd widths, groups, and codebooks of each dtype."""
    model = nn.Sequential(nn.Linear(24, 5), nn.Conv2d(3, 4, 2), nn.Embedding(7, 12)).to(dtype)
    size = qnk.compressed_size(model)
    pq = [qnk.PQConfig(4, n, n_iter=1, codebook_dtype=codebook_dtype) for n in (2, 5, 300)]
    for options in ({}, {"group_size": 6}, {"symmetric": True}):
        s = qnk.sensitivity(model, lambda _: 1.0, (2, 3, 4, 5, 6, 7, 8), pq=pq, **options, progress=False)
        for row in s.rows:
            with torch.random.fork_rng():
                copy = nn.Sequential(nn.Linear(24, 5), nn.Conv2d(3, 4, 2), nn.Embedding(7, 12)).to(dtype)
            qnk.quantize_(copy, s.choices[row.choice], lambda _, name, row=row: name == row.group)
            assert size - s.groups[row.group].bytes + row.bytes == qnk.compressed_size(copy)


@pytest.mark.parametrize("stop", [0, 1, 2, 9])
def test_the_model_comes_back_bit_for_bit(stop):
    model = build()
    with torch.no_grad():
        model.body[0].weight[0, :2] = torch.tensor([-0.0, 1e-42])
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        measure(model, Evaluation(stop))
    measure(model)
    for name, parameter in model.named_parameters():
        assert before[name] == (parameter, parameter.data_ptr())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), state[name].view(torch.int32)), name
    assert model.head.weight is model.embedding.weight and model.head.weight.requires_grad


def test_layers_without_groups_are_their_own_and_tied_ones_are_one():
    calls, model = Evaluation(), build()
    s = qnk.sensitivity(model, calls, (8,), progress=False)
    assert list(s.groups) == ["embedding", "conv", "grouped", "body.0", "body.2"]
    assert s.groups["embedding"].layers == ["embedding", "head"] and s.left_out == []
    assert len(calls.seen) == 1 + 1 + 2 * 5
    for seen in calls.seen:
        assert_identical(seen["head"], seen["embedding"])
    s = qnk.sensitivity(build(tied=False), loss, (8,), progress=False)
    assert s.groups["head"].layers == ["head"] and len(s.groups) == 6


def test_a_set_of_groups_is_evaluated_once():
    """Of two groups, only one is all but the other; of one, only it is all, and all but it is nothing."""
    calls = Evaluation()
    two = {"a": "body", "b": "conv|grouped|embedding"}
    s = qnk.sensitivity(build(), calls, (5, 8), two, progress=False)
    assert len(calls.seen) == 1 + 2 * 3
    assert s.rows[0].only == s.rows[2].all_but and s.rows[0].all_but == s.rows[2].only
    calls = Evaluation()
    s = qnk.sensitivity(build(), calls, (8,), {"a": lambda module, name: True}, progress=False)
    assert len(calls.seen) == 2
    assert s.rows[0].only == s.all_quantized["int8"] and s.rows[0].all_but == s.baseline


def test_filter_fn_leaves_layers_out():
    s = qnk.sensitivity(build(), loss, (3,), filter_fn=lambda m, name: name != "conv", progress=False)
    assert list(s.groups) == ["embedding", "grouped", "body.0", "body.2"] and s.left_out == []


@pytest.mark.parametrize("stop", range(1, 15))
def test_an_interrupted_measurement_goes_on(stop, tmp_path):
    """The same result, only what was missing evaluated, each evaluation in the file as soon as it is done."""
    whole, path = measure(), tmp_path / "evaluations.json"
    first, second = Evaluation(stop), Evaluation()
    with pytest.raises(KeyboardInterrupt):
        measure(evaluate=first, resume=path)
    assert len(json.loads(path.read_text())["evaluations"]) == stop
    assert measure(evaluate=second, resume=path) == whole
    assert len(second.seen) == 15 - stop
    third = Evaluation()
    assert measure(evaluate=third, resume=str(path)) == whole and third.seen == []
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path, replace, calls = tmp_path / "e.json", journal.write_text, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk full")
        replace(*arguments)

    monkeypatch.setattr(journal, "write_text", failing)
    model = build()
    with pytest.raises(OSError, match="disk full"):
        measure(model, resume=path)
    assert len(json.loads(path.read_text())["evaluations"]) == 1
    assert measure(model, resume=path) == measure(model)


OTHERS = {
    "choices": ({"bits": (3, 4)}, "choices, int4: expected {.*}, got null"),
    "scales": ({"per": "tensor"}, 'choices, int3, per: expected "tensor", got "channel"'),
    "products": ({"pq": [PRODUCT]}, "choices, pq6x8: expected {.*}, got null"),
    "fewer": ({"bits": (3,)}, "choices, int8: expected null, got {.*}"),
    "groups": (
        {"groups": {**GROUPS, "ffn": r"body.0"}},
        r'groups, ffn: expected \["body.0"\], got \["body.0"',
    ),
    "metric": ({"metric": "accuracy"}, 'metric: expected "accuracy", got "quality"'),
    "model": ({"model": build(1)}, 'model: expected "[0-9a-f]{16}", got "[0-9a-f]{16}"'),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.filterwarnings("ignore:sensitivity. in no group")
def test_a_file_of_other_settings_is_refused(other, tmp_path):
    path = tmp_path / "e.json"
    measure(resume=path)
    content = path.read_text()
    options, message = OTHERS[other]
    arguments = {"model": build(), "bits": (3, 8), "groups": GROUPS, **options}
    with pytest.raises(ValueError, match=rf"resume: {path} holds evaluations of other settings; {message}"):
        qnk.sensitivity(evaluate=loss, **arguments, resume=path, progress=False)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": "x", "settings": {}, "evaluations": []}']
)
@pytest.mark.filterwarnings("ignore:sensitivity. in no group")
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "e.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"resume: expected a file of evaluations, {path} is none"):
        qnk.sensitivity(build(), loss, (8,), GROUPS, resume=path, progress=False)
    assert path.read_text() == content
    with pytest.raises(FileNotFoundError):
        qnk.sensitivity(build(), loss, (8,), GROUPS, resume=tmp_path / "nowhere" / "e.json", progress=False)


def test_quality_that_is_not_finite(tmp_path):
    """Recorded as NaN, in the files as null and nan; in full precision refused."""
    plain = weights(build())

    def evaluate(model):
        changed = not torch.equal(model.body[0].weight, plain["body.0"])
        return math.inf if changed else 1.0

    s = measure(evaluate=evaluate, resume=tmp_path / "e.json")
    assert math.isnan(s.all_quantized["int3"]) and math.isnan(s.rows[0].all_but)
    assert s.rows[0].only == 1.0
    assert s.to_json()["all_quantized"] == {"int3": None, "int8": None}
    again = measure(evaluate=None, resume=tmp_path / "e.json")
    assert json.dumps(again.to_json(), allow_nan=False) == json.dumps(s.to_json())
    s.save(tmp_path / "s.json")
    assert repr(qnk.Sensitivity.load(tmp_path / "s.json")) == repr(s)
    s.plot(tmp_path / "s.png")
    for quality in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="evaluate: expected a finite quality in full precision, got "):
            measure(evaluate=lambda _, quality=quality: quality)


def test_evaluate_returns_a_number():
    assert measure(evaluate=lambda model: torch.tensor(loss(model))).baseline == loss(build())
    for value in (None, "accuracy", torch.ones(2)):
        with pytest.raises(TypeError, match="evaluate: expected a function that returns a number, got"):
            measure(evaluate=lambda _, value=value: value)


MISTAKES = [
    ({"groups": {"a": "body", "b": "body.0"}}, r"one group, got 'body.0' in 'a' and 'b'"),
    ({"groups": {"a": "emb", "b": "head"}}, r"one group, got 'embedding' with 'head' in 'a' and 'b'"),
    ({"groups": {"a": "body", "b": "nothing"}}, "groups: expected .* layers in each group, got none in 'b'"),
    ({"groups": {"a": "bo(dy"}}, r"groups: expected a regular expression for 'a', got 'bo\(dy'"),
    ({"groups": {"a": ["body.0", "body.9"]}}, "groups: expected names of .* in 'a', got 'body.9'"),
    ({"groups": {"a": ["norm"]}}, "groups: expected names of Linear, .* in 'a', got 'norm'"),
    ({"groups": {}}, "groups: expected at least one group"),
    ({"bits": ()}, "bits: expected at least one choice here or in pq, got none"),
    ({"bits": (1, 8)}, r"bits: expected an integer in \[2, 8\], got 1"),
    ({"bits": (4, 4)}, "bits: expected each choice once, got int4 again"),
    ({"pq": [PRODUCT, PRODUCT]}, "pq: expected each choice once, got pq6x8 again"),
    ({"pq": [qnk.PQConfig(activations=True)]}, "pq: expected configs without activations and group"),
    ({"bits": (3,)}, "layer 'conv': weight: expected an even number of columns to pack 3-bit codes"),
    ({"group_size": 7}, "layer 'embedding': group_size: expected a divisor of the 48 columns"),
    ({"pq": [qnk.PQConfig(8)]}, "layer 'conv': block_size: expected a divisor of the 9 weights"),
    ({"per": "row"}, "per: expected one of"),
    ({"observer": "max"}, "observer: expected one of"),
    ({"filter_fn": lambda module, name: False}, "model: expected Linear, .* to quantize, got Model without"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_are_found_before_anything_is_evaluated(options, message):
    calls = Evaluation()
    with pytest.raises(ValueError, match=message):
        qnk.sensitivity(build(), calls, **{"bits": (8,), "progress": False, **options})
    assert not calls.seen


def test_types_that_cannot_be():
    for options, message in (
        ({"bits": 4}, "bits: expected a list, got 4"),
        ({"pq": [(8, 256)]}, "pq: expected PQConfig objects"),
        (
            {"groups": {"a": 3}},
            "groups: expected a regular expression, a function or a list .* for 'a', got 3",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            qnk.sensitivity(build(), loss, progress=False, **{"bits": (8,), **options})


def test_models_that_cannot_be():
    noisy = qnk.quantize_(build(), qnk.ScalarNoiseConfig(), lambda _, name: name == "body.0")
    with pytest.raises(ValueError, match=r"layer 'body.0': model: expected no noisy layers, as remove"):
        qnk.sensitivity(noisy, loss, (8,), progress=False)
    shared = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    shared["norm"].weight = shared["linear"].weight
    with pytest.raises(ValueError, match=r"layer 'linear': weight: expected one that only Linear, .* 'norm'"):
        qnk.sensitivity(shared, loss, (8,), progress=False)
    served = qnk.quantize_(build(), qnk.Int8WeightOnlyConfig(), lambda _, name: name == "body.0")
    assert "body.0" not in qnk.sensitivity(served, loss, (8,), progress=False).groups
