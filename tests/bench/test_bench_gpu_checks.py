"""bench/gpu_checks.py and its pytest plugin without a GPU."""

import json
import subprocess
import sys

import pytest
from helpers_bench import ON_GPU

import environment
import gpu_checks
import gpu_pytest
import run
import summary
from log import Log
from processes import Finished

STEPS = {"tests": gpu_checks.run_tests, "memory check": gpu_checks.check_memory}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(environment, "describe", lambda device: dict(ON_GPU))
    monkeypatch.setattr(environment, "commit", lambda: "abc1234")
    monkeypatch.setattr(gpu_checks.commits, "differs", lambda *paths: False)
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_checks.libraries, "refusal", lambda: "")


@pytest.fixture
def commands(monkeypatch):
    """What was run; its result is `commands.result`, and `commands.tests` are the outcomes it logged."""

    class Commands(list):
        result = Finished(0, "2 passed\n")
        tests = (("a", False), ("b", False))

    found = Commands()

    def pretend(command, seconds=None, **options):
        found.append(command)
        (path,) = (one.partition("=")[2] for one in command if one.startswith("--outcome-log="))
        with open(path, "w") as file:
            for name, failed in found.tests:
                line = {"test": name, "failed": failed, "op": "minmax", "backend": "triton"}
                file.write(json.dumps(line) + "\n")
        return found.result

    monkeypatch.setattr(gpu_checks, "finish", pretend)
    return found


def counted(folder) -> dict[str, tuple[str, str, str]]:
    return {row["op"]: (row["passed"], row["failed"], row["commit"]) for row in summary.tested(folder)}


def test_what_passed_is_counted_and_noted(commands, tmp_path):
    log = Log()
    gpu_checks.run_tests(log, None, tmp_path, "cuda")
    assert not log.failures and counted(tmp_path) == {"minmax": ("2", "0", "abc1234")}
    assert summary.passed_steps(tmp_path)["tests"]["tests"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [summary.TESTED, summary.PASSED]


def test_failed_tests_are_a_failure_and_not_noted(commands, tmp_path):
    commands.result, commands.tests = Finished(1, "1 failed\n"), (("a", False), ("b", True))
    log = Log()
    gpu_checks.run_tests(log, None, tmp_path, "cuda")
    assert log.failures == [("tests", "1 failed\n")] and counted(tmp_path) == {
        "minmax": ("1", "1", "abc1234")
    }
    assert summary.passed_steps(tmp_path) == {}


def test_tests_that_take_too_long_are_told_at_the_end_and_what_passed_is_kept(commands, tmp_path, capsys):
    commands.result = Finished(None, "..")
    log = Log()
    gpu_checks.run_tests(log, None, tmp_path, "cuda", 80)
    assert counted(tmp_path) == {"minmax": ("2", "0", "abc1234")} and summary.passed_steps(tmp_path) == {}
    capsys.readouterr()
    assert log.close() == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("incomplete: tests: stopped after 80 s, 2 passed, NOT all of them have run")


def test_failures_before_the_stop_are_failures(commands, tmp_path, capsys):
    commands.result, commands.tests = Finished(None, ""), (("a", False), ("test_b", True))
    log = Log()
    gpu_checks.run_tests(log, None, tmp_path, "cuda", 80)
    assert log.failures == [("tests", "test_b")] and log.close() == 1
    assert capsys.readouterr().err.endswith("failed: tests\n")


@pytest.mark.parametrize(
    ("known", "commit", "failed", "kept"),
    [
        (9, "abc1234", False, "9"),
        (9, "def5678", False, "2"),
        (1, "abc1234", False, "2"),
        (9, "abc1234", True, "1"),
    ],
)
def test_a_stopped_run_does_not_hide_more_of_its_commit(commands, tmp_path, known, commit, failed, kept):
    row = {"op": "minmax", "backend": "triton", "passed": known, "failed": 0}
    summary.update_tested(tmp_path, [{**row, "device": "NVIDIA Something", "commit": commit, "date": ""}])
    commands.result, commands.tests = Finished(None, ""), (("a", False), ("b", failed))
    gpu_checks.run_tests(Log(), None, tmp_path, "cuda", 80)
    assert counted(tmp_path)["minmax"][0] == kept


@pytest.mark.parametrize("code", [2, 3, -6])
def test_nor_does_one_that_was_broken_off(commands, tmp_path, code):
    row = {"op": "minmax", "backend": "triton", "passed": 9, "failed": 0}
    summary.update_tested(tmp_path, [{**row, "device": "NVIDIA Something", "commit": "abc1234", "date": ""}])
    commands.result = Finished(code, "")
    gpu_checks.run_tests(Log(), None, tmp_path, "cuda")
    assert counted(tmp_path)["minmax"][0] == "9"


def test_tests_of_one_op_do_not_count_for_another(commands, tmp_path):
    """Which they may cover in part, and by their names are selected for."""
    gpu_checks.run_tests(Log(), "pq_linear", tmp_path, "cuda")
    assert counted(tmp_path) == {}
    gpu_checks.run_tests(Log(), "minmax", tmp_path, "cuda")
    assert set(counted(tmp_path)) == {"minmax"}


@pytest.mark.parametrize("other", [None, "10.0"])
def test_tests_without_the_cuda_library_are_run_again(commands, monkeypatch, tmp_path, other):
    """But where it is for other GPUs than the one here."""
    monkeypatch.setattr(gpu_checks.libraries, "refusal", lambda: "not there")
    monkeypatch.setattr(gpu_checks.libraries, "unserved_capability", lambda: other)
    gpu_checks.run_tests(Log(), None, tmp_path, "cuda")
    assert bool(summary.passed_steps(tmp_path)) == bool(other)


def test_memory_on_a_gpu_that_no_cuda_kernel_is_for(commands, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_checks, "unserved_capability", lambda: "10.0")
    log = Log()
    gpu_checks.check_memory(log, None, tmp_path)
    assert not log.failures and not commands and "is for this GPU" in capsys.readouterr().out


def test_an_op_whose_tests_are_gone_is_a_failure(commands, tmp_path, capsys):
    commands.result, commands.tests = Finished(gpu_checks.NO_TESTS, "no tests ran"), ()
    for only, failed in (("ceilings", False), ("minmax", True), (None, True)):
        log = Log()
        gpu_checks.run_tests(log, only, tmp_path, "cuda")
        assert bool(log.failures) == failed
    assert "tests: there are none for ceilings" in capsys.readouterr().out
    assert summary.passed_steps(tmp_path) == {}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_passed_at_a_commit_is_not_repeated_there(commands, monkeypatch, tmp_path, step):
    def times(only=None, resume=True):
        before = len(commands)
        device = ("cuda", None) if step == "tests" else ()
        STEPS[step](Log(), only, tmp_path, *device, resume)
        return len(commands) - before

    assert times("kmeans") == 1 and times("kmeans") == 0
    assert times("pq_linear") == 1 and times() == 1  # that of one op is not all
    assert times() == times("int_linear") == 0
    assert times(resume=False) == 1
    monkeypatch.setattr(gpu_checks.commits, "differs", lambda *paths: True)
    assert times() == times() == 1
    for commit in ("def5678", "abc1234+", "unknown"):
        monkeypatch.setattr(environment, "commit", lambda commit=commit: commit)
        assert times() == 1
    assert times() == 1  # unknown is never the same


@pytest.mark.parametrize(
    ("code", "found", "tests", "reason"),
    [
        (0, "0 errors", 2, None),
        (99, "2 errors", 2, "2 errors"),
        (0, "1 error", 2, "1 error"),
        (5, "0 errors", 0, "no test of the cuda backend ran"),
        (0, "0 errors", 0, "no test of the cuda backend ran"),
        (None, "0 errors", 1, "stopped after 1800 s, 1 tests had ended"),
    ],
)
def test_memory_errors_and_no_tests_are_failures(commands, tmp_path, capsys, code, found, tests, reason):
    commands.result, commands.tests = Finished(code, f"ERROR SUMMARY: {found}"), commands.tests[:tests]
    log = Log()
    gpu_checks.check_memory(log, "kmeans", tmp_path)
    (command,) = commands
    assert command[0] == "/opt/compute-sanitizer" and command[-1] == "--ops=kmeans,kmeans_step"
    assert "--gpu-backend=cuda" in command and "gpu and of and not large" in command
    if reason is None:
        assert not log.failures and "memory: no errors in 2 tests" in capsys.readouterr().out
    else:
        ((step, output),) = log.failures
        assert step == "memory check" and reason in output
    assert bool(summary.passed_steps(tmp_path)) == (reason is None)


def test_memory_of_an_op_without_a_cuda_kernel_is_no_failure(commands, tmp_path, capsys):
    commands.result, commands.tests = Finished(0, "1 skipped"), ()
    log = Log()
    gpu_checks.check_memory(log, "minmax", tmp_path)
    assert not log.failures and "memory: the cuda backend has no minmax" in capsys.readouterr().out


def test_without_the_sanitizer_that_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: None)
    gpu_checks.check_memory(Log(), None, tmp_path)
    assert "compute-sanitizer is not installed" in capsys.readouterr().out


def test_gpu_tests_take_several_workers_where_they_can(monkeypatch):
    monkeypatch.setattr(gpu_checks.os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for found, parallel in ((None, False), (object(), True)):
        monkeypatch.setattr(gpu_checks, "find_spec", lambda name, found=found: found)
        command, env = gpu_checks.gpu_tests("pq_decode")
        assert "--ops=pq_decode,pq_embedding" in command
        assert (command[-3:] == ["-n", "14", "--dist=worksteal"]) == parallel
        assert (env.get("OMP_NUM_THREADS") == "1") == parallel


TESTS = """
import pytest

@pytest.fixture(autouse=True)
def record(request, record_property):
    marker = request.node.get_closest_marker("of")
    if marker:
        record_property("op", marker.args[0])
        record_property("backend", "triton")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("after the test")

@pytest.mark.of("minmax")
@pytest.mark.parametrize("good", [True, True, False])
def test_range(good):
    assert good

@pytest.mark.of("block_noise")
def test_skipped():
    pytest.skip("not here")

@pytest.mark.of("pq_decode")
def test_breaks_after(broken):
    pass

def test_minmax_in_layers():
    pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
@pytest.mark.parametrize(
    ("ops", "names"),
    [
        ("", ["test_breaks_after", "test_minmax_in_layers", *["test_range"] * 3]),
        ("minmax,other", ["test_minmax_in_layers", *["test_range"] * 3]),
        ("pq_decode", ["test_breaks_after"]),
    ],
)
def test_the_plugin_selects_by_op_and_logs_each_outcome(tmp_path, workers, ops, names):
    (tmp_path / "test_some.py").write_text(TESTS)
    log = tmp_path / "outcomes"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "gpu_pytest",
        f"--outcome-log={log}",
        f"--ops={ops}",
        *workers,
    ]
    env = {**run.source_tree_env(), "PYTHONPATH": str(run.BENCH)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    tests = gpu_pytest.read(log)
    assert sorted(name.partition("::")[2].partition("[")[0] for name in tests) == names
    by_op = {row["op"]: (row["backend"], row["passed"], row["failed"]) for row in gpu_pytest.by_op(tests)}
    whole = {"minmax": ("triton", 2, 1), "pq_decode": ("triton", 0, 1)}
    assert by_op == {op: counts for op, counts in whole.items() if not ops or op in ops}


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "outcomes"
    path.write_text(json.dumps({"test": "a", "failed": False}) + "\n" + '{"test": "b", "fai')
    assert list(gpu_pytest.read(path)) == ["a"]
    assert gpu_pytest.read(tmp_path / "none") == {}
