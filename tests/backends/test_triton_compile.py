"""tools/compile_kernels.py: every kernel compiles for both architectures; what it would catch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "compile_kernels.py"

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4tamePf' for 'sm_90a'
ptxas info    : Function properties for _Z4tamePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compiling entry function '_Z4wildPf' for 'sm_90a'
ptxas info    : Function properties for _Z4wildPf
    16 bytes stack frame, 24 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def program():
    specification = importlib.util.spec_from_file_location("compile_kernels", PROGRAM)
    module = importlib.util.module_from_spec(specification)
    sys.modules["compile_kernels"] = module
    specification.loader.exec_module(module)
    yield module
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


# Variants differ in registers alike on both: all of them for one, and some of every kernel's for the other.
SHARES = {"sm_80": 0.35, "sm_90": 1.0}


@pytest.mark.parametrize("ops", PARTS, ids=lambda ops: ops[0])
@pytest.mark.parametrize("arch", SHARES)
def test_every_kernel_compiles_without_spills(arch, ops):
    kernels = compiled("--only", arch, "--share", str(SHARES[arch]), "--ops", *ops)["kernels"]
    assert kernels and {one["arch"] for one in kernels} == {arch}
    # 99 KiB of shared memory: what a program may have on every GPU since sm_80
    assert all(0 < one["registers"] <= 255 and one["shared"] <= 99 * 1024 for one in kernels)


def test_every_kernel_is_compiled():
    """On each architecture one of its calls is among those drawn; nothing is compiled here."""
    code = f"""
import sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import compile_kernels, kernel_calls
import triton
triton.runtime.JITFunction.warmup = lambda self, *a, **k: 1 / 0
print(*{{op for op, _ in kernel_calls.all_calls()}})
shares = {list(SHARES.items())}
found = [one for arch, share in shares for one in compile_kernels.triton_kernels(int(arch[3:]), share=share)]
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
    # kernels with wgmma hold 128 sums a thread, and are empty elsewhere
    registers = {
        arch: [
            one["registers"] for one in report["kernels"] if one["arch"] == arch and "wgmma" in one["variant"]
        ]
        for arch in ("sm_80", "sm_90a")
    }
    assert registers["sm_80"] and max(registers["sm_80"]) < 32 and min(registers["sm_90a"]) > 128


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


def test_products_that_wait_for_each_other_are_seen(program):
    warning = (
        "ptxas info : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "non wgmma instructions defining input registers of a wgmma in the function '_Z4wildPf'\n"
    )
    tame, wild = program.parse_ptxas(warning + PTXAS, "odd.cu", "sm_90a")
    assert not tame.error and wild.error == "wgmma is serialized"


def test_ptxas_report_is_read(program):
    tame, wild = program.parse_ptxas(PTXAS, "odd.cu", "sm_90a")
    assert (tame.registers, tame.shared, tame.spills) == (12, 512, 0)
    assert (wild.registers, wild.shared, wild.spills) == (255, 0, 24)
    assert (wild.kernel, wild.arch) == ("odd.cu", "sm_90a")
    assert "wild" in wild.variant


@pytest.mark.parametrize(
    "words",
    [
        "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient"
        " register resources for the wgmma pipeline in the function '_Z4tamePf'",
        "(C7517) warpgroup.wait is injected in around line 174 by compiler to allow use of registers defined"
        " by GMMA in function '_Z4tamePf'",
    ],
)
def test_wgmma_that_waits_is_seen(program, words):
    tame, wild = program.parse_ptxas(f"ptxas info    : {words}\n{PTXAS}", "odd.cu", "sm_90a")
    assert tame.error and not wild.error


USAGE = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN3qnk49_GLOBAL__N__0e502c91_16_fake_quantize_cu_9a7dba4d11tame_kernelEv:
  REG:29 STACK:0 SHARED:512 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _Z4wildPf:
  REG:255 STACK:16 SHARED:0 LOCAL:24 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usage_of_a_library_is_read(program):
    tame, wild = program.parse_usage(USAGE)
    assert (tame.kernel, tame.arch, tame.registers, tame.shared) == ("tame_kernel", "sm_80", 29, 512)
    assert tame.spills == 0 and wild.spills == 40
    assert (wild.arch, wild.registers) == ("sm_90a", 255)


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


def test_summary_keeps_the_largest_figures(program):
    ones = program.parse_ptxas(PTXAS, "odd.cu", "sm_90a")
    (row,) = program.summary(ones)
    assert (row.registers, row.shared, row.spills, row.variant) == (255, 512, 24, "2 variants")
    assert "odd.cu" in program.table([row]) and "255" in program.table([row])


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
