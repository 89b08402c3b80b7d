"""qnkernels demo --experiment: the table, JSON, and errors a person can read."""

import json

import pytest
from typer.testing import CliRunner

from qnkernels.cli import app
from qnkernels.recipes import laboratory
from qnkernels.recipes.transformer import Shape

SHAPE = Shape(vocabulary=300, width=16, layers=2, heads=2, context=48)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = laboratory.Preset(SHAPE, batch=2, steps=2, rate=1e-2, validation=200)
    monkeypatch.setitem(laboratory.PRESETS, "tiny", preset)


@pytest.fixture
def command(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x, y):\n    return x * {i} + y[{i % 7}]\n" for i in range(800)))
    monkeypatch.chdir(tmp_path)
    return lambda *more: ["demo", "--preset", "tiny", "--data", str(text), "--experiment", *more]


def test_the_table_and_where_the_files_are(command, tmp_path):
    result = CliRunner().invoke(app, command("layerdrop", "--seeds", "0,1"))
    assert result.exit_code == 0, result.output
    assert "Quant-Noise with LayerDrop: 2 layers of width 16, 2 steps" in result.output
    assert "LayerDrop 0.2, half of them" in result.output
    assert "layerdrop.json, .csv, .md and .png are in runs/layerdrop" in result.output
    assert (tmp_path / "runs/layerdrop/layerdrop.png").exists()


def test_json(command):
    result = CliRunner().invoke(app, command("sensitivity", "--seeds", "4", "--out", "here", "--json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["experiment"] == "sensitivity" and list(found["runs"]["sensitivity"]) == ["4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("tables",), "experiment: expected one of table1, cpt, sensitivity, layerdrop, noise, got 'tables'"),
        (("cpt", "--seeds", "a"), "seeds: expected integers separated by commas, got 'a'"),
        (("cpt", "--seeds", "0,0"), "seeds: expected different integers"),
        (("cpt", "--steps", "0"), "steps: expected at least 1, got 0"),
    ],
)
def test_errors(command, options, message):
    result = CliRunner().invoke(app, command(*options))
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
