"""The whole suite runs side by side where pytest-xdist is installed: one worker per core, the longest first.

A part of it (paths, -k, -m, --lf), a run under a debugger or with -s, and one with -n run as they say.
"""

import os
import shutil
import tempfile

import pytest

# More would only wait for the longest tests.
MOST_WORKERS = 8
# In this order, longest first, before all others: a long test that starts last leaves the other cores idle.
LONGEST = (
    "backends/test_triton_compile.py::test_every_kernel_compiles_without_spills",
    *(
        f"backends/test_triton.py::test_interpreted[{name}]"
        for name in ("int_linear_quantized", "pq", "int_linear", "dynamic", "block_noise", "division")
    ),
    "backends/test_triton.py::test_interpreted",
    "native/test_cpu_instruction_sets.py",
    "recipes/",
    "cli/test_cli_demo.py",
    "bench/test_bench_report.py::test_suites_of_one_process_are_told_apart",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """-n and --dist of the whole suite, before pytest-xdist reads them."""
    options = config.option
    if getattr(options, "numprocesses", 0) is not None or hasattr(config, "workerinput"):
        return  # no pytest-xdist, a given number, or a worker
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    part = options.keyword or options.markexpr or getattr(options, "lf", False)
    alone = options.usepdb or options.capture == "no"
    given = options.dist != "no" or options.tx or options.distload
    workers = min(_cores(), MOST_WORKERS)
    if whole and not (part or alone or given) and workers > 1:
        options.numprocesses, options.dist = workers, "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """What workers inherit from the process that starts them."""
    workers = len(getattr(config.option, "tx", None) or ())
    if workers == 0 or hasattr(config, "workerinput"):
        return
    # Two threads at least, so that kernels divide their work. Threads that spin while they wait would take
    # the cores from other workers: three times as long with two of them on two cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(_cores() // workers, 2)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    folder = os.environ["QNKERNELS_EMULATED"] = tempfile.mkdtemp(prefix="emulated-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    """Where the test stands in LONGEST, or past its end."""
    name = item.nodeid.removeprefix("tests/")
    return next((i for i, start in enumerate(LONGEST) if name.startswith(start)), len(LONGEST))


def _cores() -> int:
    return len(os.sched_getaffinity(0))
