"""What sensitivity returns: tables, CSV, JSON and pictures, a loaded result, progress."""

import csv
import io
import json

import pytest
from helpers_sensitivity import GROUPS, PRODUCT, loss, measure
from rich.console import Console

import qnkernels as qnk


def test_table_csv_and_json(tmp_path):
    s = measure(pq=[PRODUCT])
    console = Console(width=80, file=io.StringIO())
    console.print(s.table())
    text = console.file.getvalue()
    for word in (
        *GROUPS,
        *s.choices,
        f"{s.rows[0].only:.5g}",
        "all groups",
        "left" and "conv",
        "lower is better",
    ):
        assert word in text
    assert "…" not in text
    s.to_csv(tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["group"], line["choice"]) for line in lines] == [(row.group, row.choice) for row in s.rows]
    for line, row in zip(lines, s.rows, strict=True):
        assert (float(line["only"]), float(line["all_but"])) == (row.only, row.all_but)
        assert (int(line["parameters"]), int(line["bytes"])) == (row.parameters, row.bytes)
        assert float(line["all_quantized"]) == s.all_quantized[row.choice]
        assert float(line["baseline"]) == s.baseline
    s.save(tmp_path / "s.json")
    assert qnk.Sensitivity.load(tmp_path / "s.json") == s
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["s.csv", "s.json"]


def test_a_loaded_result_is_checked(tmp_path):
    path = tmp_path / "s.json"
    value = measure().to_json()
    edits = [
        lambda v: v.update(format="other"),
        lambda v: v.pop("rows"),
        lambda v: v["rows"].pop(),
        lambda v: v["rows"][0].update(only="1"),
        lambda v: v.update(more=1),
        lambda v: v["choices"]["int3"].update(bits=9),
        lambda v: v["choices"]["int3"].update(type="Other"),
        lambda v: v.update(baseline=None),
    ]
    for edit in edits:
        changed = json.loads(json.dumps(value))
        edit(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{path}: expected a saved Sensitivity, got another file"):
            qnk.Sensitivity.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a saved Sensitivity"):
        qnk.Sensitivity.load(path)


@pytest.mark.parametrize("constant", [False, True])
def test_picture(constant, tmp_path):
    s = measure(evaluate=(lambda _: 1.0) if constant else loss, pq=[PRODUCT])
    s.plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    s.plot(tmp_path / "s.svg")
    drawn = (tmp_path / "s.svg").read_text()
    for word in (*GROUPS, *s.choices, "only this group quantized", "all but this group quantized"):
        assert word in drawn
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["s.png", "s.svg"]


def test_progress_goes_to_stderr(capsys):
    measure(progress=True)
    captured = capsys.readouterr()
    assert "15/15" in captured.err and captured.out == ""
    measure()
    assert capsys.readouterr().err == ""
