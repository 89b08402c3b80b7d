"""The CPU library: instruction sets, the shared OpenMP runtime, and how its absence is told."""

import json
import os
import subprocess
import sys

import pytest

from qnkernels import BackendUnavailable, backend
from qnkernels.backends import cpu, native

ISAS = ("portable", "avx2", "avx512", "amx")

# digests of every kernel's results; printed by a process with another instruction set
PROBE = """
import ctypes, hashlib, json, torch
from qnkernels.backends import kernels, native
cpu = kernels("cpu")
library = native.open_library("cpu")
library.qnk_cpu_isa.restype = ctypes.c_char_p
generator = torch.Generator().manual_seed(7)
results = {}
def keep(name, tensor):  # a NaN is a NaN: its payload is not part of the contract
    values = tensor.float().nan_to_num(nan=12345.0)
    results[name] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
bits, seed = torch.tensor(4), torch.tensor(2**40 + 3)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = (torch.randn(37, 259, generator=generator) * 3).to(dtype)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), 6e-8])
    scale, zero_point = torch.tensor(0.31), torch.tensor(7.0)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        y = cpu["fake_quantize"](x, scale, zero_point, bits, 0.37, seed, None, None, out)
        keep(f"fake_quantize {dtype} {out}", y)
        gradient = cpu["fake_quantize_backward"](y, x, scale, zero_point, bits, 0.37, seed)
        keep(f"backward {dtype} {out}", gradient)
        for kind in ("zero", "mean"):
            keep(f"{kind} {dtype} {out}", cpu["block_noise"](x, 7, 0.3, seed, kind, True, out))
    keep(f"minmax {dtype}", torch.stack(cpu["minmax"](x[1:], 0)))
    keep(f"histogram {dtype}", torch.stack(cpu["histogram_range"](x[1:].contiguous(), bits, 0)))
print(json.dumps({"isa": library.qnk_cpu_isa().decode(), "results": results}))
"""


def probe(isa: str) -> dict:
    environment = {**os.environ, "QNKERNELS_ISA": isa}
    run = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_instruction_set_gives_the_same_bits():
    """Forcing one that this processor lacks gives the best that it has, which is compared all the same."""
    best = probe("amx")
    for isa in ISAS[: ISAS.index(best["isa"])]:
        lower = probe(isa)
        assert lower["isa"] == isa
        assert lower["results"] == best["results"]


def test_one_openmp_runtime_is_mapped():
    code = (
        "import torch, qnkernels\n"
        "qnkernels.functional.minmax(torch.ones(10**6))\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({word for word in maps if 'libgomp' in word or 'libiomp' in word}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"


def test_threads_are_those_of_torch():
    import torch

    library = native.open_library("cpu")
    assert library.qnk_cpu_has_openmp() == 1
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert library.qnk_cpu_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert library.qnk_cpu_threads() == threads


def test_missing_and_broken_libraries_are_told_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(BackendUnavailable, match=r"cpu library was not built; run `pip install .`"):
        native.open_library("cpu")
    with pytest.raises(BackendUnavailable, match="nvcc"):
        native.open_library("cuda")
    (tmp_path / "libqnkernels_cpu.so").write_bytes(b"not a library")
    with pytest.raises(BackendUnavailable, match="does not load"):
        native.open_library("cpu")


def test_unknown_instruction_set_is_told(monkeypatch):
    monkeypatch.setenv("QNKERNELS_ISA", "avx1024")
    with pytest.raises(BackendUnavailable, match=r"portable, avx2, avx512, amx, got 'avx1024'"):
        cpu.load()


def test_old_library_is_told(tmp_path):
    with pytest.raises(BackendUnavailable, match="older than this package"):
        native.declare(native.open_library("cpu"), "cpu", {"kernel_of_tomorrow": []})


def test_forcing_backends():
    with pytest.raises(ValueError, match="'gpu'"), backend("gpu"):
        pass
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable), backend("cuda"):
            pass
    with backend("reference"), backend("cpu"):
        pass


def test_fallback_to_the_reference_warns_once(tmp_path):
    code = (
        "import warnings, torch\n"
        "from pathlib import Path\n"
        "from qnkernels.backends import native\n"
        f"native.FOLDER = Path({str(tmp_path)!r})\n"
        "import qnkernels.functional as F\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): low, high = F.minmax(torch.tensor([2.0, -1.0]))\n"
        "assert (low, high) == (-1, 2)\n"
        "print(len([w for w in caught if 'slow reference' in str(w.message)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "1", run.stderr
