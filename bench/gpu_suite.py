"""Everything that needs a GPU, in one command:
`python bench/gpu_suite.py [--brief | --quick] [--only OP] [--resume]`.

Runs from the source tree of any machine with an NVIDIA GPU, without network or installation. Builds the
libraries if they are older than their sources; without a library of the CUDA kernels the run goes on and has
failed. Runs the GPU tests, on several processes where pytest-xdist is installed; beside them, checks the CUDA
kernels' memory accesses where compute-sanitizer is installed, and compiles what the benchmarks will need.
Then, on the quiet machine, measures the ceilings, and every benchmark in one more process, and writes
bench/results/<gpu>/: the CSV of each suite as soon as it is measured, ops.csv (what passed its tests),
passed.json (which steps passed at which commit), and at the end pictures and summary.md. It then writes which
backend serves which op from now on (bench/dispatch.py), unless --no-dispatch is given. What is incomplete and
what failed comes last; failures make the exit code 1, and without a GPU it is 2.

--resume goes on after an interruption: it leaves out the suites measured, and the tests and memory check
passed, at the commit that the source tree is at, if no file differs from it.
--brief does the same with few rounds, and with torch.compile and the reference at the main shapes only.
--quick has the main shapes, few rounds, no memory check, and takes under 3 minutes AFTER the libraries are
built: they are built first where they are not current, however long that takes. What does not fit, because
kernels compile for long, is left out and named; a table of a longer run is not replaced, and no backend is
chosen from so few figures.

Peers that are not installed are left out and named. All of them, where there is a network:
`pip install -e ".[test,bench]" bitsandbytes gemlite flash-kmeans`. The last three, which take part on a GPU
only, are not in the extra `bench`.
"""

import argparse
import datetime
import importlib
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path[:0] = [str(ROOT), str(BENCH)]

import torch  # noqa: E402  (after the source tree is on the path)

import commits  # noqa: E402
import dispatch  # noqa: E402
import environment  # noqa: E402
import gpu_checks  # noqa: E402
import harness  # noqa: E402
import libraries  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import summary  # noqa: E402
import warm  # noqa: E402
from log import Log  # noqa: E402
from qnkernels.ops import OPS  # noqa: E402

NAMES = tuple(sorted({*run.SUITES, *OPS}))  # for --only
QUICK_SECONDS = 155  # of tests and benchmarks, but for run.GRACE
QUICK_TESTS = 80  # of which for the tests, at most


def is_measured(suite: str, folder: Path, device: str, mode: str) -> bool:
    """Whether the suite's table has all of the cases of such a run, through each backend that there is, and,
    for a full one, more rounds than the others take."""
    path = folder / f"{suite}.csv"
    rows = report.read_csv(path) if path.exists() else []
    cases = harness.chosen(importlib.import_module(f"bench_{suite}").CASES, device, mode)
    if mode == "full" and not any(int(row["rounds"]) > harness.QUICK[device].rounds for row in rows):
        return False
    wanted = {
        (case.name, one.name) for case in cases for one in case.contenders(device) if one.role == "ours"
    }
    known = {(row["case"], row["contender"]) for row in rows}
    return wanted <= known and {case.name for case in cases} <= {name for name, _ in known}


def is_current(suite: str, folder: Path) -> bool:
    """Whether the suite's table is of the commit that the source tree is at, without changes since."""
    path, now = folder / f"{suite}.csv", environment.commit()
    rows = report.read_csv(path) if path.exists() else []
    return commits.is_exact(now) and bool(rows) and {row["commit"] for row in rows} == {now}


def wanted_suites(
    log: Log, only: str | None, mode: str, resume: bool, folder: Path, device: str
) -> list[str]:
    """The ceilings, always, and the suites that time the op `only`; with `resume`, those not measured yet."""
    found = []
    for suite in run.SUITES:
        if only and suite != "ceilings" and only not in run.ops_of(suite):
            continue
        if resume and is_current(suite, folder) and is_measured(suite, folder, device, mode):
            log.say(f"{suite}: measured at this commit already")
        else:
            found.append(suite)
    return found


def run_benchmarks(
    log: Log,
    suites: Sequence[str],
    mode: str,
    results: Path,
    folder: Path,
    device: str,
    until: float | None = None,
) -> None:
    """The ceilings first, the others in one process. No case starts after `until`, on the clock of
    time.perf_counter."""
    ceilings = [suite for suite in suites if suite == "ceilings"]
    for group in (ceilings, [suite for suite in suites if suite not in ceilings]):
        left = None if until is None else until - time.perf_counter()
        if not group:
            continue
        if left is not None and left <= 0:
            log.lack(f"left out for want of time: {', '.join(group)}")
            continue
        log.say(f"measuring {', '.join(group)}")
        for outcome in run.run_suites(group, device, mode, seconds=left):
            keep(log, outcome, mode, results, folder, device)


def keep(log: Log, outcome: run.Outcome, mode: str, results: Path, folder: Path, device: str) -> None:
    """Write and show what a suite measured, while the next one is: pictures take time and come at the end."""
    suite, count = outcome.suite, len(outcome.rows)
    if outcome.rows:
        if mode == "quick" and is_measured(suite, folder, device, "brief"):
            log.say(f"{suite}: {count} rows, shown only: the table there is of a longer run")
        else:
            path = run.keep(outcome, results)
            log.say(f"{suite}: {count} rows in {path.relative_to(results)}")
        print(run.table(outcome.rows), flush=True)
    print(*outcome.left_out, sep="\n", end="\n" * bool(outcome.left_out), flush=True)
    if outcome.problem or not (outcome.rows or outcome.left_out):
        log.fail(f"bench_{suite}.py", outcome.problem or "no contender ran")


def draw(folder: Path) -> None:
    """The pictures that are older than their tables."""
    for path in folder.glob("*.csv"):
        picture = path.with_suffix(".png")
        current = picture.exists() and picture.stat().st_mtime >= path.stat().st_mtime
        if path.name != summary.TESTED and not current:
            plot.plot_csv(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run.add_modes(parser)
    parser.add_argument("--only", metavar="OP", help="tests and benchmarks of one op or suite")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what was measured or passed at this commit"
    )
    parser.add_argument("--no-dispatch", action="store_true", help="leave the choice of backends as it is")
    parser.add_argument("--no-build", action="store_true", help="use the libraries as they are")
    parser.add_argument(
        "--summary-only", action="store_true", help="write the summaries from the CSVs there are"
    )
    parser.add_argument("--out", type=Path, default=run.RESULTS, help="default: bench/results")
    # a dry run of the whole chain without a GPU; its figures are those of the processor
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only is not None and options.only not in NAMES:
        parser.error(f"--only: expected one of {', '.join(NAMES)}, got {options.only!r}")
    return options


def check_and_warm(log: Log, options: argparse.Namespace, suites: Sequence[str], folder: Path) -> None:
    """What does not need the machine for itself, side by side."""
    quick, only, resume = options.mode == "quick", options.only, options.resume
    limit = QUICK_TESTS if quick else None
    with ThreadPoolExecutor() as beside:
        steps = [
            beside.submit(gpu_checks.run_tests, log, only, folder, options.device, limit, resume),
            beside.submit(warm.warm_suites, suites, options.device, options.mode, limit),
        ]
        if options.device == "cuda" and not quick:
            steps.append(beside.submit(gpu_checks.check_memory, log, only, folder, resume))
    for step in steps:
        step.result()  # raises what went wrong here


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.summary_only:
        print(*summary.write_summaries(options.out), sep="\n")
        return 0
    on_gpu, quick = options.device == "cuda", options.mode == "quick"
    if on_gpu and not torch.cuda.is_available():
        print("gpu_suite needs an NVIDIA GPU that torch can use, and torch finds none here.", file=sys.stderr)
        return 2
    log, device = Log(), torch.device(options.device)
    folder = options.out / environment.folder_name(environment.device_name(device))
    log.say(f"{environment.device_name(device)}, torch {torch.__version__}, {datetime.date.today()}")
    libraries.prepare(log, not options.no_build, on_gpu)
    until = time.perf_counter() + QUICK_SECONDS if quick else None
    suites = wanted_suites(log, options.only, options.mode, options.resume, folder, options.device)
    check_and_warm(log, options, suites, folder)
    run_benchmarks(log, suites, options.mode, options.out, folder, options.device, until)
    draw(folder)
    for path in summary.write_summaries(options.out, folder if quick else None):
        log.say(f"wrote {path}")
    if on_gpu and not quick and not options.no_dispatch:
        print(*dispatch.install(folder), sep="\n", flush=True)
    return log.close()


if __name__ == "__main__":
    sys.exit(main())
