"""The Triton backend without a GPU: its kernels under the interpreter, and what it says where it cannot run.

Triton reads TRITON_INTERPRET where a kernel is decorated, so the kernel tests (interpreted/) need a process
that starts with it: this one has already imported Triton for others.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qnkernels.backends import BackendUnavailable, triton

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize(
    "name", sorted(path.stem.removeprefix("test_") for path in HERE.glob("interpreted/test_*.py"))
)
def test_interpreted(name):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command += [f"--rootdir={ROOT}", "--tb=short", str(HERE / "interpreted" / f"test_{name}.py")]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match=r"needs an NVIDIA GPU.*TRITON_INTERPRET=1"):
        triton.load()


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(BackendUnavailable, match=r"8\.0 or newer, this one has 7\.5"):
        triton.load()


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendUnavailable, match="pip install triton"):
        triton.load()


def test_cpu_tensors_are_refused_without_the_interpreter():
    """In a process of its own, where kernels are compiled ones."""
    code = (
        "import torch; from qnkernels.backends.triton import kernels\n"
        "try: kernels()['minmax'](torch.ones(3))\n"
        "except ValueError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "x: expected a tensor on a CUDA device" in result.stdout, result.stderr
