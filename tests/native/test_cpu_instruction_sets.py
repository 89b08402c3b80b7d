"""The ops whose results are within bounds, not the same bits everywhere, on each instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPS = Path(__file__).parents[1] / "ops"


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_bounds_hold(isa):
    """The best one is what all other tests run on; forcing one that this processor lacks runs that again."""
    files = [str(OPS / f"test_{op}.py") for op in ("kmeans", "pq")]
    select = "common or golden or threads or lowest or spoil or overflow"
    command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", "-k", select]
    environment = {**os.environ, "QNKERNELS_ISA": isa}
    run = subprocess.run(command, cwd=OPS.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
