"""qnkernels sensitivity, as typed, on what qnkernels demo wrote."""

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import qnkernels as qnk
from qnkernels.cli import app
from qnkernels.recipes import demo, laboratory
from qnkernels.recipes.text import load
from qnkernels.recipes.tokens import Tokenizer
from qnkernels.recipes.training import perplexity
from qnkernels.recipes.transformer import LanguageModel, Shape

runner = CliRunner()
command = importlib.import_module("qnkernels.cli.sensitivity")  # its package has the function by that name
SHAPE = Shape(vocabulary=260, width=16, layers=1, heads=2, context=48)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def f(x):\n    return x + 1\n" * 40)
    return path


@pytest.fixture(scope="module")
def folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a demo of two training steps."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            laboratory.PRESETS, "tiny", laboratory.Preset(SHAPE, batch=2, steps=2, rate=1e-2, validation=100)
        )
        patch.setattr(demo, "TIMING_SECONDS", 0.0)
        patch.setattr(demo, "GENERATING_SECONDS", 0.0)
        arguments = ["demo", "--preset=tiny", f"--data={text}", f"--out={folder}", "--methods=fp32,int8"]
        result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "full-precision.safetensors"


def run(checkpoint: Path, *arguments: object):
    return runner.invoke(app, ["sensitivity", str(checkpoint), *map(str, arguments)])


def test_prints_a_table(checkpoint: Path, text: Path) -> None:
    result = run(checkpoint, f"--data={text}")
    assert result.exit_code == 0, result.output
    for word in ("attention", "ffn", "embedding", "int2", "int3", "int4", "int8", "all groups", "perplexity"):
        assert word in result.stdout
    assert "…" not in result.output and "29/29" in result.stderr and "note" not in result.stderr


def test_json_is_the_result(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """The numbers are those of the API on the model and the text of the demo."""
    result = run(checkpoint, f"--data={text}", "--json", "--bits=3,8", "--pq=8x16", "--per=tensor")
    assert result.exit_code == 0, result.output
    (tmp_path / "s.json").write_text(result.stdout)
    s = qnk.Sensitivity.load(tmp_path / "s.json")
    assert list(s.choices) == ["int3", "int8", "pq8x16"] and s.choices["int3"].per == "tensor"
    assert s.choices["pq8x16"].codebook_dtype == torch.float16
    assert list(s.groups) == ["attention", "ffn", "embedding"]
    assert s.groups["embedding"].layers == ["embedding", "head"]
    model = qnk.load_compressed(LanguageModel(SHAPE), checkpoint)
    merges = json.loads((checkpoint.parent.parent / "tokenizer.json").read_text())["merges"]
    tokens = Tokenizer([tuple(pair) for pair in merges]).encode(load([text]).validation)
    assert s.baseline == perplexity(model, tokens, 100, 2)
    demo_row = json.loads((checkpoint.parent.parent / "results.json").read_text())["rows"][0]
    assert s.baseline == pytest.approx(demo_row["perplexity"], rel=1e-6)
    qnk.quantize_(model, s.choices["int3"], lambda _, name: "fc" in name)
    (row,) = (row for row in s.rows if (row.group, row.choice) == ("ffn", "int3"))
    assert row.only == pytest.approx(perplexity(model, tokens, 100, 2), rel=1e-4)


def test_files(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    picture, table, kept = tmp_path / "s.png", tmp_path / "s.csv", tmp_path / "e.json"
    options = [f"--data={text}", "--bits=8", "--per-layer", f"--out={picture}", f"--csv={table}"]
    result = run(checkpoint, *options, f"--resume={kept}", "--tokens=60")
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    with open(table, newline="") as file:
        groups = [line["group"] for line in csv.DictReader(file)]
    names = ["attention.qkv", "attention.out", "fc1", "fc2"]
    assert groups == ["embedding", *(f"blocks.0.{name}" for name in names)]
    assert len(json.loads(kept.read_text())["evaluations"]) == 12


def test_budget(checkpoint: Path, text: Path) -> None:
    full = sum(parameter.numel() for parameter in LanguageModel(SHAPE).parameters()) * 4
    budget = full // 4
    result = run(checkpoint, f"--data={text}", f"--budget={budget}")
    assert result.exit_code == 0, result.output
    assert f"bytes of {budget:,}, predicted quality" in result.stdout and "bits per weight" in result.stdout
    result = run(checkpoint, f"--data={text}", f"--budget={budget}", "--json")
    allocation = json.loads(result.stdout)["allocation"]
    assert allocation["bytes"] <= budget == allocation["budget_bytes"]
    assert allocation["groups"].keys() == {"attention", "ffn", "embedding"}
    result = run(checkpoint, f"--data={text}", "--budget=100")
    assert result.exit_code == 1 and "all groups" in result.stdout
    assert "budget_bytes: expected at least" in result.stderr and "got 100" in result.stderr


def test_ctrl_c_and_resume(checkpoint: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    measure, calls = command.perplexity, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    options = [f"--data={text}", "--bits=8", f"--resume={tmp_path / 'e.json'}", "--json"]
    whole = run(checkpoint, *options[:2], "--json").stdout
    monkeypatch.setattr(command, "perplexity", interrupted)
    result = run(checkpoint, *options)
    assert result.exit_code == 130 and result.stdout == ""
    assert f"note: stopped; kept is what is finished, in {tmp_path / 'e.json'}" in " ".join(
        result.stderr.split()
    )
    assert run(checkpoint, *options).stdout == whole and len(calls) == 4 + 8 - 3


def test_another_text_is_said(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("import os\n" * 400)
    result = run(checkpoint, f"--data={other}", "--bits=8")
    assert result.exit_code == 0, result.output
    assert "note: the text is not the one that the model was trained on" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits=two"], "bits: expected integers with ',' between, got 'two'"),
        (["--bits=9"], "bits: expected an integer in [2, 8], got 9"),
        (["--bits="], "bits: expected at least one choice here or in pq, got none"),
        (["--pq=8"], "pq: expected block size x codewords, 8x256 say, got '8'"),
        (["--pq=7x16"], "layer 'blocks.0.attention.qkv': block_size: expected a divisor of the 16 weights"),
        (["--per=row"], "per: expected one of ('channel', 'tensor'), got 'row'"),
        (["--group-size=7"], "layer 'blocks.0.attention.qkv': group_size: expected a divisor of the 16"),
        (["--device=nowhere"], "device: expected cpu or a GPU that is there, got 'nowhere'"),
        (["--tokens=0"], "tokens: expected at least 1, got 0"),
        (["--data=missing.txt"], "missing.txt: cannot be read (No such file or directory)"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, checkpoint: Path, text: Path) -> None:
    data = [] if "--data=missing.txt" in arguments else [f"--data={text}"]
    result = run(checkpoint, *data, *arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert f"error: {message}" in " ".join(result.stderr.split()) and "Traceback" not in result.output


def test_checkpoints_that_cannot_be(checkpoint: Path, folder: Path, text: Path, tmp_path: Path) -> None:
    def fails(path: Path, message: str) -> None:
        result = run(path, f"--data={text}")
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.stderr.split()) and "Traceback" not in result.output

    fails(checkpoint.with_name("nothing"), f"checkpoint: no such file, {checkpoint.with_name('nothing')}")
    fails(checkpoint.with_name("int8-qat.safetensors"), "checkpoint: expected full-precision weights, ")
    other = tmp_path / "checkpoints" / checkpoint.name
    other.parent.mkdir()
    other.write_bytes(checkpoint.read_bytes())
    fails(other, f"{tmp_path / 'results.json'}: no such file; expected the folder of qnkernels demo")
    (tmp_path / "results.json").write_text("{")
    fails(other, f"{tmp_path / 'results.json'}: expected JSON")
    results = json.loads((folder / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(results | {"settings": {}}))
    fails(other, f"{tmp_path / 'tokenizer.json'}: no such file")
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    fails(other, f"{tmp_path}: expected results.json and tokenizer.json as qnkernels demo writes them")
    shape = results["settings"]["shape"] | {"width": 32}
    changed = results | {"settings": results["settings"] | {"shape": shape}}
    (tmp_path / "results.json").write_text(json.dumps(changed))
    fails(other, "embedding.weight: expected torch.float32 of shape")
    short = tmp_path / "short.txt"
    short.write_text("x = 1\n")
    result = run(checkpoint, f"--data={short}")
    assert "data: expected at least 50 tokens of validation text, got" in " ".join(result.stderr.split())
