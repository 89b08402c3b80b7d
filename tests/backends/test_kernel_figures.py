"""What tools/ says of GPU kernels: figures of the CUDA tools, launches, occupancy, the committed record."""

import ast
import csv
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WGMMA_KERNELS = (
    *("pq_linear_wgmma_kernel", "pq_linear_grad_codebook_wgmma_kernel"),
    "int_linear_warpgroups_kernel",
)
FLAGS = ("-std=c++17", "-O3", "-I", str(ROOT / "csrc"))

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4tamePf' for 'sm_90a'
ptxas info    : Function properties for _Z4tamePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 1536 bytes smem
ptxas info    : Compiling entry function '_Z4wildPf' for 'sm_90a'
ptxas info    : Function properties for _Z4wildPf
    16 bytes stack frame, 24 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


@pytest.fixture
def tool(monkeypatch):
    """A module of tools/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in {"cuda_tools", "cuda_launches", "kernel_calls", "kernel_record"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def cuda_tools(tool):
    return tool("cuda_tools")


@pytest.fixture
def nvcc():
    return shutil.which("nvcc") or pytest.skip("nvcc is not installed")


def test_products_that_wait_for_each_other_are_seen(cuda_tools):
    warning = (
        "ptxas info : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "non wgmma instructions defining input registers of a wgmma in the function '_Z4wildPf'\n"
    )
    tame, wild = cuda_tools.parse_ptxas(warning + PTXAS, "odd.cu", "sm_90a")
    assert not tame.error and wild.error == "wgmma is serialized"


def test_ptxas_report_is_read(cuda_tools):
    tame, wild = cuda_tools.parse_ptxas(PTXAS, "odd.cu", "sm_90a")
    assert (tame.registers, tame.shared, tame.spills) == (12, 1536, 0)
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
def test_wgmma_that_waits_is_seen(cuda_tools, words):
    tame, wild = cuda_tools.parse_ptxas(f"ptxas info    : {words}\n{PTXAS}", "odd.cu", "sm_90a")
    assert tame.error and not wild.error


# Machine code of products in groups of two, and as ptxas makes it where each has to wait.
GROUPS = """
	code for sm_90a
		Function : _Z4tamePf
        /*2e40*/                   WARPGROUP.ARRIVE ;
        /*2e50*/                   HGMMA.64x128x16.F32 R88, R168, gdesc[UR16], R88 ;
        /*2e70*/                   HGMMA.64x128x16.F32 R24, R172, gdesc[UR16], R24, gsb0 ;
        /*2f30*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*3980*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
		Function : _Z4wildPf
        /*3010*/                   WARPGROUP.ARRIVE ;
        /*3080*/                   HGMMA.64x128x16.F32 R88, R152, gdesc[UR16], R88, gsb0 ;
        /*30b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*30c0*/                   WARPGROUP.ARRIVE ;
        /*3100*/                   HGMMA.64x128x16.F32 R24, R156, gdesc[UR16], R24, gsb0 ;
        /*31d0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
		Function : _Z5emptyPf
        /*0010*/                   EXIT ;
"""


def test_products_that_wait_are_seen_in_machine_code(cuda_tools):
    names = ("_Z4tamePf", "_Z4wildPf", "_Z5emptyPf")
    kernels = [cuda_tools.Compiled("", "", "sm_90a", symbol=name) for name in names]
    cuda_tools.mark_serialized(kernels, GROUPS)
    assert [one.error for one in kernels] == ["", "wgmma is serialized", "it has no wgmma"]


def test_kernels_that_use_wgmma_are_known_by_their_names(cuda_tools):
    """Those of the sources that multiply by it."""
    kernels = set()
    for path in (ROOT / "csrc" / "cuda").iterdir():
        text = path.read_text()
        if path.name != "wgmma.h" and re.search(r"\bwgmma_m64k16\w*<", text):
            kernels |= set(re.findall(r"\b(\w+_kernel)\(", text))
    assert kernels == set(WGMMA_KERNELS)
    assert all(cuda_tools.uses_wgmma(cuda_tools.Compiled(name, "", "sm_90a")) for name in kernels)
    assert not cuda_tools.uses_wgmma(cuda_tools.Compiled("pq_linear_tiles_kernel", "", "sm_90a"))


def test_machine_code_of_a_library_is_read(cuda_tools, nvcc, tmp_path):
    """Compiled here: sums that are changed between products, which ptxas makes wait."""
    source = tmp_path / "odd.cu"
    source.write_text(WAITING)
    command = [nvcc, *FLAGS, "-arch=sm_90a", "-c", "-o", tmp_path / "odd.o", source]
    subprocess.run(command, check=True)
    errors = {one.variant: one.error for one in cuda_tools.library_kernels(tmp_path / "odd.o")}
    assert errors == {"tame_wgmma_kernel": "", "wild_wgmma_kernel": "wgmma is serialized"}


WAITING = """
#include "cuda/device.h"
#include "cuda/wgmma.h"
using namespace qnk;

template <bool Wait>
__device__ void multiply(float* y, uint64_t tile) {
    float d[32] = {};
    wgmma_fence(d);
    for (int i = 0; i < 8; ++i) {
        wgmma_m64k16_across<bf16>(d, tile + i, tile + 2 * i);
        wgmma_m64k16_across<bf16>(d, tile + i, tile + 3 * i);
        wgmma_commit();
        if (Wait) d[0] += 1.0f;
    }
    wgmma_wait<0>();
    wgmma_results(d);
    for (int i = 0; i < 32; ++i) y[i * 128 + threadIdx.x] = d[i];
}

__global__ void __launch_bounds__(128) tame_wgmma_kernel(float* y, uint64_t a) { multiply<false>(y, a); }
__global__ void __launch_bounds__(128) wild_wgmma_kernel(float* y, uint64_t a) { multiply<true>(y, a); }
"""


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
  REG:255 STACK:16 SHARED:1536 LOCAL:24 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usage_of_a_library_is_read(cuda_tools):
    tame, wild = cuda_tools.parse_usage(USAGE)
    assert (tame.kernel, tame.arch, tame.registers, tame.shared) == ("tame_kernel", "sm_80", 29, 512)
    assert tame.spills == 0 and wild.spills == 40
    # without the KiB that the system takes, which is reported for sm_90 alone
    assert (wild.arch, wild.registers, wild.shared) == ("sm_90a", 255, 512)


NOTED = """
#include "cuda/device.h"

template <int Shared>
__global__ void __launch_bounds__(256) tame_kernel(float* y) {
    QNK_SHARED(float, tile, [Shared]);
    QNK_SHARED_MEMORY(memory);
    tile[threadIdx.x] = memory[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[255 - threadIdx.x];
}

extern "C" int start(int threads, int shared) {
    return qnk::launch(tame_kernel<256>, 7, threads, shared, nullptr, static_cast<float*>(nullptr));
}
extern "C" int start_without_asking(int shared) {
    tame_kernel<512><<<7, 128, shared>>>(nullptr);
    return cudaGetLastError();
}
extern "C" int processors() { return qnk::processors(); }
namespace qnk {
int wgmma_use() { return 1; }
}
"""


def test_launches_are_noted(tool, nvcc, tmp_path):
    """With what the device allows: a launch that asks for more is an error, and not noted."""
    launches, cuda_tools = tool("cuda_launches"), tool("cuda_tools")
    source = tmp_path / "odd.cu"
    source.write_text(NOTED)
    path = launches.build(tmp_path, [source], nvcc, FLAGS)
    with launches.device(path, "sm_80") as library:
        assert library.processors() == 108
        assert library.start(256, 0) == library.start(128, 0) == library.start(256, 163 << 10) == 0
        assert library.start(256, (163 << 10) + 1) == library.start_without_asking((48 << 10) + 1) == 1
        assert library.start_without_asking(48 << 10) == 0
        noted = launches.noted(library)
    with launches.device(path, "sm_90a") as library:
        assert library.processors() == 132 and library.start(256, 227 << 10) == 0
        assert list(launches.noted(library).values()) == [{(256, 227 << 10)}]
    kernels = {one.variant: one for one in cuda_tools.library_kernels(path) if one.arch == "sm_80"}
    tame, wild = (kernels[f"tame_kernel<{size}>"] for size in (256, 512))
    assert noted[tame.symbol] == {(256, 0), (128, 0), (256, 163 << 10)}
    assert noted[wild.symbol] == {(128, 48 << 10)}
    assert (tame.shared, wild.shared) == (1024, 2048)


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks", "limit"),
    [
        ("sm_80", 32, 256, 0, 8, "threads"),
        ("sm_90a", 32, 1024, 0, 2, "threads"),
        ("sm_80", 33, 256, 0, 6, "registers"),  # 5 units a warp: 12 of a scheduler
        ("sm_80", 128, 256, 0, 2, "registers"),
        ("sm_80", 255, 512, 0, 0, "registers"),
        ("sm_90", 168, 96, 0, 4, "registers"),  # 21 units a warp: 3 of a scheduler, 12 of all
        ("sm_80", 16, 32, 0, 32, "blocks"),
        ("sm_80", 32, 256, 81 << 10, 2, "shared memory"),
        ("sm_80", 32, 256, (81 << 10) + 1, 1, "shared memory"),
        ("sm_90", 32, 256, 227 << 10, 1, "shared memory"),
        ("sm_90", 32, 256, 75 << 10, 3, "shared memory"),
    ],
)
def test_occupancy(tool, arch, registers, threads, shared, blocks, limit):
    found = tool("kernel_record").occupancy(arch, registers, threads, shared)
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * threads // 32, limit)
    assert found.share == blocks * threads / 2048


def test_a_row_is_the_variant_with_the_lowest_occupancy(tool, tmp_path):
    record = tool("kernel_record")
    ones = [
        record.Compiled("a_kernel", name, "sm_80", registers, threads=threads, dynamic=dynamic, symbol=name)
        for name, registers, threads, dynamic in (
            ("one", 40, 256, 0),
            ("two", 128, 256, 0),
            ("two", 128, 256, 100 << 10),
            ("three", 130, 128, 100 << 10),
            ("four", 200, 0, None),
        )
    ]
    (row,) = record.rows(ones, {"cuda": "nvcc 1.0"})
    assert (row["variant"], row["variants"], row["launched"], row["blocks"]) == ("three", "4", "3", "1")
    assert (row["registers"], row["most_registers"], row["limit"]) == ("130", "200", "shared memory")
    assert (row["occupancy"], row["highest_occupancy"]) == ("0.062", "0.750")
    (alone,) = record.rows(ones[4:], {"cuda": "nvcc 1.0"})
    assert (alone["occupancy"], alone["dynamic_shared"], alone["limit"]) == ("", "", "not launched")
    path = tmp_path / "kernels.csv"
    record.update(path, [row, {**row, "arch": "sm_90a"}])
    record.update(path, [alone])
    assert record.read(path) == [alone, {**row, "arch": "sm_90a"}]


@pytest.fixture
def rows():
    with (ROOT / "bench" / "results" / "kernels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def triton_kernels():
    """Names of the kernels of the Triton backend: jitted functions whose name ends in _kernel."""
    for path in (ROOT / "qnkernels" / "backends" / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            jitted = isinstance(node, ast.FunctionDef) and any(
                ast.unparse(one).startswith("triton.jit") for one in node.decorator_list
            )
            if jitted and node.name.endswith("_kernel"):
                yield node.name


def cuda_kernels():
    for path in (ROOT / "csrc" / "cuda").iterdir():
        yield from re.findall(r"__global__\s.*?\b(\w+_kernel)\(", path.read_text(), re.DOTALL)


def test_every_kernel_is_in_the_record(rows):
    """Each kernel of the sources, for both architectures, and no other."""
    expected = [("triton", name, arch) for name in triton_kernels() for arch in ("sm_80", "sm_90")]
    expected += [("cuda", name, arch) for name in cuda_kernels() for arch in ("sm_80", "sm_90a")]
    recorded = [(row["backend"], row["kernel"], row["arch"]) for row in rows]
    assert len(expected) > 100
    assert sorted(expected) == recorded, "run `python tools/compile_kernels.py --record`"


def test_what_is_recorded_follows_from_its_figures(tool, rows):
    """No kernel spills, each is launched, and its occupancy is that of its registers, threads and memory."""
    occupancy = tool("kernel_record").occupancy
    for row in rows:
        assert row["spills"] == "0"
        if row["arch"] == "sm_80" and row["kernel"] in WGMMA_KERNELS:
            assert row["limit"] == "not launched" and int(row["most_registers"]) < 32
            continue
        assert 0 < int(row["launched"]) <= int(row["variants"])
        shared = int(row["static_shared"]) + int(row["dynamic_shared"])
        found = occupancy(row["arch"], int(row["registers"]), int(row["threads"]), shared)
        assert 0 < found.blocks == int(row["blocks"]) and found.warps == int(row["warps"])
        assert (f"{found.share:.3f}", found.limit) == (row["occupancy"], row["limit"])
        assert row["highest_occupancy"] >= row["occupancy"]
