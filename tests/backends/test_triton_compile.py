"""tools/compile_kernels.py: every kernel compiles for both architectures; what it would catch."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "compile_kernels.py"


@pytest.fixture(scope="module")
def program():
    specification = importlib.util.spec_from_file_location("compile_kernels", PROGRAM)
    module = importlib.util.module_from_spec(specification)
    sys.modules["compile_kernels"] = module
    before = list(sys.path)
    specification.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["compile_kernels"]


def run(*arguments, **variables):
    environment = {**os.environ, **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_no_kernel_is_tuned_when_it_is_first_called():
    """One compilation for each variant that is asked for: no configurations to try, no heuristics."""
    code = (
        "import importlib, pkgutil, triton, qnkernels.backends.triton as backend\n"
        "for one in pkgutil.iter_modules(backend.__path__):\n"
        "    module = importlib.import_module(f'{backend.__name__}.{one.name}')\n"
        "    for name, kernel in vars(module).items():\n"
        "        if name.endswith('_kernel'):\n"
        "            print(name, type(kernel).__name__)\n"
    )
    found = dict(line.split() for line in run("-c", code, TRITON_INTERPRET="0").stdout.splitlines())
    assert len(found) >= 30 and set(found.values()) == {"JITFunction"}


# Ops whose Triton kernels are compiled in one test: parts of about the same time.
PARTS = (
    ("int_linear", "int_linear_quantized", "int_linear_backward", "int_embedding"),
    (
        *("block_noise", "kmeans_assign", "kmeans_update", "kmeans_step", "pq_linear", "pq_linear_backward"),
        *("pq_decode", "pq_decode_backward", "pq_embedding", "pq_embedding_backward"),
    ),
    (
        *("fake_quantize", "fake_quantize_backward", "dynamic_fake_quantize", "moving_fake_quantize_"),
        *("low_precision_operands_", "stop_gradient_", "update_range_", "minmax", "histogram_range"),
        "quantization_parameters",
    ),
)


def compiled(*options):
    """What the program reports, all of it without spills and errors."""
    result = run(str(PROGRAM), "--json", *options)
    assert result.stdout, result.stderr
    report = json.loads(result.stdout)
    assert not [one for one in report["kernels"] if one["error"] or one["spills"]]
    assert result.returncode == 0
    return report


@pytest.mark.parametrize("ops", PARTS, ids=lambda ops: ops[0])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_kernel_compiles_without_spills(arch, ops):
    report = compiled("--only", arch, "--ops", *ops)
    kernels = report["kernels"]
    assert kernels and {one["arch"] for one in kernels} == {arch}
    # 99 KiB of shared memory: what a program may have on every GPU since sm_80
    assert all(0 < one["registers"] <= 255 and one["shared"] <= 99 * 1024 for one in kernels)
    assert all(one["threads"] in (32, 64, 128, 256, 512) for one in kernels)
    assert_as_recorded(report)


def assert_as_recorded(report):
    """The committed figures (bench/results/kernels.csv) are the compiler's, if it is of the recorded version.

    Where a kernel was recorded there may have been more variants than there are here, of some ops.
    """
    with (ROOT / "bench" / "results" / "kernels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["compiler"] in report["compilers"].values()]
    compared = 0
    for row in rows:
        key = tuple(row[name] for name in ("backend", "kernel", "arch"))
        ones = [one for one in report["kernels"] if (one["backend"], one["kernel"], one["arch"]) == key]
        hint = f"{key}: run `python tools/compile_kernels.py --record`"
        assert all(one["registers"] <= int(row["most_registers"]) for one in ones), hint
        found = [one for one in ones if one["variant"] == row["variant"]]
        figures = int(row["registers"]), int(row["static_shared"])
        assert not found or figures in [(one["registers"], one["shared"]) for one in found], hint
        compared += bool(found)
    assert compared or not {row["backend"] for row in rows} & {one["backend"] for one in report["kernels"]}


def test_every_kernel_is_compiled():
    """On each architecture one of the calls reaches it; nothing is compiled here."""
    code = f"""
import sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import compile_kernels, kernel_calls
import triton
triton.runtime.JITFunction.warmup = lambda self, *a, **k: 1 / 0
print(*{{op for op, _ in kernel_calls.all_calls()}})
found = [one for arch in (80, 90) for one in compile_kernels.triton_kernels(arch)]
print(*{{one.kernel.removesuffix("_kernel") for one in found if one.error != "no call reaches it"}})
print(*(one.kernel for one in found if one.error == "no call reaches it"))
"""
    result = run("-c", code, PYTHONPATH=str(ROOT))
    ops, reached, missed = result.stdout.split("\n")[:3]
    assert set(ops.split()) == {op for part in PARTS for op in part}
    assert len(reached.split()) >= 30 and not missed
    assert {"fake_quantize", "int_linear_quantized", "search", "nearest_codeword"} <= set(reached.split())


def test_every_kernel_of_the_cuda_library_compiles_without_spills():
    report = compiled("--only", "cuda")
    if not report["nvcc"]:
        pytest.skip("nvcc is not installed")
    names = {one["kernel"] for one in report["kernels"] if one["arch"] == "sm_90a"}
    for family in ("fake_quantize", "int_linear", "kmeans", "pq_linear"):
        assert any(name.startswith(family) for name in names)
    # kernels with wgmma hold 64 sums a thread or more, and are empty elsewhere
    multiplying = [one for one in report["kernels"] if re.search(r"wgmma|warpgroups", one["kernel"])]
    assert len({one["kernel"] for one in multiplying}) == 3
    for one in multiplying:
        assert one["registers"] < 32 if one["arch"] == "sm_80" else one["registers"] > 128
    assert {one["arch"] for one in multiplying} == {"sm_80", "sm_90a"}
    assert_as_recorded(report)


def test_a_spill_in_machine_code_is_seen():
    """A kernel held to 24 registers by the compiler's own option."""
    code = f"""
import sys, types
sys.path.insert(0, {str(PROGRAM.parent)!r})
import compile_kernels
import triton
from qnkernels.backends.triton import launch
warmup = triton.runtime.JITFunction.warmup
triton.runtime.JITFunction.warmup = lambda self, *a, **k: warmup(self, *a, **k, maxnreg=24)
import kernel_calls
kernel_calls.all_calls = lambda: iter([next(kernel_calls.block_noise())])
found = compile_kernels.triton_kernels(80)
print(max(one.spills for one in found), sum(one.error == "no call reaches it" for one in found))
"""
    result = run("-c", code, PYTHONPATH=str(ROOT))
    spills, missed = map(int, result.stdout.split())
    assert spills > 0
    assert missed >= 6


def test_every_variant_is_listed(program):
    known = program.Compiled("odd_kernel", "<1>", "sm_80", 128, 512, threads=256, dynamic=64)
    unknown = program.Compiled("odd_kernel", "<2>", "sm_80", 255, spills=24)
    header, *lines = program.table([known, unknown]).splitlines()
    assert header.split()[-2:] == ["spills", "occupancy"]
    assert " ".join(lines[0].split()) == "odd_kernel <1> sm_80 128 256 512 64 0 25%, registers"
    assert " ".join(lines[1].split()) == "odd_kernel <2> sm_80 255 0 0 24"


def test_a_library_older_than_a_source_is_not_taken(program, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    source, library = tmp_path / "csrc" / "a.cu", tmp_path / "lib.so"
    (tmp_path / "CMakeLists.txt").touch()
    source.touch()
    assert not program.is_current(library)
    library.touch()
    os.utime(library, (2e9, 2e9))
    assert program.is_current(library)
    os.utime(source, (3e9, 3e9))
    assert not program.is_current(library)


@pytest.mark.parametrize(
    "text", ["fma.rn.f32 %f1", "div.full.f32 %f1", "ex2.approx.f32 %f1", "mul.rn.ftz.f32 %f1"]
)
def test_inexact_instructions_are_seen(program, text):
    assert program.INEXACT.search(f"\t{text}, %f2, %f3;")


@pytest.mark.parametrize(
    "text", ["add.rn.f32", "div.rn.f32", "mul.wide.u32", "max.NaN.f32", "cvt.rn.bf16x2.f32"]
)
def test_exact_instructions_pass(program, text):
    assert not program.INEXACT.search(f"\t{text} \t%f1, %f2, %f3;")


def test_fma_is_for_the_kernels_that_divide_by_it(program):
    fma, approximate = "fma.rn.f32 \t%f1, %f2, %f3, %f4;", "rcp.approx.ftz.f32 %f1, %f2;"
    assert program.inexact_instruction("minmax_kernel", fma) == "fma.rn.f32"
    assert program.inexact_instruction("fake_quantize_kernel", fma) is None
    assert program.inexact_instruction("fake_quantize_kernel", fma + approximate) == "rcp.approx.ftz.f32"
    assert program.inexact_instruction("pq_linear_kernel", fma) is None
