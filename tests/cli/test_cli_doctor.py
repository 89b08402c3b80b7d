"""qnkernels doctor."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qnkernels import backends
from qnkernels.backends import native
from qnkernels.cli import app
from qnkernels.ops import OPS

runner = CliRunner()


def findings() -> dict:
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_says_what_serves_each_op() -> None:
    found = findings()
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["serving"]) == {"cpu", "cuda"}
    for device, served in found["serving"].items():
        assert served == {op: backends.serving(op, device) for op in OPS}
    assert found["backends"]["reference"] == "available"
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["build"] == native.build_info()


def test_the_cpu_library_describes_itself() -> None:
    found = findings()
    order = ["portable", "avx2", "avx512", "amx"]
    cpu = found["cpu"]
    assert order.index(cpu["isa"]) <= order.index(cpu["isa_detected"])
    assert cpu["threads"] == torch.get_num_threads() and cpu["openmp"] is True


def test_table() -> None:
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    for word in (*OPS, "torch", "cpu: isa", "reference", "available"):
        assert word in result.stdout


def test_works_with_nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(backends, "_load", backends._load.__wrapped__)
    found = findings()
    assert found["build"] == {} and found["cpu"] == {}
    assert found["backends"]["cpu"].startswith("the cpu library was not built; run `pip install .`")
    assert set(found["serving"]["cpu"].values()) == {"reference"}
    assert "nothing was built" in runner.invoke(app, ["doctor"]).stdout
