"""bench/libraries.py: a run on a GPU without a current CUDA library has failed, and says what to do."""

import os
from subprocess import CompletedProcess

import pytest

import libraries
from log import Log
from qnkernels.backends import BackendUnavailable


class Tree:
    """A source tree whose files are of time 1000, and what setup.py does in it, at time 2000."""

    def __init__(self, folder):
        self.folder = folder
        self.builds, self.makes, self.result = 0, ("cpu", "cuda"), CompletedProcess([], 0, "", "")
        for name in ("CMakeLists.txt", "setup.py", "csrc/qnkernels.h", "csrc/common/a.h", "csrc/cpu/b/c.cpp"):
            self.put(name, 1000)
        self.put("csrc/cuda/d.cu", 1000)

    def library(self, name):
        return self.folder / "lib" / f"lib{name}.so"

    def put(self, name, when):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (when, when))

    def build(self, command, **options):
        self.builds += 1
        for name in self.makes:
            self.put(self.library(name), 2000)
        return self.result


@pytest.fixture
def tree(monkeypatch, tmp_path):
    found = Tree(tmp_path)
    monkeypatch.setattr(libraries, "ROOT", tmp_path)
    monkeypatch.setattr(libraries, "library_path", found.library)
    monkeypatch.setattr(libraries.subprocess, "run", found.build)
    monkeypatch.setattr(libraries, "kernels", lambda name: {})
    return found


def test_what_can_be_built_is_built_once(tree, capsys):
    log = Log()
    libraries.prepare(log, True, on_gpu=True)
    assert not log.failures and tree.builds == 1
    libraries.prepare(log, True, on_gpu=True)
    assert not log.failures and tree.builds == 1
    assert "not built again" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["csrc/common/a.h", "csrc/cpu/b/c.cpp", "csrc/cuda/d.cu", "setup.py"])
def test_a_source_that_changed_has_the_libraries_built(tree, name):
    for library in ("cpu", "cuda"):
        tree.put(tree.library(library), 1500)
    tree.put(name, 1600)
    libraries.prepare(Log(), True, on_gpu=True)
    assert tree.builds == 1


@pytest.mark.parametrize(
    ("code", "printed", "steps"),
    [
        (0, "", ["CUDA library"]),  # without nvcc setup.py builds the other one and is content
        (1, "qnkernels needs CMake 3.24 or newer", ["CUDA library"]),
        (1, "c.cpp:1: error", ["build", "CUDA library"]),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_no_cuda_library_is_a_failure_that_says_what_to_do(tree, capsys, code, printed, steps, old):
    tree.result, tree.makes = CompletedProcess([], code, "", printed), ("cpu",)
    if old:
        tree.put(tree.library("cuda"), 900)
    log = Log()
    libraries.prepare(log, True, on_gpu=True)
    assert [step for step, _ in log.failures] == steps
    reason = "libcuda.so is older than " if old else "libcuda.so is not there"
    assert reason in log.failures[-1][1] and "with nvcc on PATH" in log.failures[-1][1]
    assert log.close() == 1 and capsys.readouterr().err.endswith(f"failed: {', '.join(steps)}\n")


def test_a_gpu_that_the_cuda_library_is_not_for(tree, monkeypatch, capsys):
    monkeypatch.setattr(libraries, "unserved_capability", lambda: "10.0")
    tree.makes = ("cpu",)
    log = Log()
    libraries.prepare(log, True, on_gpu=True)
    assert log.close() == 0 and "compute capability 10.0" in capsys.readouterr().err


def test_a_current_cuda_library_needs_no_compiler(tree):
    tree.result, tree.makes = CompletedProcess([], 1, "", "qnkernels needs a C++17 compiler"), ()
    tree.put(tree.library("cuda"), 1500)
    log = Log()
    libraries.prepare(log, True, on_gpu=True)
    assert not log.failures and tree.builds == 1


def test_no_build_takes_libraries_as_they_are(tree, monkeypatch):
    tree.put(tree.library("cuda"), 900)
    log = Log()
    libraries.prepare(log, False, on_gpu=True)
    assert not log.failures and not tree.builds

    def refuse(name):
        raise BackendUnavailable("the cuda library was not built")

    monkeypatch.setattr(libraries, "kernels", refuse)
    libraries.prepare(log, False, on_gpu=True)
    ((step, output),) = log.failures
    assert step == "CUDA library" and output.startswith("the cuda library was not built.\n")


def test_without_a_gpu_nobody_asks_for_cuda(tree):
    tree.makes = ("cpu",)
    log = Log()
    libraries.prepare(log, True, on_gpu=False)
    libraries.prepare(log, True, on_gpu=False)
    assert not log.failures and tree.builds == 1
