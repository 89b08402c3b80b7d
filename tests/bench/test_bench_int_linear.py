"""bench_int_linear.py and int_linear_ratios.py: peers do the same work, figures are what they say."""

import importlib
import random

import pytest
import torch

import int_linear_ratios as ratios
import report
from environment import FIELDS

CPU = torch.device("cpu")
suite = importlib.import_module("bench_int_linear")


@pytest.mark.parametrize("dtype", suite.SHORT, ids=str)
@pytest.mark.parametrize("kind", suite.KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("batch", [4, 64])
def test_the_contenders_compute_the_same_function(kind, dtype, batch):
    inputs = suite.make_inputs((64, 256), batch, kind.bits, dtype, CPU, random.randrange(2**31))
    exact = suite.dense(torch.float32, inputs)()
    bound = {"weight-only int8": 0.02, "dynamic int8": 0.03, "weight-only int4": 0.15}[kind.name]
    for contender in suite.contenders(kind, dtype, (64, 256), batch, "cpu"):
        y = contender.prepare(inputs)()
        if contender.name == "copy_ codes":
            assert torch.equal(y, inputs.packed)
            continue
        assert y.dtype == dtype or contender.name == "F.linear bf16", contender.name
        assert (y.float() - exact).norm() / exact.norm() < bound, contender.name


def test_each_class_has_its_peers():
    names = {
        (kind.name, dtype): {one.name.split()[0] for one in suite.contenders(kind, dtype, (64, 64), 4, "cpu")}
        for kind in suite.KINDS
        for dtype in suite.SHORT
    }
    for (kind, dtype), found in names.items():
        assert {"reference", "F.linear", "copy_"} <= found
        assert ("quantize_dynamic" in found) == (kind == "dynamic int8" and dtype == torch.float32)
        assert ("_weight_int8pack_mm" in found) == (kind == "weight-only int8")
        assert ("_weight_int4pack_mm" in found) == (kind == "weight-only int4")
        if "torchao" not in suite.LEFT_OUT:
            assert ("torchao" in found) == ("int8" in kind)
    large = {one.role for one in suite.contenders(suite.INT8, torch.float32, (4096, 4096), 64, "cpu")}
    assert "reference" not in large


def test_gemlite_takes_part_on_a_gpu(monkeypatch):
    """With 16-bit activations, in every class; and out of the list where it is not installed."""
    monkeypatch.setattr(suite, "version", lambda package: "1.0")
    monkeypatch.setattr(suite, "LEFT_OUT", [])

    def has(kind, dtype, device):
        return "gemlite 1.0" in {one.name for one in suite.contenders(kind, dtype, (64, 64), 4, device)}

    for kind in suite.KINDS:
        assert has(kind, torch.bfloat16, "cuda")
        assert not has(kind, torch.float32, "cuda") and not has(kind, torch.bfloat16, "cpu")
    monkeypatch.setattr(suite, "LEFT_OUT", ["gemlite"])
    assert not has(suite.INT4, torch.bfloat16, "cuda")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_compiled_formula_is_that_of_the_layer(bits):
    inputs = suite.make_inputs((64, 256), 4, bits, torch.bfloat16, CPU, 5)
    y, exact = (suite.formula(suite.decode_and_multiply, inputs)(), suite.dense(torch.float32, inputs)())
    assert y.dtype == torch.bfloat16 and (y.float() - exact).norm() / exact.norm() < 0.15


def test_the_cases_are_those_of_the_target():
    cases = [case for case in suite.CASES if case.devices == ("cpu",)]
    assert len(cases) == 3 * 2 * 4 * 5
    sizes = {case.shape for case in cases}
    assert {"768x768 batch 1", "3072x768 batch 4", "4096x4096 batch 64", "11008x4096 batch 256"} <= sizes
    assert [case.op for case in cases].count("int_linear_quantized") == 40
    sizes = {case.shape for case in suite.CASES if case.devices == ("cuda",)}
    assert {f"8192x8192 batch {batch}" for batch in (1, 16, 256, 4096)} <= sizes


def row(case: str, contender: str, role: str, seconds: float, dtype: str = "float32") -> report.Row:
    known = {"op": "int_linear", "case": case, "shape": case.split(", ")[1], "dtype": dtype}
    measured = {"contender": contender, "role": role, "median_s": str(seconds), "device": "A Processor"}
    return dict.fromkeys((*report.COLUMNS, *FIELDS), "") | known | measured


INT8, INT4 = "weight-only int8 bf16", "weight-only int4 bf16"


def rows() -> list[report.Row]:
    one, many = "4096x4096 batch 1", "768x768 batch 64"
    return [
        row(f"{INT8}, {one}", "cpu", "ours", 1e-3, "bfloat16"),
        row(f"{INT8}, {one}", "copy_ codes", "ceiling", 1e-4, "bfloat16"),
        row(f"{INT8}, {one}", "F.linear bf16", "peer", 4e-3, "bfloat16"),
        row(f"{INT8}, {one}", "torchao", "peer", 3e-3, "bfloat16"),
        row(f"{INT8}, {many}", "cpu", "ours", 1e-3, "bfloat16"),
        row(f"{INT8}, {many}", "F.linear bf16", "ceiling", 0.75e-3, "bfloat16"),
        row(f"{INT8}, {many}", "torchao", "peer", 9e-3, "bfloat16"),
        row(f"{INT4}, {one}", "cpu", "ours", 5e-4, "bfloat16"),
        row(f"{INT4}, {one}", "_weight_int4pack_mm", "peer", 4e-4, "bfloat16"),
        row("dynamic int8 fp32, 768x768 batch 64", "reference", "reference", 1.0),
        row("dynamic int8 fp32, 768x768 batch 64", "F.linear bf16", "ceiling", 1e-9),
        row("dynamic int8 fp32, 768x768 batch 64", "quantize_dynamic", "peer", 2e-3),
        row("weight-only int8 fp32, 768x768 batch 64", "cpu", "ours", 1e-3),
        row("weight-only int8 fp32, 768x768 batch 64", "F.linear bf16", "ceiling", 1e-9),
        row("weight-only int8 fp32, 768x768 batch 64", "F.linear fp32", "peer", 2e-3),
    ]


def test_the_fastest_peer_of_the_class_counts():
    found = {(point.kind, point.shape): (point.peer, point.ratio) for point in ratios.points(rows())}
    assert found == {
        (INT8, "4096x4096 batch 1"): ("torchao", pytest.approx(3.0)),
        (INT8, "768x768 batch 64"): ("F.linear bf16", pytest.approx(0.75)),
        (INT4, "4096x4096 batch 1"): ("_weight_int4pack_mm", pytest.approx(0.8)),
        ("weight-only int8 fp32", "768x768 batch 64"): ("F.linear fp32", pytest.approx(2.0)),
    }


def test_the_summary_tells_means_worst_points_and_four_bits(tmp_path, capsys):
    path = tmp_path / "int_linear.csv"
    report.write_csv(path, [{name: one[name] for name in report.COLUMNS} for one in rows()])
    assert ratios.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A Processor: 5 cases, 4 of ours"
    assert "mean  1.50x" in lines[2] and "lowest  0.75x at 768x768 batch 64 (F.linear bf16 750 us" in lines[2]
    assert lines[2].endswith("1 below 0.9x") and lines[2].startswith(INT8)
    assert "mean  1.38x" in next(line for line in lines if line.startswith("all"))
    assert lines[-1].startswith(f"{INT4}, 4096x4096 batch 1: 2.00x our int8") and lines[-1].endswith(
        "int8 1 ms"
    )


def test_without_results_it_says_how_to_get_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ratios, "ROOT", tmp_path)
    assert ratios.main([]) == 1
    assert "python bench/run.py int_linear" in capsys.readouterr().err
