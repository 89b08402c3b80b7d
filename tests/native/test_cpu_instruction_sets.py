"""Each instruction set: bounds hold on all of them, and what is exact has the same bits."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qnkernels.backends import native
from qnkernels.backends.cpu import ISAS

ROOT = Path(__file__).parents[2]
LEVELS = ISAS[:-1]
SUITES = {
    ("kmeans", "pq"): "common or golden or threads or lowest or spoil or overflow",
    ("kmeans_bounds",): "not opcheck and not bad_input",
    (
        "int_linear",
        "int_linear_backward",
        "int_linear_quantized",
    ): "not reference and not check and not gradient and not bad_input",
    ("int_embedding",): "rows or scales",
    ("fake_quantize", "dynamic", "low_precision", "block_noise"): "equal or bits or extreme or finite",
}


def run(isa: str, *arguments: str) -> str:
    """Output of python with this instruction set at most."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "QNKERNELS_ISA": isa, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def in_use() -> str:
    """The instruction set that this process runs on."""
    library = native.open_library("cpu")
    library.qnk_cpu_isa.restype = ctypes.c_char_p
    return library.qnk_cpu_isa().decode()


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("ops", SUITES, ids="-".join)
def test_bounds_hold(isa, ops):
    if ISAS.index(isa) >= ISAS.index(in_use()):
        pytest.skip(f"all other tests run on {in_use()}, the best that there is here")
    files = [str(ROOT / "tests" / "ops" / f"test_{op}.py") for op in ops]
    run(isa, "-m", "pytest", *files, "-p", "no:cacheprovider", "-k", SUITES[ops])


QUANTIZED = """
import hashlib, torch
from helpers_int_linear import random_packed
from qnkernels import functional as F
for bits, groups, k in ((8, 1, 198), (4, 1, 198), (8, 3, 198), (4, 33, 198), (8, 1, 192), (4, 3, 192)):
    packed = random_packed(97, k, bits, groups, torch.Generator().manual_seed(bits * groups))
    digest = hashlib.sha256()
    for m in (1, 3, 5, 16, 40):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) + 1
        for quantizer in ((None, None), (0.02, 60.0)):
            y = F.int_linear_quantized(x, *packed.arguments, None, bits, None, *quantizer)
            digest.update(y.numpy().tobytes())
    print(bits, groups, digest.hexdigest())
"""


def test_quantized_products_have_the_same_bits_on_all():
    expected = run(in_use(), "-c", QUANTIZED).splitlines()
    assert len(expected) == 6
    for isa in ISAS[: ISAS.index(in_use())]:
        assert run(isa, "-c", QUANTIZED).splitlines() == expected
