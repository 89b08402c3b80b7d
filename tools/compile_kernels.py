"""Compile every GPU kernel, without a GPU: `python tools/compile_kernels.py [--all] [--json]`
`[--only sm_80 | sm_90 | cuda] [--ops OP ...] [--record]`.

Triton kernels: each variant (kernel_calls.py) for sm_80 and sm_90. csrc/cuda/*.cu, where nvcc is found: for
sm_80 and sm_90a, with the flags of CMakeLists.txt; a CUDA library that was built from the sources as they
are now is read instead of compiling them again. Prints registers, threads, shared memory and spills as
reported by cuobjdump and ptxas, and the occupancy that they give. --only: the Triton kernels of one
architecture, or csrc/cuda; --ops: the Triton kernels of some ops; --record: brings
bench/results/kernels.csv up to date (kernel_record.py), for which launches of CUDA kernels are noted, too
(cuda_launches.py): without it, what dynamic shared memory they ask for is unknown. Exits with 1 if a kernel
spills, does not compile, is reached by no call (without --ops), has, where it must be exact, an instruction
that is not, or has wgmma products that ptxas made to wait for each other.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kernel_record
from cuda_tools import cubin_usage, library_kernels, output, parse_ptxas
from kernel_record import Compiled

ROOT = Path(__file__).resolve().parent.parent
# architecture -> multiprocessors of its GPU (A100, H100), which the launchers ask for
TRITON_ARCHS = {80: 108, 90: 132}
CUDA_ARCHS = ("sm_80", "sm_90a")
LIBRARY = ROOT / "qnkernels" / "lib" / "libqnkernels_cuda.so"
RECORD = ROOT / "bench" / "results" / "kernels.csv"
# Not rounded once per operation: the quantizers would differ from the reference.
APPROXIMATE = r"\b(?:div\.full|\w+(?:\.\w+)*\.(?:approx|ftz))\S*"
INEXACT = re.compile(rf"\bfma\.rn\S*|{APPROXIMATE}")
# Their only fma are those of numeric.quotient_by_one, which is tested to round as a division does.
DIVIDE_BY_FMA = (
    *("fake_quantize_kernel", "sample_fake_quantize_kernel", "random_fake_quantize_kernel"),
    "nearest_and_outside_kernel",
)
MAY_FUSE = (
    *("int_linear_kernel", "int_linear_backward_kernel", "kmeans_assign_kernel", "pq_linear_kernel"),
    *(
        "nearest_codeword_kernel",
        "pq_linear_few_kernel",
        "pq_linear_grad_x_kernel",
        "pq_linear_grad_codebook_kernel",
    ),
)
NVCC_FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fvisibility=hidden", "-I", str(ROOT / "csrc"))


def triton_kernels(arch: int, only: Collection[str] | None = None) -> list[Compiled]:
    """Every Triton variant for one architecture, or those of some ops, compiled by the launchers."""
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    sys.path.insert(0, str(ROOT))
    import kernel_calls
    import triton
    from triton.backends.compiler import GPUTarget

    from qnkernels.backends.triton import kernels, launch

    class Target:
        """Stands in for a CUDA driver as far as compilation asks for one; a device per architecture."""

        get_current_device = staticmethod(lambda: arch)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

    triton.runtime.driver.set_active(Target())
    found: dict[str, Compiled] = {}

    def compile_only(kernel, grid, *arguments, **constants):
        one = Compiled(kernel.__name__, _variant(arguments, constants), f"sm_{arch}", backend="triton")
        try:
            binary = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=False, **constants)
        except Exception as error:  # any failure of the compiler is a finding of this program
            one.error = f"{type(error).__name__}: {error}"
            found[f"{one.kernel} {one.variant}"] = one
            return
        if binary.hash in found:
            return
        one.registers, one.spills = cubin_usage(binary.asm["cubin"])
        one.shared, one.dynamic, one.threads = binary.metadata.shared, 0, 32 * binary.metadata.num_warps
        one.symbol = binary.hash
        inexact = inexact_instruction(one.kernel, binary.asm["ptx"])
        if inexact:
            one.error = f"not exact: {inexact}"
        found[binary.hash] = one

    launch.run = compile_only
    launch.processors = lambda device: TRITON_ARCHS[arch]
    ops = kernels()
    for op, arguments in kernel_calls.all_calls():
        if only is None or op in only:
            ops[op](*arguments)
    if only is not None:
        return list(found.values())
    reached = {one.kernel for one in found.values()}
    missed = sorted(_kernel_names() - reached)
    return [
        *found.values(),
        *(Compiled(name, "", f"sm_{arch}", error="no call reaches it", backend="triton") for name in missed),
    ]


def inexact_instruction(kernel: str, ptx: str) -> str | None:
    """The first instruction in `ptx` that `kernel` may not have, or None."""
    if kernel in MAY_FUSE:
        return None
    found = re.search(APPROXIMATE, ptx) if kernel in DIVIDE_BY_FMA else INEXACT.search(ptx)
    return found and found[0]


def _kernel_names() -> set[str]:
    """Names of the kernels in the backend: jitted functions whose name ends in _kernel."""
    prefix = "qnkernels.backends.triton."
    modules = [module for name, module in sys.modules.items() if name.startswith(prefix)]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def _variant(arguments: tuple, constants: dict) -> str:
    dtypes = [str(a.dtype).removeprefix("torch.") for a in arguments if hasattr(a, "dtype")]
    sizes = [str(a) for a in arguments if isinstance(a, int)]
    flags = [f"{name}={value}" for name, value in constants.items()]
    return " ".join((",".join(dtypes), f"({','.join(sizes)})", *flags))


def is_current(library: Path) -> bool:
    """Whether the library was built after the last change of what it is built from."""
    sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    return library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def _sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def with_launches(
    found: list[Compiled], launches: dict[str, dict[str, set[tuple[int, int]]]]
) -> list[Compiled]:
    """Each kernel once for each way in which it is launched, or as it is."""
    return [
        dataclasses.replace(one, threads=threads, dynamic=dynamic)
        for one in found
        for threads, dynamic in sorted(launches[one.arch].get(one.symbol, ())) or [(0, None)]
    ]


def launched_kernels(nvcc: str) -> list[Compiled]:
    """Every kernel of csrc/cuda with how it is launched.

    Some instantiations are for other devices than those of their architecture.
    """
    sys.path.insert(0, str(ROOT))
    import cuda_launches

    with tempfile.TemporaryDirectory() as folder:
        library = cuda_launches.build(Path(folder), _sources(), nvcc, NVCC_FLAGS)
        launches = cuda_launches.launches_of(library)
        found = with_launches(library_kernels(library), launches)
    for one in found:
        if not any(one.symbol in of_device for of_device in launches.values()):
            one.error = "no call launches it"
    return found


def cuda_kernels(source: Path, arch: str, nvcc: str) -> list[Compiled]:
    """Every kernel of one .cu file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc,
            *NVCC_FLAGS,
            f"-arch={arch}",
            "-cubin",
            "-Xptxas=-v",
            "-o",
            f"{folder}/out.cubin",
            str(source),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return [Compiled(source.name, "", arch, error=result.stderr.strip())]
    return parse_ptxas(result.stderr, source.name, arch)


def table(compiled: list[Compiled]) -> str:
    """Every variant."""
    header = ("kernel", "variant", "arch", "registers", "threads", "shared", "dynamic", "spills")
    lines = [[str(getattr(one, name)).replace("None", "") for name in header] for one in compiled]
    found = [kernel_record.occupancy_of(one) for one in compiled]
    for line, at in zip(lines, found, strict=True):
        line.append(f"{at.share:.0%}, {at.limit}" if at else "")
    return kernel_record.text(((*header, "occupancy"), *lines))


def record_table(rows: list[dict[str, str]]) -> str:
    """Every kernel: its variant with the lowest occupancy."""
    names = ("backend", "kernel", "arch", "variants", "registers", "threads", "static_shared")
    names += ("dynamic_shared", "spills", "occupancy", "limit", "highest_occupancy")
    return kernel_record.text((names, *([row[name] for name in names] for row in rows)))


def compilers(nvcc: str | None) -> dict[str, str]:
    """By backend, what compiles its kernels, with the version."""
    import triton

    release = re.search(r"V([\d.]+)", output(nvcc, "--version"))[1] if nvcc else ""
    return {"triton": f"triton {triton.__version__}", "cuda": f"nvcc {release}"}


def compile_all(
    only: str | None = None, ops: Collection[str] | None = None, launches: bool = False
) -> tuple[list[Compiled], str | None]:
    """Everything, or a part, compiled, and the path of nvcc or None. Architectures are side by side."""
    nvcc = shutil.which("nvcc")
    archs = [arch for arch in TRITON_ARCHS if only in (None, f"sm_{arch}")]
    with concurrent.futures.ProcessPoolExecutor(len(TRITON_ARCHS)) as pool:
        jobs = [pool.submit(triton_kernels, arch, ops) for arch in archs]
        if only not in (None, "cuda"):
            pass
        elif launches and nvcc:
            jobs.append(pool.submit(launched_kernels, nvcc))
        elif is_current(LIBRARY):
            jobs.append(pool.submit(library_kernels, LIBRARY))
        elif nvcc:
            jobs += [
                pool.submit(cuda_kernels, source, arch, nvcc) for source in _sources() for arch in CUDA_ARCHS
            ]
        return [one for job in jobs for one in job.result()], nvcc


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="list every variant, not the worst of each kernel")
    parser.add_argument("--json", action="store_true", help="print every variant as JSON")
    parts = (*(f"sm_{arch}" for arch in TRITON_ARCHS), "cuda")
    parser.add_argument("--only", choices=parts, help="Triton kernels of one architecture, or csrc/cuda")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="of the Triton kernels, those of these ops")
    parser.add_argument("--record", action="store_true", help=f"bring {RECORD.relative_to(ROOT)} up to date")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.record and arguments.ops:
        parser.error("--record is of all ops")
    compiled, nvcc = compile_all(arguments.only, arguments.ops, arguments.record)
    bad = [one for one in compiled if one.error or one.spills]
    if arguments.json:
        kernels = [dataclasses.asdict(one) for one in compiled]
        print(json.dumps({"nvcc": nvcc, "compilers": compilers(nvcc), "kernels": kernels}, indent=1))
        return bool(bad)
    rows = kernel_record.rows(compiled, compilers(nvcc))
    if arguments.record:
        kernel_record.update(RECORD, rows)
    print(table(compiled) if arguments.all else record_table(rows))
    print(f"{len(compiled)} variants in {time.perf_counter() - start:.0f} s")
    if not nvcc:
        print("nvcc not found: csrc/cuda was not compiled")
    for one in bad:
        print(f"FAILED {one.kernel} [{one.variant}] {one.arch}: {one.error or f'spills {one.spills} bytes'}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
