"""Everything that needs a GPU, in one command:
`python bench/gpu_suite.py [--brief | --quick] [--only OP] [--resume]`.

Runs from the source tree of any machine with an NVIDIA GPU, without network or installation. Builds the
libraries if a compiler is there. Runs the GPU tests, on several processes where pytest-xdist is installed;
beside them, checks the CUDA kernels' memory accesses where compute-sanitizer is installed, and compiles what
the benchmarks will need. Then, on the quiet machine, measures the ceilings, and every benchmark in one more
process, and writes bench/results/<gpu>/ at its end: one CSV and picture per suite, ops.csv (what passed its
tests) and summary.md. Last, it writes which backend serves which op from now on (bench/dispatch.py), unless
--no-dispatch is given. Failures are listed last and make the exit code 1; without a GPU it is 2.

--brief does the same with few rounds, and with torch.compile and the reference at the main shapes only.
--quick takes under 3 minutes once the libraries are built: the main shapes, few rounds, no memory check. What
does not fit, because kernels compile for long, is left out and named; a table of a longer run is not
replaced, and no backend is chosen from so few figures.
"""

import argparse
import datetime
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path[:0] = [str(ROOT), str(BENCH)]

import torch  # noqa: E402  (after the source tree is on the path)

import dispatch  # noqa: E402
import environment  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import summary  # noqa: E402
import warm  # noqa: E402

NO_TESTS = 5  # pytest's exit code
MEMORY_ERROR = 99  # the exit code asked of compute-sanitizer
QUICK_SECONDS = 155  # of tests and benchmarks, but for run.GRACE
QUICK_TESTS = 80  # of which for the tests, at most
# Suites that time ops of other names, too.
SUITE_OPS = {
    "dynamic_fake_quantize": ("moving_fake_quantize_",),
    "fake_quantize": ("fake_quantize_backward",),
    "kmeans": ("kmeans_step",),
    "minmax": ("histogram_range",),
    "pq_decode": ("pq_embedding",),
    "pq_linear": ("pq_linear_backward",),
}


class Log:
    """Steps with their times, and the failures for the end."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.failures: list[tuple[str, str]] = []

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:5.0f} s] {text}", flush=True)

    def fail(self, step: str, output: str) -> None:
        self.say(f"{step}: FAILED")
        self.failures.append((step, output))


def build(log: Log) -> None:
    """The libraries, in place. Without CMake or a compiler Triton serves every op, and that is said."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode == 0:
        log.say("built the native libraries")
        return
    output = result.stdout + result.stderr
    reason = (output.strip().splitlines() or ["no output"])[-1]
    if reason.startswith("qnkernels needs"):  # a tool is missing, which setup.py says in one line
        log.say(f"not built, Triton serves every op: {reason}")
    else:
        log.fail("build", output)


def gpu_tests(only: str | None, *options: str) -> tuple[list[str], dict[str, str]]:
    """pytest on tests/gpu, and its environment: on several workers where pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--tb=short", "-p", "no:cacheprovider", *options]
    command += ["-k", only] if only else []
    workers = (os.cpu_count() or 1) - 2
    if workers < 2 or find_spec("xdist") is None:
        return command, run.source_tree_env()
    command += ["-n", str(workers), "--dist=worksteal"]
    return command, {**run.source_tree_env(), "OMP_NUM_THREADS": "1"}


def run_tests(log: Log, only: str | None, folder: Path, device: str, seconds: float | None = None) -> None:
    """The tests marked gpu; what passed goes to ops.csv. Stopped where they take longer than `seconds`."""
    with tempfile.TemporaryDirectory() as temporary:
        junit = Path(temporary) / "junit.xml"
        reported = f"--junitxml={junit}", "-o", "junit_family=xunit1"
        command, env = gpu_tests(only, "-m", "gpu", f"--gpu-device={device}", *reported)
        options = dict(cwd=ROOT, env=env, capture_output=True, text=True)
        try:
            result = subprocess.run(command, timeout=seconds, **options)
        except subprocess.TimeoutExpired:
            return log.say(f"tests: stopped after {seconds:.0f} s, NOT all of them have run; see --quick")
        output = result.stdout + result.stderr
        rows = tested_ops(junit) if junit.exists() else []
    log.say(f"tests: {output.strip().splitlines()[-1] if output.strip() else 'no output'}")
    nothing_selected = only is not None and result.returncode == NO_TESTS
    if result.returncode and not nothing_selected:
        log.fail("tests", output)
    if rows and device == "cuda":
        facts = environment.describe(torch.device(device))
        kept = {name: facts[name] for name in ("device", "commit", "date")}
        summary.update_tested(folder, [{**row, **kept} for row in rows])


def check_memory(log: Log, only: str | None) -> None:
    """The tests of the ops of the CUDA backend once more, but for the largest, under compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return log.say("memory not checked: compute-sanitizer is not installed")
    checked = [sanitizer, "--tool=memcheck", "--target-processes=all", f"--error-exitcode={MEMORY_ERROR}"]
    command, env = gpu_tests(only, "-m", "gpu and of and not large", "--gpu-backend=cuda", "-x")
    result = subprocess.run([*checked, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    output = result.stdout + result.stderr
    found = re.search("ERROR SUMMARY: [1-9]", output)  # in a worker, too
    if result.returncode in (0, NO_TESTS) and not found:
        return log.say("memory: no errors in the CUDA kernels")
    log.fail("memory check", output)


def tested_ops(junit: Path) -> list[dict]:
    """Passed and failed tests per (op, backend), from the properties that the tests record."""
    counts: dict[tuple[str, str], list[int]] = {}
    for test in ElementTree.parse(junit).iter("testcase"):
        properties = {one.get("name"): one.get("value") for one in test.iter("property")}
        if "op" not in properties or test.find("skipped") is not None:
            continue
        failed = test.find("failure") is not None or test.find("error") is not None
        counts.setdefault((properties["op"], properties["backend"]), [0, 0])[failed] += 1
    return [
        {"op": op, "backend": backend, "passed": passed, "failed": failed}
        for (op, backend), (passed, failed) in sorted(counts.items())
    ]


def is_measured(suite: str, folder: Path, device: str, mode: str) -> bool:
    """Whether the suite's table has all of the cases of such a run and, for a full one, more rounds than the
    others take."""
    path = folder / f"{suite}.csv"
    rows = report.read_csv(path) if path.exists() else []
    cases = harness.chosen(importlib.import_module(f"bench_{suite}").CASES, device, mode)
    if mode == "full" and not any(int(row["rounds"]) > harness.QUICK[device].rounds for row in rows):
        return False
    return {case.name for case in cases} <= {row["case"] for row in rows}


def is_current(suite: str, folder: Path) -> bool:
    """Whether the suite's table is of the commit that the source tree is at."""
    path = folder / f"{suite}.csv"
    rows = report.read_csv(path) if path.exists() else []
    return bool(rows) and {row["commit"] for row in rows} == {environment.commit()}


def wanted_suites(
    log: Log, only: str | None, mode: str, resume: bool, folder: Path, device: str
) -> list[str]:
    """The ceilings, always, and the suites that time the op `only`; with `resume`, those not measured yet."""
    found = []
    for suite in run.SUITES:
        if only and suite != "ceilings" and only not in (suite, *SUITE_OPS.get(suite, ())):
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
            log.say(f"left out for want of time: {', '.join(group)}")
            continue
        log.say(f"measuring {', '.join(group)}")
        for outcome in run.run_suites(group, device, mode, seconds=left):
            keep(log, outcome, mode, results, folder, device)


def keep(log: Log, outcome: run.Outcome, mode: str, results: Path, folder: Path, device: str) -> None:
    """Write and show what a suite measured."""
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    run.add_modes(parser)
    parser.add_argument("--only", metavar="OP", help="tests and benchmarks of one op")
    parser.add_argument("--resume", action="store_true", help="leave out suites measured at this commit")
    parser.add_argument("--no-dispatch", action="store_true", help="leave the choice of backends as it is")
    parser.add_argument("--no-build", action="store_true", help="use the libraries as they are")
    parser.add_argument(
        "--summary-only", action="store_true", help="write the summaries from the CSVs there are"
    )
    parser.add_argument("--out", type=Path, default=run.RESULTS, help="default: bench/results")
    # a dry run of the whole chain without a GPU; its figures are those of the processor
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.summary_only:
        print(*summary.write_summaries(options.out), sep="\n")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite needs an NVIDIA GPU that torch can use, and torch finds none here.", file=sys.stderr)
        return 2
    log = Log()
    device = torch.device(options.device)
    folder = options.out / environment.folder_name(environment.device_name(device))
    log.say(f"{environment.device_name(device)}, torch {torch.__version__}, {datetime.date.today()}")
    if not options.no_build:
        build(log)
    quick, on_gpu, start = options.mode == "quick", options.device == "cuda", time.perf_counter()
    suites = wanted_suites(log, options.only, options.mode, options.resume, folder, options.device)
    limit, until = (QUICK_TESTS, start + QUICK_SECONDS) if quick else (None, None)
    with ThreadPoolExecutor() as beside:
        steps = [
            beside.submit(run_tests, log, options.only, folder, options.device, limit),
            beside.submit(warm.warm_suites, suites, options.device, options.mode, limit),
        ]
        steps += [beside.submit(check_memory, log, options.only)] if on_gpu and not quick else []
    for step in steps:
        step.result()  # raises what went wrong here
    run_benchmarks(log, suites, options.mode, options.out, folder, options.device, until)
    for path in summary.write_summaries(options.out, folder if quick else None):
        log.say(f"wrote {path}")
    if on_gpu and not quick and not options.no_dispatch:
        print(*dispatch.install(folder), sep="\n", flush=True)
    for step, output in log.failures:
        print(f"\n=== FAILED: {step}\n{output}", file=sys.stderr)
    if log.failures:
        print(f"\nfailed: {', '.join(step for step, _ in log.failures)}", file=sys.stderr)
    return 1 if log.failures else 0


if __name__ == "__main__":
    sys.exit(main())
