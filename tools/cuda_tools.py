"""What the CUDA tools say of kernels: registers, shared memory, spills, and products of wgmma that wait."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from kernel_record import RESERVED, Compiled

# ptxas found registers of wgmma in use while it runs, and made it wait.
SERIALIZED = re.compile(
    r"(?:wgmma\S* instructions are serialized|warpgroup\.\w+ is injected).* function '(\w+)'"
)
# In machine code: a product, a wait for groups of them; the wait for all.
PRODUCT = re.compile(r"\bHGMMA\.[^;]*;|\bWARPGROUP\.DEPBAR\.LE gsb0, 0x\w+")
WAIT_FOR_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread of the kernel in a cubin."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def library_kernels(library: Path) -> list[Compiled]:
    """Every kernel in the CUDA library, as cuobjdump reports it."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    found = parse_usage(output(tool, "--dump-resource-usage", str(library)))
    multiplying = [one for one in found if one.arch == "sm_90a" and uses_wgmma(one)]
    if multiplying:
        names = ",".join(one.symbol for one in multiplying)
        code = output(tool, "-sass", "-arch", "sm_90a", "-fun", names, str(library))
        mark_serialized(multiplying, code)
    return found


def uses_wgmma(one: Compiled) -> bool:
    """By its name; such a kernel is empty for architectures without."""
    return re.search(r"wgmma_kernel|warpgroups_kernel", one.kernel) is not None


def mark_serialized(kernels: list[Compiled], code: str) -> None:
    """An error for those that have, in machine code, products that wait for each other, or none at all."""
    waits = serialized_functions(code)
    for one in kernels:
        if waits.get(one.symbol, True):
            one.error = "wgmma is serialized" if one.symbol in waits else "it has no wgmma"


def serialized_functions(code: str) -> dict[str, bool]:
    """Functions in machine code with wgmma -> whether each product waits until all before are complete.

    ptxas, when it makes them so, puts a wait after each.
    """
    found = {}
    for part in code.split("Function : ")[1:]:
        steps = PRODUCT.findall(part)
        products = [i for i, step in enumerate(steps) if step.startswith("HGMMA")]
        if products:
            name = part.split(maxsplit=1)[0]
            found[name] = all(steps[i + 1 : i + 2] == [WAIT_FOR_ALL] for i in products)
    return found


def output(*command: str, input: str | None = None) -> str:
    return subprocess.run(command, input=input, check=True, capture_output=True, text=True).stdout


def parse_usage(text: str) -> list[Compiled]:
    """The kernels in what `cuobjdump --dump-resource-usage` prints."""
    found, arch = [], ""
    for line in re.finditer(r"^arch = (\w+)$|Function (\w+):\s*\n\s*(.*)", text, re.MULTILINE):
        if line[1]:
            arch = line[1]
            continue
        usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line[3])}
        found.append(
            Compiled(
                *(line[2], "", arch),
                registers=usage["REG"],
                shared=_static(usage["SHARED"], arch),
                spills=usage["STACK"] + usage["LOCAL"],
                symbol=line[2],
            )
        )
    return _named(found)


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
                *(source, "", arch),
                registers=int(registers[1]),
                shared=int(shared[1]) if shared else 0,
                spills=max(int(number) for number in spills.groups()),
                error="wgmma is serialized" if name in serialized else "",
                symbol=name,
            )
        )
    return _named(found)


def _static(reported: int, arch: str) -> int:
    """Shared memory that a kernel has itself: for sm_90 cuobjdump adds what the system takes."""
    return reported - RESERVED if arch.startswith("sm_9") and reported >= RESERVED else reported


def _named(kernels: list[Compiled]) -> list[Compiled]:
    """With their names in the sources, and as variant the symbol in C++.

    Without parameters, and without the name of the anonymous namespace, which sources are hashed into.
    """
    tool = shutil.which("c++filt")
    text = "\n".join(one.symbol for one in kernels)
    names = output(tool, "-p", input=text).splitlines() if tool and kernels else text.splitlines()
    for one, variant in zip(kernels, names, strict=True):
        one.variant = re.sub(r"^void |\(anonymous namespace\)::|qnk::", "", variant)
        name = re.search(r"\d([a-z_]+_kernel)[EI]", one.symbol)  # its length, and what follows it
        if name:
            one.kernel = name[1]
    return kernels
