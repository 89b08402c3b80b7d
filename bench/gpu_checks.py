"""The GPU tests and the memory check of bench/gpu_suite.py, and which of them passed at which commit."""

import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch

import commits
import environment
import gpu_pytest
import libraries
import run
import summary
from log import Log
from processes import Finished, finish
from qnkernels.backends.cuda import unserved_capability
from qnkernels.backends.native import CUDA_ARGTYPES
from qnkernels.ops import OPS
from report import replace_file

TESTS_FAILED, NO_TESTS = 1, 5  # pytest's exit codes
MEMORY_ERROR = 99  # the exit code asked of compute-sanitizer
MEMORY_SECONDS = 1800  # some hundred tests of small shapes, each many times slower than without the tool
NOTING = threading.Lock()  # tests and memory check run side by side


def run_tests(
    log: Log, only: str | None, folder: Path, device: str, seconds: float | None = None, resume: bool = False
) -> None:
    """The tests marked gpu; what passed goes to ops.csv. Stopped where they take longer than `seconds`."""
    if resume and passed_before(log, "tests", only, folder):
        return
    result, tests = run_logged([], only, ["-m", "gpu", f"--gpu-device={device}"], seconds)
    log.say(f"tests: {last_line(result)}")
    count = sum(not test["failed"] for test in tests.values())
    if result.code is None:
        log.lack(
            f"tests: stopped after {seconds:.0f} s, {count} passed, NOT all of them have run; see --quick"
        )
        failed = [name for name, test in tests.items() if test["failed"]]
        if failed:
            log.fail("tests", "\n".join(failed))
    elif result.code == NO_TESTS and only is not None and only not in OPS:
        log.say(f"tests: there are none for {only}")
    elif result.code:
        log.fail("tests", result.output)
    if device == "cuda":
        wanted = [row for row in gpu_pytest.by_op(tests) if only is None or row["op"] in run.ops_of(only)]
        keep_tested(folder, wanted, whole=result.code in (0, TESTS_FAILED))
        if result.code == 0 and libraries.is_complete():
            note_passed(folder, "tests", only, count)


def check_memory(log: Log, only: str | None, folder: Path, resume: bool = False) -> None:
    """The tests of the ops of the CUDA backend once more, but for the largest, under compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return log.say("memory not checked: compute-sanitizer is not installed")
    if unserved_capability() is not None:
        return log.say("memory not checked: no kernel in CUDA C++ is for this GPU")
    if resume and passed_before(log, "memory check", only, folder):
        return
    checked = [sanitizer, "--tool=memcheck", "--target-processes=all", f"--error-exitcode={MEMORY_ERROR}"]
    selected = ["-m", "gpu and of and not large", "--gpu-backend=cuda", "-x"]
    result, tests = run_logged(checked, only, selected, MEMORY_SECONDS)
    found = re.search("ERROR SUMMARY: [1-9]", result.output)  # in a worker, too
    if result.code is None:
        count = f"{len(tests)} tests had ended"
        return log.fail("memory check", f"{result.output}\nstopped after {MEMORY_SECONDS} s, {count}")
    if found or result.code not in (0, NO_TESTS):
        return log.fail("memory check", result.output)
    if tests:
        log.say(f"memory: no errors in {len(tests)} tests of the CUDA kernels")
        return note_passed(folder, "memory check", only, len(tests))
    if only is not None and not set(run.ops_of(only)) & set(CUDA_ARGTYPES):
        return log.say(f"memory: the cuda backend has no {only}")
    log.fail("memory check", f"{result.output}\nno test of the cuda backend ran: nothing was checked")


def run_logged(
    before: list[str], only: str | None, selected: list[str], seconds: float | None
) -> tuple[Finished, dict[str, dict]]:
    """pytest on tests/gpu behind the command `before`, and the tests that ended, as gpu_pytest has them."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "outcomes"
        command, env = gpu_tests(only, *selected, "-p", "gpu_pytest", f"--outcome-log={path}")
        result = finish([*before, *command], seconds, cwd=run.ROOT, env=env)
        return result, gpu_pytest.read(path)


def gpu_tests(only: str | None, *options: str) -> tuple[list[str], dict[str, str]]:
    """pytest on tests/gpu, and its environment: on several workers where pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--tb=short", "-p", "no:cacheprovider", *options]
    command += [f"--ops={','.join(run.ops_of(only))}"] if only else []
    env = run.source_tree_env()
    env["PYTHONPATH"] = f"{run.BENCH}{os.pathsep}{env['PYTHONPATH']}"  # of the plugin
    workers = (os.cpu_count() or 1) - 2
    if workers < 2 or find_spec("xdist") is None:
        return command, env
    return [*command, "-n", str(workers), "--dist=worksteal"], {**env, "OMP_NUM_THREADS": "1"}


def last_line(result: Finished) -> str:
    return (result.output.strip().splitlines() or ["no output"])[-1]


def keep_tested(folder: Path, rows: Iterable[dict], whole: bool) -> None:
    """Into ops.csv. A run that was stopped does not replace more passed tests of the same commit."""
    facts = environment.describe(torch.device("cuda"))
    known = {(row["op"], row["backend"]): row for row in summary.tested(folder)}
    kept = {name: facts[name] for name in ("device", "commit", "date")}
    rows = [{**row, **kept} for row in rows]
    if not whole:
        rows = [row for row in rows if not says_more(known.get((row["op"], row["backend"])), row)]
    if rows:
        summary.update_tested(folder, rows)


def says_more(old: dict[str, str] | None, new: dict) -> bool:
    """Whether an earlier row of the commit counts more tests than one without failures."""
    same = old is not None and old["commit"] == new["commit"] and not new["failed"]
    return same and int(old["passed"]) >= new["passed"]


def note_passed(folder: Path, step: str, only: str | None, count: int) -> None:
    """That a step passed: with --resume it is not run again at this commit."""
    facts = environment.describe(torch.device("cuda"))
    entry = {"commit": commit(), "date": facts["date"], "tests": count}
    with NOTING:
        entries = {**summary.passed_steps(folder), f"{step}{f' of {only}' if only else ''}": entry}
        text = json.dumps(entries, indent=2, sort_keys=True)
        replace_file(folder / summary.PASSED, f"{text}\n")


def passed_before(log: Log, step: str, only: str | None, folder: Path) -> bool:
    """Whether the step passed at the commit that the source tree is at, for all ops or for this one."""
    now, entries = commit(), summary.passed_steps(folder)
    for name in (step, f"{step} of {only}"):
        entry = entries.get(name)
        if entry and commits.is_exact(now) and entry["commit"] == now:
            log.say(f"{step}: {entry['tests']} passed at this commit already")
            return True
    return False


def commit() -> str:
    """As environment.commit, which does not look at the tests."""
    now = environment.commit()
    return f"{now}+" if commits.is_exact(now) and commits.differs("tests/gpu") else now
