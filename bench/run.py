"""Run benchmarks and write bench/results/<device>/<op>.csv: `python bench/run.py [op ...] [--quick]`.

Each suite runs in a process of its own under pytest-benchmark. A quick run covers the main shapes with fewer
rounds and is shown only, unless --out says where to keep it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from environment import ROOT, folder_name
from plot import plot_csv
from report import Row, rows_from_json, table, write_csv

BENCH = ROOT / "bench"
RESULTS = BENCH / "results"
SUITES = tuple(sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py")))


@dataclass
class Outcome:
    suite: str
    rows: list[Row]
    problem: str  # empty, or what the run printed when something failed
    left_out: list[str]  # one line per peer that could not take part


def run_suite(
    suite: str, device: str = "cpu", quick: bool = False, select: str = "", seconds: float | None = None
) -> Outcome:
    """Run bench_<suite>.py; rows hold whatever was measured, also when some contender failed.

    `select` is pytest's -k expression. A run that is not done in `seconds` is stopped and has no rows; that
    is a line of left_out and no problem.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", str(BENCH / f"bench_{suite}.py"), f"--device={device}"]
        command += [f"--benchmark-json={path}", "-p", "no:cacheprovider", "-rs", "--tb=short"]
        command += ["--quick"] * quick + (["-k", select] if select else [])
        options = dict(cwd=ROOT, env=source_tree_env(), capture_output=True, text=True)
        try:
            result = subprocess.run(command, timeout=seconds, **options)
        except subprocess.TimeoutExpired:
            return Outcome(suite, [], "", [f"left out for want of time: {suite}"])
        rows = rows_from_json(path) if path.exists() and path.stat().st_size else []
    output = result.stdout + result.stderr
    left_out = [line for line in output.splitlines() if line.startswith(("SKIPPED", "left out"))]
    return Outcome(suite, rows, output if result.returncode else "", left_out)


def source_tree_env() -> dict[str, str]:
    """The environment for a child that imports qnkernels from the source tree, installed or not."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def keep(outcome: Outcome, out: Path) -> Path:
    """Write the rows of a run, and their plot, under out/<device>/."""
    path = out / folder_name(outcome.rows[0]["device"]) / f"{outcome.suite}.csv"
    write_csv(path, outcome.rows)
    plot_csv(path)
    return path


def busy_warning() -> str:
    """One line where other programs use the processor, since timings are then worth little."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"warning: load average {load:.1f} on {cores} cores; timings will be off" if load > 0.5 else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help=f"suites to run, of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="the main shapes, fewer rounds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--out", type=Path, help="folder for the CSVs (default: bench/results, or none for a part)"
    )
    parser.add_argument("-k", dest="select", default="", help="only the benchmarks that match, as in pytest")
    options = parser.parse_args(arguments)
    unknown = [op for op in options.op if op not in SUITES]
    if unknown:
        parser.error(f"op: expected some of {', '.join(SUITES)}, got {unknown[0]}")
    partial = options.quick or options.select  # a part of a suite must not replace the whole
    out = options.out or (None if partial else RESULTS)
    if warning := busy_warning():
        print(warning, file=sys.stderr)
    failed = []
    for suite in options.op or SUITES:
        outcome = run_suite(suite, options.device, options.quick, options.select)
        print(table(outcome.rows), *outcome.left_out, sep="\n", flush=True)
        if out is not None and outcome.rows:
            print(f"written: {keep(outcome, out)}", flush=True)
        if outcome.problem:
            failed.append(outcome)
    for outcome in failed:
        print(f"\nFAILED: bench_{outcome.suite}.py\n{outcome.problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
