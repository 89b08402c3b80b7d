"""The native libraries of a run on a GPU: built where they are not current; without CUDA's it has failed."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from environment import ROOT
from log import Log
from qnkernels.backends import BackendUnavailable, kernels
from qnkernels.backends.cuda import unserved_capability
from qnkernels.backends.native import library_path

BUILD_FILES = ("CMakeLists.txt", "setup.py", "csrc/qnkernels.h", "csrc/common/*")
SOURCES = {"cpu": (*BUILD_FILES, "csrc/cpu/**/*"), "cuda": (*BUILD_FILES, "csrc/cuda/**/*")}
HOW_TO_BUILD = """\
This run says nothing of the kernels in CUDA C++, or speaks of older ones. To build them takes CMake 3.24 and
Ninja (`pip install cmake ninja`), g++ (Debian: `apt-get install g++`) and the CUDA toolkit, with nvcc on PATH
or CUDACXX set to it. `QNKERNELS_CUDA=on python setup.py build_ext --inplace` builds, or says what is missing.
A library built of these sources elsewhere may be put at
{path}; --no-build takes it as it is."""


def newest(patterns: Iterable[str]) -> Path:
    found = (path for one in patterns for path in ROOT.glob(one) if path.is_file())
    return max(found, key=lambda path: path.stat().st_mtime)


def outdated(name: str) -> str:
    """Why the library is not the one that a build would give; empty where it is."""
    library = library_path(name)
    if not library.exists():
        return f"{library.name} is not there"
    source = newest(SOURCES[name])
    if library.stat().st_mtime < source.stat().st_mtime:
        return f"{library.name} is older than {source.relative_to(ROOT)}"
    return ""


def prepare(log: Log, may_build: bool, on_gpu: bool) -> None:
    """Build what is not current. Where there is a GPU that CUDA's is for, the run fails if it then does not
    serve."""
    wanted = ("cpu", "cuda") if on_gpu else ("cpu",)
    if may_build and not any(map(outdated, wanted)):
        log.say("the native libraries are newer than their sources: not built again")
    elif may_build:
        build(log)
    if not on_gpu:
        return
    if other := unserved_capability():
        return log.lack(f"no kernel in CUDA C++ is for compute capability {other}: Triton serves every op")
    if reason := (may_build and outdated("cuda")) or refusal():
        log.fail("CUDA library", f"{reason}.\n{HOW_TO_BUILD.format(path=library_path('cuda'))}")
    else:
        log.say("the CUDA library serves this GPU")


def build(log: Log) -> None:
    """All libraries whose tools are there, in place."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode == 0:
        return log.say("built the native libraries that the tools here can build")
    output = result.stdout + result.stderr
    reason = (output.strip().splitlines() or ["no output"])[-1]
    if reason.startswith("qnkernels needs"):  # a tool is missing, which setup.py says in one line
        log.say(f"not built: {reason}")
    else:
        log.fail("build", output)


def is_complete() -> bool:
    """Whether every backend that could serve the GPU here does."""
    return unserved_capability() is not None or not refusal()


def refusal() -> str:
    """Why the cuda backend does not serve the GPU here; empty where it does."""
    try:
        kernels("cuda")
    except BackendUnavailable as error:
        return str(error)
    return ""
