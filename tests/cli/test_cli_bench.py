"""qnkernels bench."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from qnkernels.cli import app

runner = CliRunner()
CSV = """op,case,shape,dtype,contender,role,median_s,ratio_to_ceiling
twist,twist 3x4,3x4,fp32,cpu,ours,0.00125,1.5
twist,twist 3x4,3x4,fp32,copy,ceiling,0.000833333,1
twist,twist 5x5,5x5,fp32,cpu,ours,0.5,
"""
RUN = """import sys
print("ran", sys.argv[1:])
sys.exit(3)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    results = tmp_path / "bench" / "results" / "some-cpu-x2"
    results.mkdir(parents=True)
    (results / "twist.csv").write_text(CSV)
    (results / "turn.csv").write_text(CSV)
    for op in ("twist", "turn"):
        (tmp_path / "bench" / f"bench_{op}.py").touch()
    (tmp_path / "bench" / "run.py").write_text(RUN)
    return tmp_path


def test_stored_results(source: Path) -> None:
    result = runner.invoke(app, ["bench", "twist", "--stored", f"--source={source}"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["twist", "on", "some-cpu-x2"] in lines and ["turn", "on", "some-cpu-x2"] not in lines
    assert ["twist", "3x4", "cpu", "1.25", "1.50"] in lines
    assert ["copy", "0.8333", "1.00"] in lines
    assert ["twist", "5x5", "cpu", "500"] in lines


def test_runs_the_suites_and_returns_their_exit_code(source: Path, capfd: pytest.CaptureFixture) -> None:
    result = runner.invoke(app, ["bench", "turn", "--quick", "--device=cuda", f"--source={source}"])
    assert result.exit_code == 3
    assert "ran ['turn', '--device=cuda', '--quick']" in capfd.readouterr().out


def test_bad_input(source: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["spin", f"--source={source}"], "op: expected one of turn, twist, got 'spin'"),
        ([f"--source={tmp_path / 'elsewhere'}"], "source: expected a source tree of qnkernels with bench/"),
    ):
        result = runner.invoke(app, ["bench", *arguments])
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())


def test_no_results_yet(source: Path) -> None:
    for path in source.glob("bench/results/*/*.csv"):
        path.unlink()
    result = runner.invoke(app, ["bench", "--stored", f"--source={source}"])
    assert result.exit_code == 1
    assert "no results of turn, twist" in " ".join(result.stderr.split())
