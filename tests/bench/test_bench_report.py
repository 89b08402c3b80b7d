"""From a run to CSV, table and picture; what the summaries say; the GPU suite's parts without a GPU."""

import csv
import importlib
import json

import pytest
import torch

import gpu_suite
import plot
import report
import run
import summary
from qnkernels.ops import OPS


def recorded(contender="cpu", role="ours", seconds=0.002, ratio=1.25, **changes):
    facts = {
        **{"op": "fake_quantize", "case": "forward 4x4", "shape": "4x4", "dtype": "float32", "timer": "wall"},
        **{"contender": contender, "role": role, "calls": 7, "moved_bytes": 4_000_000, "operations": 0},
        **{"ceiling": "copy_", "ratio_to_ceiling": ratio, "target": 2.0 if role == "ours" else None},
        "medians": {contender: seconds},
        "size": 16,
        "other_load": 0.011,
    }
    stats = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds, "min": 0.8 * seconds, "rounds": 5}
    return {"fullname": FULLNAME, "extra_info": {**facts, **changes}, "stats": stats}


FULLNAME = "bench/bench_fake_quantize.py::test_fake_quantize[forward 4x4-cpu]"


MEASURED_ON = {
    **{"device": "A Processor x2", "threads": "2", "python": "3.12.1", "torch": "2.13.0", "triton": "3.7.1"},
    **{"qnkernels": "0.1.0", "cuda": "", "driver": "", "commit": "abc1234", "date": "2026-01-02"},
}
ON_GPU = {**MEASURED_ON, "device": "NVIDIA Something", "cuda": "13.0", "driver": "580.1"}


def rows(tmp_path, measured_on=MEASURED_ON, **changes):
    benchmarks = [
        recorded(**changes),
        recorded("eager", "peer", 0.02, 12.5),
        recorded("copy_", "ceiling", 0.0016, 1.0),
    ]
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"machine_info": {"measured_on": measured_on}, "benchmarks": benchmarks}))
    return report.rows_from_json(path)["fake_quantize"]


def test_csv_has_the_columns_and_survives_the_round_trip(tmp_path):
    written = rows(tmp_path)
    path = tmp_path / "results" / "fake_quantize.csv"
    report.write_csv(path, written)
    with path.open() as file:
        assert tuple(next(csv.reader(file))) == report.COLUMNS
    assert report.read_csv(path) == written
    assert [one.name for one in path.parent.iterdir()] == ["fake_quantize.csv"]
    ours = written[0]
    assert {name: ours[name] for name in MEASURED_ON} == MEASURED_ON
    assert ours["median_s"] == "0.002" and ours["rounds"] == "5" and ours["calls"] == "7"
    assert ours["gb_per_s"] == "2" and ours["gflop_per_s"] == ""
    assert ours["ratio_to_ceiling"] == "1.25" and ours["target"] == "2"


def test_rates_follow_from_bytes_operations_and_the_median(tmp_path):
    row = rows(tmp_path, operations=6_000_000_000, seconds=0.5)[0]
    assert row["gflop_per_s"] == "12" and row["gb_per_s"] == "0.008"


def test_table_shows_ratio_and_verdict(tmp_path):
    lines = report.table(rows(tmp_path)).splitlines()
    assert "forward 4x4" in lines[1] and "copy_" in lines[1]
    assert "2 ms" in lines[2] and "1.25x" in lines[2] and lines[2].endswith("meets 2x")
    assert "12.50x" in lines[3]
    assert report.table(rows(tmp_path, ratio=2.2)).splitlines()[2].endswith("misses 2x")
    assert lines[1].endswith("(ratio to copy_)")
    assert "other programs took 30%" in report.table(rows(tmp_path, other_load=0.3)).splitlines()[1]


@pytest.mark.parametrize(("seconds", "text"), [(2.05, "2.05 s"), (1.3214e-3, "1.32 ms"), (4.13e-4, "413 us")])
def test_durations_have_three_figures(seconds, text):
    assert report.duration(seconds) == text


def test_plot_draws_a_picture_beside_the_csv(tmp_path):
    path = tmp_path / "fake_quantize.csv"
    report.write_csv(path, rows(tmp_path))
    picture = plot.plot_csv(path)
    assert picture == tmp_path / "fake_quantize.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_a_suite_runs_end_to_end(tmp_path, capsys):
    assert run.main(["ceilings", "--quick", "-k", "copy", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/ceilings.csv")
    (row,) = report.read_csv(path)
    assert row["op"] == "copy" and row["contender"] == "copy_" and row["ratio_to_ceiling"] == "1"
    assert float(row["gb_per_s"]) == pytest.approx(
        int(row["moved_bytes"]) / float(row["median_s"]) / 1e9, rel=1e-3
    )
    assert path.with_suffix(".png").exists()
    assert "copy of 256 MiB" in capsys.readouterr().out


def test_run_names_the_suites_when_asked_for_another(capsys):
    with pytest.raises(SystemExit):
        run.main(["fake_quantise"])
    assert "expected some of block_noise" in capsys.readouterr().err


def test_without_gpu_results_every_op_of_every_gpu_backend_is_named(tmp_path):
    missing = summary.never_run(tmp_path)
    assert [op for op, backend in missing if backend == "triton"] == list(OPS)
    text = summary.overall_summary(tmp_path)
    assert all(f"`{op}`" in text for op in OPS)


def test_ops_leave_the_list_when_a_test_passed_or_a_benchmark_ran_on_a_gpu(tmp_path):
    folder = tmp_path / "nvidia-something"
    passed = {"op": "minmax", "backend": "triton", "passed": 3, "failed": 1}
    failed = {"op": "block_noise", "backend": "triton", "passed": 0, "failed": 2}
    facts = {"device": "NVIDIA Something", "commit": "abc", "date": "2026-01-02"}
    summary.update_tested(folder, [{**passed, **facts}, {**failed, **facts}])
    report.write_csv(folder / "fake_quantize.csv", rows(tmp_path, ON_GPU, contender="cuda"))
    report.write_csv(tmp_path / "a-processor-x2" / "int_linear.csv", rows(tmp_path, op="int_linear"))
    missing = summary.never_run(tmp_path)
    assert ("minmax", "triton") not in missing and ("fake_quantize", "cuda") not in missing
    assert ("block_noise", "triton") in missing and ("fake_quantize", "triton") in missing
    assert ("int_linear", "triton") in missing


def test_a_later_partial_run_keeps_what_other_ops_had(tmp_path):
    facts = {"device": "NVIDIA Something", "commit": "abc", "date": "2026-01-02"}
    first = [
        {"op": op, "backend": "triton", "passed": 1, "failed": 0, **facts} for op in ("minmax", "block_noise")
    ]
    summary.update_tested(tmp_path, first)
    summary.update_tested(tmp_path, [{**first[0], "passed": 5}])
    assert {row["op"]: row["passed"] for row in summary.tested(tmp_path)} == {
        "minmax": "5",
        "block_noise": "1",
    }


def test_device_summary_tells_device_stack_ceilings_ratios_and_gaps(tmp_path):
    folder = tmp_path / "nvidia-something"
    report.write_csv(folder / "fake_quantize.csv", rows(tmp_path, ON_GPU, contender="triton"))
    ceiling = {"op": "matmul", "case": "matrix product", "operations": 2 * 10**12}
    report.write_csv(folder / "ceilings.csv", rows(tmp_path, ON_GPU, **ceiling)[:1])
    written = summary.write_summaries(tmp_path, quick_folder=folder)
    assert written == [tmp_path / "summary.md", folder / "summary.md"]
    text = written[1].read_text()
    for part in (
        "# NVIDIA Something",
        "driver 580.1",
        "cuda 13.0",
        "torch 2.13.0",
        "commit abc1234",
        "Short run",
    ):
        assert part in text
    assert "matrix product: 1000.00 TFLOP/s" in text
    assert "| forward 4x4 | triton | 2 ms | 1.25x | copy_ | eager 20 ms | 10.00x | meets 2x |" in text
    assert "## Never run on a GPU" in text and "`block_noise`" in text
    assert "Targets on NVIDIA Something" in written[0].read_text()


def junit_case(op: str, backend: str, outcome: str = "") -> str:
    properties = f'<property name="op" value="{op}"/><property name="backend" value="{backend}"/>'
    return f'<testcase name="a"><properties>{properties}</properties>{outcome}</testcase>'


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_gpu_test(op):
    """So that a run of the suite can take it off the list of those that have never run."""
    files = (run.ROOT / "tests" / "gpu").glob("test_*.py")
    assert any(f'of("{op}")' in path.read_text() for path in files)


def test_passed_and_failed_tests_are_counted_per_op_and_backend(tmp_path):
    path = tmp_path / "junit.xml"
    cases = [
        junit_case("minmax", "triton"),
        junit_case("minmax", "triton", '<failure message="x"/>'),
        junit_case("block_noise", "cuda", "<skipped/>"),
        '<testcase name="about layers"/>',
    ]
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert gpu_suite.tested_ops(path) == [{"op": "minmax", "backend": "triton", "passed": 1, "failed": 1}]


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
    monkeypatch.setattr(gpu_suite, "run_tests", lambda *arguments: None)
    monkeypatch.setattr(gpu_suite.warm, "warm_suites", lambda *arguments: None)


def test_failures_come_last_and_set_the_exit_code(monkeypatch, tmp_path, capsys):
    bad = run.Outcome("minmax", rows(tmp_path), "E   RuntimeError: boom", [])
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
        return [run.Outcome(suite, rows(tmp_path, op=suite), "", []) for suite in suites]

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


@pytest.mark.parametrize(
    ("code", "found", "failed"),
    [(0, "0 errors", False), (5, "0 errors", False), (99, "2 errors", True), (0, "1 error", True)],
)
def test_memory_errors_are_failures(monkeypatch, code, found, failed):
    commands = []

    def pretend(command, **options):
        commands.append(command)
        return gpu_suite.subprocess.CompletedProcess(command, code, f"ERROR SUMMARY: {found}", "")

    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(gpu_suite, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_suite.subprocess, "run", pretend)
    log = gpu_suite.Log()
    gpu_suite.check_memory(log, "kmeans")
    (command,) = commands
    assert command[0] == "/opt/compute-sanitizer" and command[-2:] == ["-k", "kmeans"]
    assert "--gpu-backend=cuda" in command and "gpu and of and not large" in command
    assert [step for step, _ in log.failures] == (["memory check"] if failed else [])


def test_without_the_sanitizer_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    gpu_suite.check_memory(gpu_suite.Log(), None)
    assert "compute-sanitizer is not installed" in capsys.readouterr().out


def test_a_table_is_whole_when_it_has_every_case(tmp_path):
    cases = [case for case in importlib.import_module("bench_minmax").CASES if "cuda" in case.devices]
    some = [case.name for case in cases if case.quick]
    assert 0 < len(some) < len(cases)
    parts = ((some, "quick", True), (some, "brief", False), (some[1:], "quick", False))
    for names, mode, whole in parts:
        kept = [recorded_row | {"case": name} for name in names for recorded_row in rows(tmp_path)]
        report.write_csv(tmp_path / "minmax.csv", kept)
        assert gpu_suite.is_measured("minmax", tmp_path, "cuda", mode) == whole
    for rounds, full in (("20", False), ("60", True)):
        changes = [{"case": case.name, "rounds": rounds} for case in cases]
        report.write_csv(tmp_path / "minmax.csv", [rows(tmp_path)[0] | change for change in changes])
        assert gpu_suite.is_measured("minmax", tmp_path, "cuda", "brief")
        assert gpu_suite.is_measured("minmax", tmp_path, "cuda", "full") == full
    assert not gpu_suite.is_measured("kmeans", tmp_path, "cuda", "quick")


def test_a_quick_run_leaves_a_full_table_and_names_what_it_has_no_time_for(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "a-processor-x2"
    monkeypatch.setattr(gpu_suite, "is_measured", lambda *arguments: True)
    clock = iter((0.0, 100.0, 100.0, 171.0))
    asked = []

    def run_suites(suites, device, mode, seconds):
        asked.append((suites, mode, seconds))
        return [run.Outcome(suite, rows(tmp_path), "", []) for suite in suites]

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
    assert "left out for want of time: range" in printed and not log.failures and not folder.exists()


def test_a_suite_without_time_is_left_out(monkeypatch):
    monkeypatch.setattr(run, "GRACE", 120)  # for a start on a busy machine
    (outcome,) = run.run_suites(["ceilings"], mode="quick", seconds=0.0)
    (line,) = outcome.left_out
    assert not outcome.rows and not outcome.problem and line.endswith("bench_ceilings: for want of time")
    monkeypatch.setattr(run, "GRACE", 0.1)
    (outcome,) = run.run_suites(["ceilings"], mode="quick", seconds=0.0)
    assert outcome == run.Outcome("ceilings", [], "", ["left out for want of time: ceilings"])


def test_suites_of_one_process_are_told_apart():
    outcomes = run.run_suites(["minmax", "ceilings"], mode="quick", select="copy or aminmax")
    assert [outcome.suite for outcome in outcomes] == ["minmax", "ceilings"]
    assert [{row["op"] for row in outcome.rows} for outcome in outcomes] == [{"minmax"}, {"copy"}]
    assert not any(outcome.problem for outcome in outcomes)


@pytest.mark.parametrize("failed", [["minmax"], ["ceilings", "minmax", "kmeans"]])
def test_what_fails_beside_others_runs_again_by_itself(monkeypatch, failed):
    asked = []

    def together(suites, *rest):
        asked.append(list(suites))
        alone = len(suites) == 1
        return [run.Outcome(one, [], "" if alone or one not in failed else "lost", []) for one in suites]

    monkeypatch.setattr(run, "_run_together", together)
    suites = ["ceilings", "minmax", "kmeans"]
    outcomes = run.run_suites(suites)
    assert [outcome.suite for outcome in outcomes] == suites and not any(one.problem for one in outcomes)
    assert asked == [suites, *([one] for one in failed)]


@pytest.mark.parametrize(
    ("printed", "failed"),
    [("FAILED bench/bench_minmax.py::test_minmax[a-cuda]", {"minmax"}), ("Abort", {"minmax", "kmeans"})],
)
def test_a_failure_is_of_the_suite_that_is_named_and_a_crash_of_all(monkeypatch, printed, failed):
    result = run.subprocess.CompletedProcess([], 1, printed, "")
    monkeypatch.setattr(run.subprocess, "run", lambda command, **options: result)
    outcomes = run._run_together(["minmax", "kmeans"], "cuda", "full", "", None)
    assert {outcome.suite for outcome in outcomes if outcome.problem} == failed


def test_gpu_tests_take_several_workers_where_they_can(monkeypatch):
    monkeypatch.setattr(gpu_suite.os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for found, parallel in ((None, False), (object(), True)):
        monkeypatch.setattr(gpu_suite, "find_spec", lambda name, found=found: found)
        command, env = gpu_suite.gpu_tests("kmeans")
        assert (command[-4:] == ["kmeans", "-n", "14", "--dist=worksteal"]) == parallel
        assert (env.get("OMP_NUM_THREADS") == "1") == parallel


def test_warming_goes_on_after_a_suite_that_takes_too_long(monkeypatch):
    commands = []

    def never(command, timeout, **options):
        commands.append(command)
        raise gpu_suite.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_suite.warm.subprocess, "run", never)
    gpu_suite.warm.warm_suites(["minmax", "kmeans"], "cuda", "brief", 80)
    assert sorted(command[2] for command in commands) == ["kmeans", "minmax"]
    assert all(command[3:] == ["--device=cuda", "--brief"] for command in commands)


def test_tests_that_take_too_long_are_stopped_and_named(monkeypatch, tmp_path, capsys):
    def never(command, timeout, **options):
        raise gpu_suite.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_suite.subprocess, "run", never)
    gpu_suite.run_tests(gpu_suite.Log(), None, tmp_path, "cuda", 80)
    assert "stopped after 80 s, NOT all of them have run" in capsys.readouterr().out
