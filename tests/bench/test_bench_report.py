"""From a run to CSV, table and picture; what the summaries say."""

import csv
import importlib

import pytest
from helpers_bench import MEASURED_ON, ON_GPU, rows

import plot
import report
import run
import summary
import targets
from qnkernels.ops import OPS


def test_csv_has_the_columns_and_survives_the_round_trip(tmp_path):
    written = rows()
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
    row = rows(operations=6_000_000_000, seconds=0.5)[0]
    assert row["gflop_per_s"] == "12" and row["gb_per_s"] == "0.008"


def test_table_shows_ratio_and_verdict(tmp_path):
    lines = report.table(rows()).splitlines()
    assert "forward 4x4" in lines[1] and "copy_" in lines[1]
    assert "2 ms" in lines[2] and "1.25x" in lines[2] and lines[2].endswith("meets 2x")
    assert "12.50x" in lines[3]
    assert report.table(rows(ratio=2.2)).splitlines()[2].endswith("misses 2x")
    assert lines[1].endswith("(ratio to copy_)")
    assert "other programs took 30%" in report.table(rows(other_load=0.3)).splitlines()[1]


@pytest.mark.parametrize(("seconds", "text"), [(2.05, "2.05 s"), (1.3214e-3, "1.32 ms"), (4.13e-4, "413 us")])
def test_durations_have_three_figures(seconds, text):
    assert report.duration(seconds) == text


def test_plot_draws_a_picture_beside_the_csv(tmp_path):
    path = tmp_path / "fake_quantize.csv"
    report.write_csv(path, rows())
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


def test_suites_of_one_process_are_told_apart():
    outcomes = list(run.run_suites(["minmax", "ceilings"], mode="quick", select="copy or aminmax"))
    assert [outcome.suite for outcome in outcomes] == ["minmax", "ceilings"]
    assert [{row["op"] for row in outcome.rows} for outcome in outcomes] == [{"minmax"}, {"copy"}]
    assert not any(outcome.problem for outcome in outcomes)


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
    report.write_csv(folder / "fake_quantize.csv", rows(ON_GPU, contender="cuda"))
    report.write_csv(tmp_path / "a-processor-x2" / "int_linear.csv", rows(op="int_linear"))
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
    report.write_csv(folder / "fake_quantize.csv", rows(ON_GPU, contender="triton"))
    ceiling = {"op": "matmul", "case": "matrix product", "operations": 2 * 10**12}
    report.write_csv(folder / "ceilings.csv", rows(ON_GPU, **ceiling)[:1])
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
    assert "any commit counts" in text and "## Commits" in text
    assert "Targets on NVIDIA Something" in written[0].read_text()


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_gpu_test(op):
    """So that a run of the suite can take it off the list of those that have never run."""
    files = (run.ROOT / "tests" / "gpu").glob("test_*.py")
    assert any(f'of("{op}")' in path.read_text() for path in files)


@pytest.mark.parametrize(
    ("least", "peer", "told"),
    [
        (10.0, "eager", "meets 10x eager (10.00x)"),
        (10.5, "eager", "misses 10.5x eager (10.00x)"),
        (10.0, "", "meets 10x eager (10.00x)"),  # the fastest peer
        (0.9, "copy_", "misses 0.9x copy_ (0.80x)"),
        (5.0, "cuBLAS", "5x not judged, without cuBLAS"),
    ],
)
def test_a_target_relative_to_a_peer_is_judged(tmp_path, least, peer, told):
    written = rows(ON_GPU, contender="triton", target=None, peer_target=least, target_peer=peer)
    assert report.verdict(written[0], written) == told and report.verdict(written[1], written) == ""
    assert report.table(written).splitlines()[2].endswith(told)
    report.write_csv(tmp_path / "nvidia-something" / "fake_quantize.csv", written)
    assert f"| {told} |" in summary.overall_summary(tmp_path)


def test_the_fastest_peer_is_the_one_to_beat():
    written = rows(peer_target=5.0, target_peer="", target=None)
    faster = {**written[1], "contender": "torch.compile", "median_s": "0.004"}
    assert report.verdict(written[0], [*written, faster]) == "misses 5x torch.compile (2.00x)"


def test_the_targets_stand_beside_the_fastest_backend(tmp_path):
    times = {"triton": 0.003, "cuda": 0.002, "cuda without wgmma": 0.001}
    measured = [rows(ON_GPU, contender=name, seconds=seconds)[0] for name, seconds in times.items()]
    report.write_csv(tmp_path / "nvidia-something" / "fake_quantize.csv", [*measured, *rows(ON_GPU)[1:]])
    lines = [line for line in summary.overall_summary(tmp_path).splitlines() if "| forward 4x4 |" in line]
    assert [line.split(" | ")[1] for line in lines] == ["cuda"]


def test_older_tables_of_a_gpu_are_judged_by_the_cases():
    cases = importlib.import_module("bench_pq_linear").CASES
    (case,) = (one for one in cases if one.peer_target == (5.0, "F.linear bf16"))
    recent = rows(ON_GPU, contender="cuda", case=case.name, target=None)
    assert targets.fill("pq_linear", recent) == recent
    old = [{name: value for name, value in row.items() if "peer" not in name} for row in recent]
    filled = targets.fill("pq_linear", old)
    assert filled[0] == {**old[0], "target": "", "peer_target": "5", "target_peer": "F.linear bf16"}
    assert filled[1:] == old[1:]
    on_cpu = [{**row, "cuda": ""} for row in old]
    assert targets.fill("pq_linear", on_cpu) == on_cpu
