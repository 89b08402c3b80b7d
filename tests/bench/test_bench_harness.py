"""bench/harness.py: turns, quotas, ratios; and the cases of every suite."""

import importlib
import itertools
import random
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import environment
import harness
import run
import samplers
from harness import Budget, Case, Contender, Measurement, Samples

SUITES = [importlib.import_module(f"bench_{name}") for name in run.SUITES]
CPU = torch.device("cpu")


def test_every_round_is_a_permutation_and_neighbours_change():
    names = ["a", "b", "c", "d"]
    rounds = [harness.turns(names, index) for index in range(8)]
    assert all(sorted(order) == names for order in rounds)
    assert {order[0] for order in rounds} == set(names)
    before_b = {first for order in rounds for first, second in itertools.pairwise(order) if second == "b"}
    assert len(before_b) >= 2


def test_contenders_take_turns_until_their_quota():
    visits: list[str] = []
    takers = {name: lambda name=name: visits.append(name) or float(len(visits)) for name in "abc"}
    seconds = harness.interleave(takers, {"a": 4, "b": 2, "c": 4})
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 2, "c": 4}
    assert sorted(visits[:3]) == sorted(visits[3:6]) == ["a", "b", "c"]
    assert sorted(visits[6:]) == ["a", "a", "c", "c"]
    for name in "abc":
        assert seconds[name] == [index + 1.0 for index, visitor in enumerate(visits) if visitor == name]


def test_slow_contenders_get_fewer_rounds_but_never_too_few():
    budget = Budget(rounds=60, sample_seconds=0.01, contender_seconds=2.0)
    assert [budget.quota(seconds) for seconds in (0.01, 0.1, 0.45, 9.0)] == [60, 20, 5, 3]
    assert Budget(2, 0.0, 0.0).quota(1.0) == 2


def test_ratio_is_that_of_the_medians():
    samples = {
        "ours": Samples(1, "wall", [3.0, 1.0, 2.0]),
        "copy": Samples(1, "wall", [4.0, 100.0, 4.0, 0.0]),
    }
    measurement = Measurement(samples, {}, "copy", 0.0)
    assert measurement.ratio("ours", "copy") == 2.0 / 4.0
    assert measurement.ratio("copy", "copy") == 1.0
    assert measurement.ratio("ours", "absent") is None


def toy_case(*extra: Contender) -> Case:
    return Case(
        op="add",
        name="a sum of 64",
        shape="64",
        dtype="float32",
        moved_bytes=256,
        operations=0,
        inputs=lambda device, index: torch.full((64,), float(index), device=device),
        contenders=lambda device_type: [Contender("sum", "ceiling", lambda x: x.sum), *extra],
    )


def test_measure_times_each_contender_and_goes_on_without_the_one_that_refuses():
    def refuse(x):
        raise RuntimeError("no kernel for this\nsecond line")

    case = toy_case(Contender("mean", "peer", lambda x: x.mean), Contender("broken", "peer", refuse))
    measurement = harness.measure(case, CPU, Budget(rounds=3, sample_seconds=1e-5, contender_seconds=0.1))
    assert measurement.failures == {"broken": "RuntimeError: no kernel for this"}
    assert measurement.ceiling == "sum" and set(measurement.samples) == {"sum", "mean"}
    for samples in measurement.samples.values():
        assert samples.timer == "wall" and samples.calls >= 1
        assert len(samples.seconds) == 3 and all(seconds > 0 for seconds in samples.seconds)


def test_a_warm_up_runs_ours_and_the_peers_once_and_passes_over_failures():
    ran = []

    def refuse(x):
        raise RuntimeError("no kernel")

    spies = [Contender(role, role, lambda x, role=role: lambda: ran.append(role)) for role in harness.ROLES]
    harness.warm(toy_case(Contender("broken", "ours", refuse), *spies), CPU)
    assert ran == ["ours", "peer"]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_brief_run_has_every_case_and_what_is_slow_in_the_main_ones_only(suite, device_type):
    cases = {mode: harness.chosen(suite.CASES, device_type, mode) for mode in harness.BUDGETS}
    assert list(map(str, cases["brief"])) == list(map(str, cases["full"]))
    assert list(map(str, cases["quick"])) == [str(case) for case in cases["full"] if case.quick]
    for whole, brief in zip(cases["full"], cases["brief"], strict=True):
        every = whole.contenders(device_type)
        assert [one.is_compiled for one in every] == [is_made_by_compiled(one.prepare) for one in every]
        fast = [one for one in every if not one.is_compiled and one.role != "reference"]
        expected = [one.name for one in (every if whole.quick else fast)]
        assert [one.name for one in brief.contenders(device_type)] == expected


def is_made_by_compiled(call) -> bool:
    """Whether what harness.compiled returns is the function, an argument of it or in its closure."""
    if isinstance(call, partial):
        return any(map(is_made_by_compiled, (call.func, *call.args, *call.keywords.values())))
    if getattr(call, "__qualname__", "").startswith("compiled."):
        return True
    return any(is_made_by_compiled(cell.cell_contents) for cell in getattr(call, "__closure__", None) or ())


def test_other_load_is_what_neither_idled_nor_ran_here():
    assert samplers.other_load((10.0, 5.0, 1.0), (14.0, 11.0, 6.0)) == pytest.approx(0.1)
    assert samplers.other_load((10.0, 5.0, 1.0), (14.0, 9.0, 6.0)) == 0.0
    measurement = harness.measure(toy_case(), CPU, Budget(2, 1e-4, 0.01))
    assert 0.0 <= measurement.other_load <= 1.0


def test_a_forced_backend_is_forced_only_while_its_contender_runs():
    import qnkernels.backends as backends

    seen = []
    spy = Contender("spy", "reference", lambda x: lambda: seen.append(backends._forced), backend="reference")
    harness.measure(toy_case(spy), CPU, Budget(2, 1e-6, 0.01))
    assert set(seen) == {"reference"} and backends._forced is None


def test_a_gpu_rotates_among_more_inputs_than_its_cache_holds(monkeypatch):
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda")
    assert samplers.input_sets(2**30, cuda) == 1
    assert samplers.input_sets(10 * 2**20, cuda) == 15
    assert samplers.input_sets(100, cuda) == samplers.MAX_SETS
    assert samplers.input_sets(100, CPU) == 1


def test_a_cpu_rotates_where_inputs_come_from_memory(monkeypatch, tmp_path):
    for index, size in enumerate(("32K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(samplers, "CACHES", tmp_path)
    assert samplers.input_sets(16 * 2**20, CPU) == 1
    assert samplers.input_sets(16 * 2**20, CPU, from_memory=True) == 6
    assert samplers.input_sets(2**20, CPU, from_memory=True) == samplers.MAX_SETS
    monkeypatch.setattr(samplers, "CACHES", tmp_path / "absent")
    assert samplers.last_level_cache() == 64 * 2**20


def test_samples_from_memory_take_the_input_sets_in_turn():
    seen = []
    runs = [partial(seen.append, index) for index in range(3)]
    sample, calls, _ = samplers.sampler(runs, 1e-9, CPU, capture=False)
    seen.clear()
    sample()
    sample()
    assert calls == 1 and len(set(seen)) == 2
    sample, calls, _ = samplers.sampler(runs, 1e-4, CPU, capture=False)
    seen.clear()
    sample()
    assert calls > 3 and all((late - early) % 3 == 1 for early, late in itertools.pairwise(seen))


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_case_has_one_ceiling_and_distinct_contenders(suite, device_type):
    cases = [case for case in suite.CASES if device_type in case.devices]
    assert len({str(case) for case in cases}) == len(cases) > 0
    assert any(case.quick for case in cases)
    for case in cases:
        contenders = case.contenders(device_type)
        assert [one.role for one in contenders].count("ceiling") == 1
        assert len({one.name for one in contenders}) == len(contenders)
        assert {one.role for one in contenders} <= set(harness.ROLES)
        assert case.moved_bytes > 0


def test_the_eager_formulas_compute_what_the_ops_do():
    from qnkernels import functional as F

    x = torch.randn(24, 40, generator=torch.Generator().manual_seed(random.randrange(2**31)))
    fake_quantize, block_noise = (
        importlib.import_module(f"bench_{name}") for name in ("fake_quantize", "block_noise")
    )
    for axis in (None, 0):
        inputs = fake_quantize.make_inputs((24, 40), torch.float32, torch.float32, axis, CPU, 3)
        common = inputs.x, inputs.scale, inputs.zero_point, 8, axis
        expected = F.fake_quantize(*common, p=1.0)
        for straight_through in (False, True):
            formula = fake_quantize.eager(*common, 1.0, torch.float32, straight_through)
            torch.testing.assert_close(formula, expected, rtol=0, atol=1e-6)
    for kind in ("zero", "mean"):
        assert torch.equal(block_noise.eager(x, kind, 0.0), x)
    torch.testing.assert_close(block_noise.eager(x, "mean", 1.0), F.block_noise(x, 8, 1.0, kind="mean"))
    dropped = block_noise.eager(x, "zero", 0.25)
    kept = dropped.reshape(24, 5, 8).abs().sum(-1) > 0
    assert torch.equal(dropped, (x * (1 / 0.75)) * kept.repeat_interleave(8, 1))


def test_folder_names_are_plain():
    assert environment.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert environment.folder_name("Intel(R) Xeon(R) Processor x2 amx") == "intel-xeon-processor-x2-amx"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("AMD EPYC", "AMD EPYC family 25"),
        ("AMD EPYC 9354 32-Core Processor", "AMD EPYC 9354 32-Core Processor"),
        ("Intel(R) Xeon(R) Processor", "Intel(R) Xeon(R) Processor family 25 model 17"),
        ("Intel(R) Xeon(R) Platinum 8580", "Intel(R) Xeon(R) Platinum 8580"),
    ],
)
def test_a_processor_is_told_from_others_of_its_make(model, name):
    lines = f"processor\t: 0\nvendor_id\t: X\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {model}\n"
    assert environment.processor_name(lines + "\n" + lines) == name
    assert environment.processor_name("") == ""


def test_what_a_run_ran_on_is_complete():
    described = environment.describe(CPU)
    assert tuple(described) == environment.FIELDS
    assert described["threads"] == str(torch.get_num_threads()) and described["torch"] == torch.__version__
    assert described["cuda"] == described["driver"] == ""


def test_a_graph_keeps_what_it_reads(monkeypatch):
    """The inputs that a contender prepared live as long as its sampler: a replay would read freed memory."""
    monkeypatch.setattr(samplers, "_between_events", lambda work: work() or 1e-3)
    monkeypatch.setattr(samplers, "_capture", lambda work: SimpleNamespace(replay=lambda: None))
    prepared = torch.ones(3)
    alive = weakref.ref(prepared)
    sample, *_ = samplers.sampler([partial(torch.neg, prepared)], 1e-3, torch.device("cuda"), capture=True)
    del prepared
    assert sample() > 0 and alive() is not None
    del sample
    assert alive() is None


CUBLAS = "F.linear bf16"


@pytest.mark.parametrize(
    ("op", "name", "least", "peer"),
    [
        ("pq_linear", "batch 1 8192x8192 d=8 K=256 bfloat16", 5.0, CUBLAS),
        ("pq_linear", "batch 16 8192x8192 d=8 K=256 bfloat16", 3.0, CUBLAS),
        ("pq_linear", "batch 256 8192x8192 d=8 K=256 bfloat16", 1.0, CUBLAS),
        ("pq_linear", "batch 4096 8192x8192 d=8 K=256 bfloat16", 0.85, CUBLAS),
        ("int_linear", "weight-only int8 bf16, 8192x8192 batch 1", 1.8, CUBLAS),
        ("int_linear", "weight-only int8 bf16, 8192x8192 batch 16", 1.8, CUBLAS),
        ("int_linear", "weight-only int8 bf16, 8192x8192 batch 4096", 0.95, CUBLAS),
        ("int_linear", "weight-only int4 bf16, 8192x8192 batch 1", 3.0, CUBLAS),
        ("int_linear", "weight-only int4 bf16, 8192x8192 batch 16", 3.0, CUBLAS),
        ("int_linear", "weight-only int4 bf16, 8192x8192 batch 256", 1.0, CUBLAS),
        ("kmeans_step", "step 2097152x8 in 256", 5.0, ""),
        ("kmeans", "5 steps 2097152x8 in 256", 5.0, ""),
        ("block_noise", "zero 8192x8192 float32 block 8 p=0.1", 0.9, "copy_"),
        ("block_noise", "zero 8192x8192 bfloat16 block 8 p=0.1", 0.9, "copy_"),
        ("block_noise", "mean 8192x8192 float32 block 8 p=0.1", 0.9, "copy_"),
        ("block_noise", "mean 8192x8192 bfloat16 block 8 p=0.1", 0.9, "copy_"),
    ],
)
def test_targets_on_a_gpu(op, name, least, peer):
    """How many times as fast as a peer or as the ceiling, whose target is the largest ratio to it."""
    cases = (case for suite in SUITES for case in suite.CASES if "cuda" in case.devices)
    (case,) = (case for case in cases if (case.op, case.name) == (op, name))
    roles = {one.name: one.role for one in case.contenders("cuda")}
    if case.target is not None:
        assert roles[peer] == "ceiling" and 1 / case.target == pytest.approx(least) and not case.peer_target
    else:
        assert case.peer_target == (least, peer)
        assert roles[peer] == "peer" if peer else "peer" in roles.values()
    assert case.quick or "4096" in name or "int4" in name  # a short run judges the rest


def test_targets_on_a_processor_are_relative_to_the_ceiling():
    cases = [case for suite in SUITES for case in suite.CASES if case.devices == ("cpu",)]
    assert any(case.target for case in cases) and not any(case.peer_target for case in cases)
