"""bench/gpu_suite.py without a GPU: what runs, what is left out, what is kept, what is told."""

import importlib
import os

import pytest
import torch
from helpers_bench import rows

import gpu_suite
import harness
import report
import run
import summary


def test_the_gpu_suite_says_in_one_sentence_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert (
        capsys.readouterr().err
        == "gpu_suite needs an NVIDIA GPU that torch can use, and torch finds none here.\n"
    )


def test_the_gpu_suite_writes_summaries_alone(tmp_path):
    assert gpu_suite.main(["--summary-only", "--out", str(tmp_path)]) == 0
    assert "Never run on a GPU" in (tmp_path / "summary.md").read_text()


def without_tests(monkeypatch):
    monkeypatch.setattr(gpu_suite.gpu_checks, "run_tests", lambda *arguments: None)
    monkeypatch.setattr(gpu_suite.warm, "warm_suites", lambda *arguments: None)


def test_failures_come_last_and_set_the_exit_code(monkeypatch, tmp_path, capsys):
    bad = run.Outcome("minmax", rows(), "E   RuntimeError: boom", [])
    monkeypatch.setattr(run, "SUITES", ("minmax",))
    monkeypatch.setattr(run, "run_suites", lambda suites, device, mode, seconds: [bad])
    without_tests(monkeypatch)
    out = tmp_path / "results"
    assert gpu_suite.main(["--device", "cpu", "--no-build", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "boom" in printed.err and printed.err.endswith("failed: bench_minmax.py\n")
    assert (out / "a-processor-x2" / "minmax.csv").exists()


def test_the_gpu_suite_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    """A suite whose CSV is of this commit is left out; of another commit, it runs again."""
    monkeypatch.setattr(gpu_suite.environment, "commit", lambda: "abc1234")
    monkeypatch.setattr(gpu_suite.environment, "device_name", lambda device: "A Processor x2")
    monkeypatch.setattr(run, "SUITES", ("minmax", "kmeans"))
    without_tests(monkeypatch)
    monkeypatch.setattr(gpu_suite, "is_measured", lambda *arguments: True)
    ran = []

    def run_suites(suites, device, mode, seconds):
        ran.extend(suites)
        return [run.Outcome(suite, rows(op=suite), "", []) for suite in suites]

    monkeypatch.setattr(run, "run_suites", run_suites)
    command = ["--device", "cpu", "--no-build", "--out", str(tmp_path / "results")]
    assert gpu_suite.main(command) == 0
    assert ran == ["minmax", "kmeans"]
    assert gpu_suite.main([*command, "--resume"]) == 0
    assert ran == ["minmax", "kmeans"]
    assert "kmeans: measured at this commit already" in capsys.readouterr().out
    monkeypatch.setattr(gpu_suite.environment, "commit", lambda: "def5678")
    assert gpu_suite.main([*command, "--resume"]) == 0
    assert ran == ["minmax", "kmeans"] * 2


def test_a_table_is_whole_when_it_has_every_case(tmp_path):
    cases = [case for case in importlib.import_module("bench_minmax").CASES if "cuda" in case.devices]
    some = [case.name for case in cases if case.quick]
    assert 0 < len(some) < len(cases)
    parts = ((some, "quick", True), (some, "brief", False), (some[1:], "quick", False))
    for names, mode, whole in parts:
        kept = [recorded_row | {"case": name} for name in names for recorded_row in rows()]
        report.write_csv(tmp_path / "minmax.csv", kept)
        assert gpu_suite.is_measured("minmax", tmp_path, "cuda", mode) == whole
    for rounds, full in (("20", False), ("60", True)):
        changes = [{"case": case.name, "rounds": rounds} for case in cases]
        report.write_csv(tmp_path / "minmax.csv", [rows()[0] | change for change in changes])
        assert gpu_suite.is_measured("minmax", tmp_path, "cuda", "brief")
        assert gpu_suite.is_measured("minmax", tmp_path, "cuda", "full") == full
    assert not gpu_suite.is_measured("kmeans", tmp_path, "cuda", "quick")


def test_a_table_is_whole_when_it_has_every_backend(monkeypatch, tmp_path):
    """One that was measured before the CUDA library was there is measured again."""
    monkeypatch.setattr(harness, "has_kernel", lambda backend, op: True)
    cases = [case for case in importlib.import_module("bench_minmax").CASES if case.quick]
    for backends, whole in ((("triton",), False), (("triton", "cuda"), True)):
        kept = [rows()[0] | {"case": case.name, "contender": one} for case in cases for one in backends]
        report.write_csv(tmp_path / "minmax.csv", kept)
        assert gpu_suite.is_measured("minmax", tmp_path, "cuda", "quick") == whole


def test_a_quick_run_leaves_a_full_table_and_names_what_it_has_no_time_for(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "a-processor-x2"
    monkeypatch.setattr(gpu_suite, "is_measured", lambda *arguments: True)
    clock = iter((0.0, 100.0, 100.0, 171.0))
    asked = []

    def run_suites(suites, device, mode, seconds):
        asked.append((suites, mode, seconds))
        return [run.Outcome(suite, rows(), "", []) for suite in suites]

    monkeypatch.setattr(run, "run_suites", run_suites)
    log = gpu_suite.Log()
    monkeypatch.setattr(gpu_suite.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(log, "say", print)
    for others in (["kmeans", "minmax"], ["range"]):
        gpu_suite.run_benchmarks(log, [*others, "ceilings"], "quick", tmp_path, folder, "cuda", 170.0)
    assert asked == [
        (["ceilings"], "quick", 170.0),
        (["kmeans", "minmax"], "quick", 70.0),
        (["ceilings"], "quick", 70.0),
    ]
    printed = capsys.readouterr().out
    assert "minmax: 3 rows, shown only: the table there is of a longer run" in printed
    assert not log.failures and not folder.exists()
    assert log.incomplete == ["left out for want of time: range"]
    assert log.close() == 0 and capsys.readouterr().err == "incomplete: left out for want of time: range\n"


def test_warming_goes_on_after_a_suite_that_takes_too_long(monkeypatch):
    commands = []

    def never(command, timeout, **options):
        commands.append(command)
        raise gpu_suite.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_suite.warm.subprocess, "run", never)
    gpu_suite.warm.warm_suites(["minmax", "kmeans"], "cuda", "brief", 80)
    assert sorted(command[2] for command in commands) == ["kmeans", "minmax"]
    assert all(command[3:] == ["--device=cuda", "--brief"] for command in commands)


@pytest.mark.parametrize("commit", ["abc1234+", "unknown", ""])
def test_a_commit_that_does_not_tell_the_sources_is_never_current(monkeypatch, tmp_path, commit):
    report.write_csv(tmp_path / "minmax.csv", [row | {"commit": commit} for row in rows()])
    monkeypatch.setattr(gpu_suite.environment, "commit", lambda: commit)
    assert not gpu_suite.is_current("minmax", tmp_path)


def test_an_interruption_keeps_the_suites_that_were_measured(monkeypatch, tmp_path):
    """--resume then goes on with the others."""
    monkeypatch.setattr(gpu_suite.environment, "commit", lambda: "abc1234")
    monkeypatch.setattr(gpu_suite.environment, "device_name", lambda device: "A Processor x2")
    monkeypatch.setattr(
        gpu_suite, "is_measured", lambda suite, folder, *rest: (folder / f"{suite}.csv").exists()
    )
    monkeypatch.setattr(run, "SUITES", ("minmax", "kmeans"))
    without_tests(monkeypatch)
    asked = []

    def run_suites(suites, device, mode, seconds):
        asked.append(list(suites))
        yield run.Outcome("minmax", rows(op="minmax"), "", [])
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_suites", run_suites)
    command = ["--device", "cpu", "--no-build", "--out", str(tmp_path)]
    for arguments in (command, [*command, "--resume"]):
        with pytest.raises(KeyboardInterrupt):
            gpu_suite.main(arguments)
    assert asked == [["minmax", "kmeans"], ["kmeans"]]
    assert report.read_csv(tmp_path / "a-processor-x2" / "minmax.csv") == rows(op="minmax")


def test_pictures_are_drawn_of_new_tables_alone(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(gpu_suite.plot, "plot_csv", lambda path: drawn.append(path.name))
    for name, ages in (("new", {"png": 2, "csv": 1}), ("old", {"png": 1, "csv": 2}), ("none", {"csv": 1})):
        for suffix, age in ages.items():
            (tmp_path / f"{name}.{suffix}").touch()
            os.utime(tmp_path / f"{name}.{suffix}", (1e9 - age, 1e9 - age))
    (tmp_path / summary.TESTED).touch()
    gpu_suite.draw(tmp_path)
    assert sorted(drawn) == ["new.csv", "none.csv"]


def test_an_unknown_op_is_an_error_that_lists_the_names(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(["--only", "kmean", "--device", "cpu"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "--only: expected one of block_noise, ceilings" in told and "kmeans_step" in told
    assert told.endswith("got 'kmean'\n")


def test_the_help_says_what_a_run_takes(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["--help"])
    told = capsys.readouterr().out
    assert "AFTER the libraries are\nbuilt" in told and "bitsandbytes gemlite flash-kmeans" in told


def test_the_build_is_not_on_the_clock_of_a_quick_run(monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(gpu_suite.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gpu_suite.libraries, "prepare", lambda *arguments: clock.__setitem__(0, 1000.0))
    monkeypatch.setattr(gpu_suite, "check_and_warm", lambda *arguments: None)
    until = []
    monkeypatch.setattr(gpu_suite, "run_benchmarks", lambda *arguments: until.append(arguments[-1]))
    assert gpu_suite.main(["--device", "cpu", "--quick", "--only", "minmax", "--out", str(tmp_path)]) == 0
    assert until == [1000.0 + gpu_suite.QUICK_SECONDS]
