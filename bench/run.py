"""Run benchmarks and write bench/results/<device>/<op>.csv: `python bench/run.py [op ...] [--brief]`.

Each suite runs in a process of its own under pytest-benchmark, whose allocator keeps memory. A brief run has
all shapes in few rounds, and torch.compile and the reference at the main shapes only. A quick run has the
main shapes only and is shown only, unless --out says where to keep it.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import processes
from environment import ROOT, folder_name
from plot import plot_csv
from report import Row, rows_from_json, table, write_csv

GRACE = 15  # seconds that the last case of a limited run may take
# glibc keeps what is given back, below 32 MiB: results in new memory cost more than to compute them, and
# whether it is new would depend on who ran before.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
BENCH = ROOT / "bench"
RESULTS = BENCH / "results"
SUITES = tuple(sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py")))
# Suites that time ops of other names, too.
SUITE_OPS = {
    "dynamic_fake_quantize": ("moving_fake_quantize_",),
    "fake_quantize": ("fake_quantize_backward",),
    "kmeans": ("kmeans_step",),
    "minmax": ("histogram_range",),
    "pq_decode": ("pq_embedding",),
    "pq_linear": ("pq_linear_backward",),
}


@dataclass
class Outcome:
    suite: str
    rows: list[Row]
    problem: str  # empty, or what the run printed when something failed
    left_out: list[str]  # one line per peer that could not take part


def ops_of(suite: str) -> tuple[str, ...]:
    """The names that a suite stands for; of an op, its own."""
    return suite, *SUITE_OPS.get(suite, ())


def run_suites(
    suites: Sequence[str],
    device: str = "cpu",
    mode: str = "full",
    select: str = "",
    seconds: float | None = None,
) -> Iterator[Outcome]:
    """Run bench_<suite>.py of each in one process; what a suite measured comes as soon as it has ended, also
    if a contender failed.

    A suite that fails beside others, or is lost with the process, is run again by itself: an error on a GPU
    spoils all that follows. mode: one of harness.BUDGETS. `select` is pytest's -k expression. After `seconds`
    no other case is started, and past GRACE the run is stopped; both are lines of left_out and no problem.
    """
    start, again = time.perf_counter(), []
    for outcome in _run_together(suites, device, mode, select, seconds):
        if outcome.problem and len(suites) > 1:
            again.append(outcome)
        else:
            yield outcome
    for outcome in again:
        left = None if seconds is None else seconds - (time.perf_counter() - start)
        if left is None or left > 0:
            yield from _run_together([outcome.suite], device, mode, select, left)
        else:
            yield outcome


def _run_together(
    suites: Sequence[str], device: str, mode: str, select: str, seconds: float | None
) -> Iterator[Outcome]:
    limit = math.inf if seconds is None else seconds + GRACE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = _command(suites, device, mode, select, seconds, folder)
        with (folder / "output.txt").open("w") as output:
            options = dict(cwd=ROOT, env=ALLOCATOR | source_tree_env(), stdout=output)
            process = subprocess.Popen(command, stderr=subprocess.STDOUT, **options)
        waiting, until, running = list(suites), time.perf_counter() + limit, True
        try:
            while running:
                running = not _ended(process) and time.perf_counter() < until
                yield from _recorded(waiting, folder)
        finally:
            code = process.poll()
            processes.end(process)
        yield from _recorded(waiting, folder)  # since the last look
        printed = (folder / "output.txt").read_text(errors="replace")
    for suite in waiting:
        if code is None:
            yield Outcome(suite, [], "", [f"left out for want of time: {suite}"])
        else:  # a crash, or nothing of it was selected
            yield Outcome(suite, [], printed if code else "", [])


def _command(
    suites: Sequence[str], device: str, mode: str, select: str, seconds: float | None, folder: Path
) -> list[str]:
    files = [str(BENCH / f"bench_{suite}.py") for suite in suites]
    command = [sys.executable, "-m", "pytest", *files, f"--device={device}", f"--records={folder}"]
    command += ["-p", "no:cacheprovider", "-rfEs", "--tb=short"]
    command += [f"--{mode}"] * (mode != "full") + (["-k", select] if select else [])
    return command if seconds is None else [*command, f"--seconds={seconds}"]


def _ended(process: subprocess.Popen) -> bool:
    """After a moment's wait."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.5)
    return process.poll() is not None


def _recorded(waiting: list[str], folder: Path) -> Iterator[Outcome]:
    """The suites of `waiting` that have ended, which are taken out of it."""
    for suite in [suite for suite in waiting if (folder / f"{suite}.json").exists()]:
        waiting.remove(suite)
        record = json.loads((folder / f"{suite}.json").read_text())
        yield Outcome(suite, rows_from_json(record), record["problem"], record["left_out"])


def source_tree_env() -> dict[str, str]:
    """The environment for a child that imports qnkernels from the source tree, installed or not.

    It is no worker of pytest-xdist, even if one starts it: pytest-benchmark measures nothing in workers.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    return {**kept, "PYTHONPATH": path}


def keep(outcome: Outcome, out: Path) -> Path:
    """Write the rows of a run under out/<device>/."""
    path = out / folder_name(outcome.rows[0]["device"]) / f"{outcome.suite}.csv"
    write_csv(path, outcome.rows)
    return path


def busy_warning() -> str:
    """One line where other programs use the processor, since timings are then worth little."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"warning: load average {load:.1f} on {cores} cores; timings will be off" if load > 0.5 else ""


def add_modes(parser: argparse.ArgumentParser) -> None:
    """--quick and --brief, as `mode`."""
    group = parser.add_mutually_exclusive_group()
    slow = "torch.compile and the reference at the main shapes only"
    for mode, text in (("quick", "the main shapes"), ("brief", slow)):
        group.add_argument(
            f"--{mode}", dest="mode", action="store_const", const=mode, help=f"few rounds, {text}"
        )
    parser.set_defaults(mode="full")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help=f"suites to run, of {', '.join(SUITES)} (default: all)")
    add_modes(parser)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--out", type=Path, help="folder for the CSVs (default: bench/results, or none for a part)"
    )
    parser.add_argument("-k", dest="select", default="", help="only the benchmarks that match, as in pytest")
    options = parser.parse_args(arguments)
    unknown = [op for op in options.op if op not in SUITES]
    if unknown:
        parser.error(f"op: expected some of {', '.join(SUITES)}, got {unknown[0]}")
    partial = options.mode == "quick" or options.select  # a part of a suite must not replace the whole
    out = options.out or (None if partial else RESULTS)
    if warning := busy_warning():
        print(warning, file=sys.stderr)
    failed = []
    for suite in options.op or SUITES:
        (outcome,) = run_suites([suite], options.device, options.mode, options.select)
        print(table(outcome.rows), *outcome.left_out, sep="\n", flush=True)
        if out is not None and outcome.rows:
            path = keep(outcome, out)
            plot_csv(path)
            print(f"written: {path}", flush=True)
        if outcome.problem:
            failed.append(outcome)
    for outcome in failed:
        print(f"\nFAILED: bench_{outcome.suite}.py\n{outcome.problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
