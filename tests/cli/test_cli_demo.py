"""qnkernels demo, as typed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qnkernels.cli import app
from qnkernels.recipes import demo, laboratory
from qnkernels.recipes.transformer import Shape

runner = CliRunner()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(vocabulary=260, width=16, layers=1, heads=2, context=48)
    monkeypatch.setitem(
        laboratory.PRESETS, "tiny", laboratory.Preset(shape, batch=2, steps=2, rate=1e-2, validation=100)
    )
    monkeypatch.setattr(demo, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(demo, "GENERATING_SECONDS", 0.0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return x + 1\n" * 40)
    return path


def test_prints_a_table(text: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", "--preset=tiny", f"--data={text}", f"--out={tmp_path / 'out'}"])
    assert result.exit_code == 0, result.output
    for word in (
        "fp32",
        "int8",
        "int8-dynamic",
        "int8-static",
        "int4",
        "iPQ",
        "full precision",
        "after training",
        "QAT",
        "Quant-Noise",
    ):
        assert word in result.stdout
    assert "untuned: without finetuning, 1 steps" in result.stdout and "…" not in result.stdout
    assert "13/13 int8 QAT" in result.stderr and "2/2" in result.stderr
    assert "2/13 tuning iPQ after training" in result.stderr and "3/3" in result.stderr
    assert "…" not in result.stderr


def test_methods_choose_rows(text: Path, tmp_path: Path) -> None:
    arguments = [
        "demo",
        "--preset=tiny",
        f"--data={text}",
        f"--out={tmp_path / 'out'}",
        "--methods=INT8, fp32",
    ]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "int8", "int8", "int8"]
    for word in ("int4", "iPQ", "untuned"):
        assert word not in result.stdout
    assert "3/3 int8 QAT" in result.stderr


def test_help_names_the_methods() -> None:
    result = runner.invoke(app, ["demo", "--help"], env={"COLUMNS": "200"})
    assert "fp32, int8, int8-dynamic, int8-static, int4, ipq, ipq+int8" in result.stdout


def test_json_is_results_json(text: Path, tmp_path: Path) -> None:
    arguments = ["demo", "--preset=tiny", f"--data={text}", f"--out={tmp_path}", "--json", "--steps=3"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "results.json").read_text())
    assert len(printed["rows"]) == 15 and printed["settings"]["steps"] == 3
    assert printed["environment"]["torch"] and printed["text"]["validation_files"] == [str(text)]


def test_ctrl_c_prints_what_is_finished(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step, steps = demo.Trainer.train_step, iter(range(1000))

    def interrupted(self):
        # 5 trainings timed in 6 rounds, the first training, into the second
        if next(steps) == 5 * 6 + 2 + 1:
            raise KeyboardInterrupt
        return train_step(self)

    monkeypatch.setattr(demo.Trainer, "train_step", interrupted)
    arguments = ["demo", "--preset=tiny", f"--data={text}", f"--out={tmp_path}", "--methods=int4,int8"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 130
    assert "full precision" in result.stdout and "Quant-Noise" not in result.stdout
    assert "stopped during the training 'int4 Quant-Noise': 3 of 7 models are finished" in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=missing.txt"], "missing.txt: cannot be read (No such file or directory)"),
        (["--preset=huge"], "preset: expected one of tiny, small, deep, base, got 'huge'"),
        (
            ["--methods=int8,int2"],
            "methods: expected some of fp32, int8, int8-dynamic, int8-static, int4, ipq, ipq+int8, "
            "got 'int2'",
        ),
        (["--steps=0"], "steps: expected at least 1, got 0"),
        (["--device=nowhere"], "device: expected cpu or a GPU that is there, got 'nowhere'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", f"--out={tmp_path / 'out'}", *arguments])
    assert result.exit_code == 1
    assert f"error: {message}" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not list(tmp_path.rglob("*.json"))


def test_out_under_a_file(text: Path) -> None:
    result = runner.invoke(app, ["demo", f"--out={text / 'out'}", f"--data={text}"])
    assert result.exit_code == 1
    assert f"error: {text / 'out'}" in "".join(result.stderr.splitlines())
