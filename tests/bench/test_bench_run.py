"""bench/run.py: suites in one process, each kept as it ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import processes
import run


def test_a_suite_without_time_is_left_out(monkeypatch):
    monkeypatch.setattr(run, "GRACE", 120)  # for a start on a busy machine
    (outcome,) = run.run_suites(["ceilings"], mode="quick", seconds=0.0)
    (line,) = outcome.left_out
    assert not outcome.rows and not outcome.problem and line.endswith("bench_ceilings: for want of time")
    monkeypatch.setattr(run, "GRACE", 0.1)
    (outcome,) = run.run_suites(["ceilings"], mode="quick", seconds=0.0)
    assert outcome == run.Outcome("ceilings", [], "", ["left out for want of time: ceilings"])


@pytest.mark.parametrize("failed", [["minmax"], ["ceilings", "minmax", "kmeans"]])
def test_what_fails_beside_others_runs_again_by_itself(monkeypatch, failed):
    asked = []

    def together(suites, *rest):
        asked.append(list(suites))
        alone = len(suites) == 1
        return [run.Outcome(one, [], "" if alone or one not in failed else "lost", []) for one in suites]

    monkeypatch.setattr(run, "_run_together", together)
    suites = ["ceilings", "minmax", "kmeans"]
    outcomes = list(run.run_suites(suites))
    assert sorted(outcome.suite for outcome in outcomes) == sorted(suites)
    assert not any(one.problem for one in outcomes)
    assert asked == [suites, *([one] for one in failed)]


def instead(monkeypatch, program: str) -> None:
    """A child of run._run_together that knows `folder` and `record(suite, problem)`, in place of pytest."""
    monkeypatch.setattr(run, "_command", lambda *arguments: pretend(program, arguments[-1]))


def pretend(program, folder) -> list[str]:
    facts = {"machine_info": {"measured_on": {}}, "benchmarks": [], "left_out": []}
    lines = (
        "import os, pathlib, sys, time",
        f"folder = pathlib.Path({str(folder)!r})",
        "def record(suite, problem=''):",
        f"    text = {json.dumps(facts)!r}[:-1] + ', \"problem\": \"' + problem + '\"}}'",
        "    (folder / 'partial').write_text(text)",
        "    (folder / 'partial').rename(folder / (suite + '.json'))",
        program,
    )
    return [sys.executable, "-c", "\n".join(lines)]


def test_a_suite_comes_as_soon_as_it_has_ended(monkeypatch, tmp_path):
    """The child waits for what the reader of the first outcome does: it could not come at the end alone."""
    go = tmp_path / "go"
    wait = f"record('minmax')\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nrecord('kmeans')"
    instead(monkeypatch, wait)
    outcomes = run.run_suites(["minmax", "kmeans"], seconds=60)
    assert next(outcomes) == run.Outcome("minmax", [], "", [])
    go.touch()
    assert list(outcomes) == [run.Outcome("kmeans", [], "", [])]


def test_an_interrupted_run_ends_its_child(monkeypatch, tmp_path):
    instead(
        monkeypatch,
        f"record('minmax')\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)",
    )
    outcomes = run._run_together(["minmax", "kmeans"], "cpu", "full", "", None)
    assert next(outcomes).suite == "minmax"
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    outcomes.close()  # as Ctrl-C would while the next is awaited
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("program", "failed"),
    [
        ("record('minmax', 'boom'); record('kmeans'); sys.exit(1)", {"minmax"}),
        ("record('minmax'); print('Abort'); sys.exit(3)", {"kmeans"}),
        ("sys.exit('Abort')", {"minmax", "kmeans"}),
        ("record('minmax')", set()),  # nothing of the other was selected
    ],
)
def test_a_failure_is_of_the_suite_that_is_named_and_a_crash_of_those_not_done(monkeypatch, program, failed):
    instead(monkeypatch, program)
    outcomes = list(run._run_together(["minmax", "kmeans"], "cuda", "full", "", None))
    assert sorted(outcome.suite for outcome in outcomes) == ["kmeans", "minmax"]
    assert {outcome.suite for outcome in outcomes if outcome.problem} == failed


def test_a_run_that_is_stopped_keeps_the_suites_that_ended(monkeypatch):
    def command(suites, device, mode, select, seconds, folder):
        subprocess.run(pretend("record('minmax')", folder), check=True)
        return ["sleep", "600"]

    monkeypatch.setattr(run, "_command", command)
    monkeypatch.setattr(run, "GRACE", 0.1)
    minmax, kmeans = run._run_together(["minmax", "kmeans"], "cuda", "quick", "", 0.1)
    assert minmax == run.Outcome("minmax", [], "", [])
    assert kmeans == run.Outcome("kmeans", [], "", ["left out for want of time: kmeans"])


def test_a_suite_that_ends_past_the_limit_while_another_is_read_is_kept(monkeypatch):
    instead(monkeypatch, "record('minmax')\ntime.sleep(1.5)\nrecord('kmeans')")
    monkeypatch.setattr(run, "GRACE", 0.0)
    outcomes = run._run_together(["minmax", "kmeans"], "cuda", "quick", "", 1.0)
    first = next(outcomes)
    time.sleep(3)
    assert [first, *outcomes] == [run.Outcome(suite, [], "", []) for suite in ("minmax", "kmeans")]


def test_failed_contenders_are_told_with_their_suite(tmp_path):
    """Of a bench file of its own: one contender is measured, one fails, one peer is left out."""
    file = tmp_path / "bench_toy.py"
    file.write_text(TOY)
    (tmp_path / "conftest.py").write_text((run.BENCH / "conftest.py").read_text())
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(file),
        f"--records={tmp_path}",
        "--quick",
        f"--rootdir={tmp_path}",
    ]
    env = {**run.source_tree_env(), "PYTHONPATH": os.pathsep.join((str(run.BENCH), str(run.ROOT)))}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    (outcome,) = run._recorded(["toy"], tmp_path)
    assert result.returncode == 1, result.stdout
    assert [(row["contender"], row["target"], row["peer_target"]) for row in outcome.rows] == [
        ("good", "2", "3"),
        ("add", "", ""),
    ]
    assert "bad on toy: a toy: RuntimeError: boom" in outcome.problem
    assert outcome.left_out == [
        "bench_toy: peer on toy: a toy: RuntimeError: boom",
        "left out of bench_toy, not installed: another",
    ]


TOY = """
import torch
from harness import Case, Contender

def boom(x):
    raise RuntimeError("boom")

def contenders(device_type):
    good, bad = Contender("good", "ours", lambda x: x.neg), Contender("bad", "ours", boom)
    return [good, bad, Contender("peer", "peer", boom), Contender("add", "ceiling", lambda x: x.neg)]

LEFT_OUT = ["another"]
CASES = [
    Case("toy", "a toy", "3", "float32", 24, 0, lambda device, index: torch.ones(3), contenders,
         target=2.0, peer_target=(3.0, "peer"), quick=True)
]

def test_toy(timed):
    pass
"""


def test_a_command_ends_with_what_it_started(tmp_path):
    path = tmp_path / "pid"
    inner = f"import os, time; open({str(path)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen([sys.executable, "-c", outer])
    while not path.exists() or not path.read_text():
        time.sleep(0.01)
    processes.end(process)
    state = Path(f"/proc/{path.read_text()}/stat")
    until = time.perf_counter() + 60
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.perf_counter() < until, "the child of the child lives on"


def test_a_command_is_stopped_at_its_limit_and_what_it_printed_is_kept():
    assert processes.finish(["sh", "-c", "echo begun; exec sleep 600"], 0.5) == processes.Finished(
        None, "begun\n"
    )
    assert processes.finish(["sh", "-c", "echo told >&2; exit 3"]) == processes.Finished(3, "told\n")
