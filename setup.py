"""Builds the native libraries with CMake and packs them into a wheel that serves every Python and torch.

QNKERNELS_CUDA=auto|on|off chooses whether the CUDA library is built (auto: where nvcc is found).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("libqnkernels_cpu.so", "libqnkernels_cuda.so", "build.json")


def find_program(name: str) -> str | None:
    """A build tool: of this Python's environment (build requirements) first, then on PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


class BuildNative(build_ext):
    """Runs CMake once; the 'extension' stands for qnkernels/lib/*."""

    def run(self) -> None:
        cuda = os.environ.get("QNKERNELS_CUDA", "auto").lower()
        if cuda not in ("auto", "on", "off"):
            sys.exit(f"QNKERNELS_CUDA: expected auto, on or off, got {cuda!r}.")
        cmake = find_program("cmake")
        if cmake is None:
            sys.exit(
                "qnkernels needs CMake 3.24 or newer to build: run `pip install cmake ninja` and try again."
            )
        if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
            sys.exit(
                "qnkernels needs a C++17 compiler to build: install g++ or clang++ "
                "(Debian: apt-get install g++), or set CXX to one, and try again."
            )
        output = self._output()
        output.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve() / "cmake"
        # a cache written by another build environment names tools that are gone
        shutil.rmtree(build, ignore_errors=True)
        configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DQNKERNELS_CUDA={cuda}"]
        configure += [f"-DQNKERNELS_OUTPUT={output}", "-DCMAKE_BUILD_TYPE=Release"]
        if ninja := find_program("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for command in (configure, [cmake, "--build", str(build), "--parallel"]):
            if subprocess.run(command).returncode:
                sys.exit(f"qnkernels: `{' '.join(command[:2])}` failed; the first error above says why.")

    def _output(self) -> Path:
        package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        return package / "qnkernels" / "lib"

    def get_outputs(self) -> list[str]:
        return [str(path) for name in LIBRARIES if (path := self._output() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the libraries know nothing of Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("qnkernels.lib", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
