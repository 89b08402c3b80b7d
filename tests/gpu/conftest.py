"""GPU tests: marked `gpu`, skipped without a CUDA device.

`--gpu-device=cpu` runs those that need no real GPU through Triton's interpreter (TRITON_INTERPRET=1), which
checks the tests themselves.
"""

from collections.abc import Iterator

import pytest
import torch

from qnkernels.backends import BackendUnavailable, cuda_dense, kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-device", default="cuda", choices=("cuda", "cpu"), help="cpu: Triton's interpreter"
    )
    parser.addoption("--gpu-backend", choices=("triton", "cuda"), help="the tests of this backend alone")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "of(op): the op that a test covers, on every backend that has it")
    config.addinivalue_line("markers", "large: takes too much memory or time for a memory check")
    config.addinivalue_line("markers", "needs_cuda: not even the interpreter can run it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = config.getoption("--gpu-device", "cuda") == "cpu"
    for item in items:
        if "tests/gpu/" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.gpu)
        if interpreted and not item.get_closest_marker("needs_cuda"):
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--gpu-device", "cuda"))


def backends_with(op: str) -> list[str]:
    """The backends that run `op` on CUDA tensors here; all names where nothing can run, to be skipped."""
    found = []
    for name in ("triton", "cuda"):
        try:
            found += [name] if op in kernels(name) else []
        except BackendUnavailable:
            continue
    return [*found, "reference"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `of(op)` that takes `backend` runs once per backend that has the op."""
    marker = metafunc.definition.get_closest_marker("of")
    if marker and "backend" in metafunc.fixturenames:
        only = metafunc.config.getoption("--gpu-backend", None)
        found = backends_with(marker.args[0])
        metafunc.parametrize("backend", [name for name in found if only in (None, name)])


@pytest.fixture(autouse=True)
def record_op(request: pytest.FixtureRequest, record_property) -> None:
    """What the test covers, for the report of bench/gpu_suite.py."""
    marker = request.node.get_closest_marker("of")
    if marker:
        record_property("op", marker.args[0])
        record_property("backend", request.node.callspec.params["backend"])


@pytest.fixture(autouse=True)
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that decode as they multiply serve any number of tokens, unless small_slices is used."""
    from_tokens = 1 if "small_slices" in request.fixturenames else 1 << 40
    by_op = {op: dict.fromkeys(sizes, from_tokens) for op, sizes in cuda_dense.FROM_TOKENS.items()}
    monkeypatch.setattr(cuda_dense, "FROM_TOKENS", by_op)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products take the weight in several slices, and cuBLAS rounds no partial sums."""
    monkeypatch.setattr(cuda_dense, "SLICE_BYTES", 1 << 16)
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)
