"""The suite's pytest plumbing: options, one test per (case, contender), interleaved samples into `benchmark`.

A bench file holds `CASES` and one test that takes `timed`. The first test of a case measures all its
contenders in turns; each test then replays the samples of its own contender through a clock that shows the
measured time, so that pytest-benchmark's tables, JSON and comparisons work on interleaved figures.
"""

import math
import time
from pathlib import Path

import pytest
import torch

import environment
from harness import BUDGETS, Case, Contender, Measurement, chosen, measure
from records import Records, not_installed


class MeasuredClock:
    """A clock that moves only by measured time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = MeasuredClock()
START = time.perf_counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qnkernels benchmarks")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    for mode, text in (
        ("quick", "the main shapes only, few rounds"),
        ("brief", "all shapes, few rounds, torch.compile and the reference at the main shapes only"),
    ):
        group.addoption(
            f"--{mode}", dest="bench_mode", action="store_const", const=mode, default="full", help=text
        )
    group.addoption("--seconds", type=float, default=math.inf, help="after so many, start no other case")
    group.addoption(
        "--records", type=Path, help="folder for <suite>.json, written as soon as a suite has ended"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device here")
    if folder := config.getoption("--records"):
        facts = environment.describe(torch.device(config.getoption("--device")))
        config.pluginmanager.register(Records(folder, facts), "records")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "timed" not in metafunc.fixturenames:
        return
    device, mode = metafunc.config.getoption("--device"), metafunc.config.getoption("bench_mode")
    params = [
        pytest.param(
            (case, contender),
            id=f"{case.name}-{contender.name}",
            marks=pytest.mark.benchmark(group=str(case), timer=CLOCK),
        )
        for case in chosen(metafunc.module.CASES, device, mode)
        for contender in case.contenders(device)
    ]
    metafunc.parametrize("timed", params, indirect=True)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """For a JSON of pytest-benchmark's own (--benchmark-json)."""
    machine_info["measured_on"] = environment.describe(torch.device(config.getoption("--device")))


def pytest_terminal_summary(terminalreporter) -> None:
    items = {item.path: item for item in getattr(terminalreporter.config, "bench_items", ())}
    for item in items.values():
        for line in not_installed(item):
            terminalreporter.write_line(line)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.bench_items = session.items


@pytest.fixture(scope="session")
def measurements() -> dict[str, Measurement]:
    return {}


@pytest.fixture
def timed(
    request: pytest.FixtureRequest, benchmark, measurements: dict[str, Measurement]
) -> tuple[Case, Contender, Measurement]:
    """Measure the case if no test has yet, and hand the contender's samples to `benchmark`."""
    case, contender = request.param
    device, suite = request.config.getoption("--device"), request.path.stem
    if str(case) not in measurements:
        measurements.clear()  # one case's tensors at a time
        if time.perf_counter() - START > request.config.getoption("--seconds"):
            benchmark.skipped = True
            pytest.skip(f"{suite}: for want of time")
        budget = BUDGETS[request.config.getoption("bench_mode")][device]
        measurements[str(case)] = measure(case, torch.device(device), budget)
    measurement = measurements[str(case)]
    if contender.name in measurement.failures:
        benchmark.skipped = True
        why = f"{suite}: {contender.name} on {case}: {measurement.failures[contender.name]}"
        pytest.skip(why) if contender.role == "peer" else pytest.fail(why, pytrace=False)
    _replay(benchmark, measurement.samples[contender.name].seconds)
    benchmark.extra_info.update(_facts(case, contender, measurement))
    if records := request.config.pluginmanager.get_plugin("records"):
        records.add(benchmark)
    return case, contender, measurement


def _replay(benchmark, seconds: list[float]) -> None:
    remaining = iter(seconds)

    def advance() -> None:
        CLOCK.now += next(remaining)

    benchmark.pedantic(advance, rounds=len(seconds))


def _facts(case: Case, contender: Contender, measurement: Measurement) -> dict[str, object]:
    samples = measurement.samples[contender.name]
    ours = contender.role == "ours"
    return {
        "op": case.op,
        "case": case.name,
        "shape": case.shape,
        "size": case.size,
        "dtype": case.dtype,
        "contender": contender.name,
        "role": contender.role,
        "timer": samples.timer,
        "calls": samples.calls,
        "moved_bytes": case.moved_bytes,
        "operations": case.operations,
        "ceiling": measurement.ceiling,
        "ratio_to_ceiling": measurement.ratio(contender.name, measurement.ceiling),
        **(case.targets() if ours else dict.fromkeys(case.targets())),
        "other_load": round(measurement.other_load, 3),
        "medians": {name: measurement.median(name) for name in measurement.samples},
    }
