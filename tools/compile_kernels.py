"""Compile every GPU kernel, without a GPU: `python tools/compile_kernels.py [--all] [--json]`
`[--only sm_80 | sm_90 | cuda] [--ops OP ...] [--share SHARE]`.

Triton kernels: each variant (kernel_calls.py) for sm_80 and sm_90. csrc/cuda/*.cu, where nvcc is found: for
sm_80 and sm_90a, with the flags of CMakeLists.txt; a CUDA library that was built from the sources as they
are now is read instead of compiling them again. Prints registers, shared memory and spills as reported by
cuobjdump and ptxas. --only: the Triton kernels of one architecture, or csrc/cuda; --ops: the Triton kernels
of some ops; --share: about this share of their calls, by chance, the same each time. Exits with 1 if a
kernel spills, does not compile, is reached by no call (without --ops), has, where it must be exact, an
instruction that is not, or has wgmma products that ptxas made to wait for each other.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# architecture -> multiprocessors of its GPU (A100, H100), which the launchers ask for
TRITON_ARCHS = {80: 108, 90: 132}
CUDA_ARCHS = ("sm_80", "sm_90a")
LIBRARY = ROOT / "qnkernels" / "lib" / "libqnkernels_cuda.so"
# Not rounded once per operation: the quantizers would differ from the reference.
APPROXIMATE = r"\b(?:div\.full|\w+(?:\.\w+)*\.(?:approx|ftz))\S*"
INEXACT = re.compile(rf"\bfma\.rn\S*|{APPROXIMATE}")
# Their only fma are those of numeric.quotient_by_one, which is tested to round as a division does.
DIVIDE_BY_FMA = (
    *("fake_quantize_kernel", "sample_fake_quantize_kernel", "random_fake_quantize_kernel"),
    "nearest_and_outside_kernel",
)
# ptxas found registers of wgmma in use while it runs, and made it wait.
SERIALIZED = re.compile(
    r"(?:wgmma\S* instructions are serialized|warpgroup\.\w+ is injected).* function '(\w+)'"
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


@dataclasses.dataclass
class Compiled:
    """One kernel variant. Shared memory in bytes per block, spills in bytes of local memory per thread."""

    kernel: str
    variant: str
    arch: str
    registers: int = 0
    shared: int = 0
    spills: int = 0
    error: str = ""


def triton_kernels(arch: int, only: Collection[str] | None = None, share: float = 1.0) -> list[Compiled]:
    """Every Triton variant for one architecture, or those of some ops and of a share of the calls, compiled
    by the launchers themselves.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
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
        one = Compiled(kernel.__name__, _variant(arguments, constants), f"sm_{arch}")
        try:
            binary = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=False, **constants)
        except Exception as error:  # any failure of the compiler is a finding of this program
            one.error = f"{type(error).__name__}: {error}"
            found[f"{one.kernel} {one.variant}"] = one
            return
        if binary.hash in found:
            return
        one.registers, one.spills = cubin_usage(binary.asm["cubin"])
        one.shared = binary.metadata.shared
        inexact = inexact_instruction(one.kernel, binary.asm["ptx"])
        if inexact:
            one.error = f"not exact: {inexact}"
        found[binary.hash] = one

    launch.run = compile_only
    launch.processors = lambda device: TRITON_ARCHS[arch]
    ops = kernels()
    chance, seen = random.Random(0), set()
    for op, arguments in kernel_calls.all_calls():
        drawn = chance.random() < share or op not in seen
        if drawn and (only is None or op in only):
            ops[op](*arguments)
        seen.add(op)
    if only is not None:
        return list(found.values())
    reached = {one.kernel for one in found.values()}
    missed = sorted(_kernel_names() - reached)
    return [
        *found.values(),
        *(Compiled(name, "", f"sm_{arch}", error="no call reaches it") for name in missed),
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


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread of the kernel in a cubin."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def is_current(library: Path) -> bool:
    """Whether the library was built after the last change of what it is built from."""
    sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    return library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def library_kernels(library: Path) -> list[Compiled]:
    """Every kernel in the CUDA library, as cuobjdump reports it."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(library)]
    return parse_usage(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse_usage(text: str) -> list[Compiled]:
    """The kernels in what `cuobjdump --dump-resource-usage` prints."""
    found, arch = [], ""
    for line in re.finditer(r"^arch = (\w+)$|Function (\w+):\s*\n\s*(.*)", text, re.MULTILINE):
        if line[1]:
            arch = line[1]
            continue
        usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line[3])}
        name = re.search(r"\d([a-z_]+_kernel)[EI]", line[2])  # its length, and what follows it
        found.append(
            Compiled(
                *(name[1] if name else line[2], _demangle(line[2]), arch),
                registers=usage["REG"],
                shared=usage["SHARED"],
                spills=usage["STACK"] + usage["LOCAL"],
            )
        )
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


def parse_ptxas(report: str, source: str, arch: str) -> list[Compiled]:
    """The kernels in what `ptxas -v` prints."""
    serialized = set(SERIALIZED.findall(report))
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Compiled(
                *(source, _demangle(name), arch),
                registers=int(registers[1]),
                shared=int(shared[1]) if shared else 0,
                spills=max(int(number) for number in spills.groups()),
                error="wgmma is serialized" if name in serialized else "",
            )
        )
    return found


def _demangle(name: str) -> str:
    tool = shutil.which("c++filt")
    return subprocess.run([tool, name], capture_output=True, text=True).stdout.strip() if tool else name


def summary(compiled: list[Compiled]) -> list[Compiled]:
    """Per kernel and architecture the largest of each figure over the variants."""
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for one in compiled:
        groups.setdefault((one.kernel, one.arch), []).append(one)
    return [
        Compiled(
            *(kernel, f"{len(ones)} variants", arch),
            registers=max(one.registers for one in ones),
            shared=max(one.shared for one in ones),
            spills=max(one.spills for one in ones),
            error=next((one.error for one in ones if one.error), ""),
        )
        for (kernel, arch), ones in sorted(groups.items())
    ]


def table(compiled: list[Compiled]) -> str:
    header = ("kernel", "variant", "arch", "registers", "shared", "spills")
    rows = [header, *(tuple(str(getattr(one, name)) for name in header) for one in compiled)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def compile_all(
    only: str | None = None, ops: Collection[str] | None = None, share: float = 1.0
) -> tuple[list[Compiled], str | None]:
    """Everything, or a part, compiled, and the path of nvcc or None. Architectures are side by side."""
    nvcc = shutil.which("nvcc")
    archs = [arch for arch in TRITON_ARCHS if only in (None, f"sm_{arch}")]
    with concurrent.futures.ProcessPoolExecutor(len(TRITON_ARCHS)) as pool:
        jobs = [pool.submit(triton_kernels, arch, ops, share) for arch in archs]
        if only not in (None, "cuda"):
            pass
        elif is_current(LIBRARY):
            jobs.append(pool.submit(library_kernels, LIBRARY))
        elif nvcc:
            sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
            jobs += [
                pool.submit(cuda_kernels, source, arch, nvcc) for source in sources for arch in CUDA_ARCHS
            ]
        return [one for job in jobs for one in job.result()], nvcc


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--all", action="store_true", help="list every variant, not the largest of each kernel"
    )
    parser.add_argument("--json", action="store_true", help="print every variant as JSON")
    parts = (*(f"sm_{arch}" for arch in TRITON_ARCHS), "cuda")
    parser.add_argument("--only", choices=parts, help="Triton kernels of one architecture, or csrc/cuda")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="of the Triton kernels, those of these ops")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the calls of Triton kernels, drawn by chance"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    compiled, nvcc = compile_all(arguments.only, arguments.ops, arguments.share)
    bad = [one for one in compiled if one.error or one.spills]
    if arguments.json:
        print(json.dumps({"nvcc": nvcc, "kernels": [dataclasses.asdict(one) for one in compiled]}, indent=1))
        return bool(bad)
    print(table(compiled if arguments.all else summary(compiled)))
    print(f"{len(compiled)} variants in {time.perf_counter() - start:.0f} s")
    if not nvcc:
        print("nvcc not found: csrc/cuda was not compiled")
    for one in bad:
        print(f"FAILED {one.kernel} [{one.variant}] {one.arch}: {one.error or f'spills {one.spills} bytes'}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
