"""Kernels that take tensors whole: the bits of the others, and None for all that is in another form."""

import ctypes.util
import sys
import threading
import time

import pytest
import torch
from helpers_int_linear import random_packed, seeded
from numeric import DTYPES, assert_identical

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels import ops
from qnkernels.backends import cpu_tensors, select, select_whole

M, N, K = 3, 40, 128

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, cpu_tensors.TABLE), reason="this torch offers no table of functions"
)


def whole(op: str):
    found = select_whole(op)
    assert found is not None
    return found


def layer(bits=8, groups=2, zero_point=True, dtype=torch.float32, bias_dtype=torch.float32, m=M, n=N, k=K):
    """x, weight, scale, zero point, bias and bits."""
    generator = seeded(bits * groups)
    bias = None if bias_dtype is None else torch.randn(n, generator=generator).to(bias_dtype)
    packed = random_packed(n, k, bits, groups, generator, zero_point).arguments
    return torch.randn(m, k, generator=generator).to(dtype), *packed, bias, bits


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(dtype, bits, groups, zero_point, bias_dtype):
    arguments = layer(bits, groups, zero_point, dtype, bias_dtype)
    y = whole("int_linear")(*arguments)
    assert y.dtype == dtype
    assert_identical(y, select("int_linear", "cpu")(*arguments))
    for range_ in ((None, None), (torch.tensor(0.03), torch.tensor(100.0))):
        y = whole("int_linear_quantized")(*arguments, *range_)
        assert_identical(y, select("int_linear_quantized", "cpu")(*arguments, *range_))


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (2, 1, 3, K)])
def test_leading_dimensions(shape):
    _, *rest = layer()
    x = torch.randn(shape)
    y = whole("int_linear")(x, *rest)
    assert y.shape == (*shape[:-1], N)
    assert_identical(y.reshape(-1, N), select("int_linear", "cpu")(x.reshape(-1, K), *rest))


def test_parameters_and_tensors_of_inference_mode():
    x, *packed, bias, bits = layer()
    expected = select("int_linear", "cpu")(x, *packed, bias, bits)
    frozen = torch.nn.Parameter(bias, requires_grad=False)
    assert_identical(whole("int_linear")(x, *packed, frozen, bits), expected)
    with torch.inference_mode():
        assert_identical(whole("int_linear")(x, *packed, torch.nn.Parameter(bias), bits), expected)
        assert_identical(whole("int_linear")(x.clone(), *packed, bias, bits), expected)


class Subclass(torch.Tensor):
    pass


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


X, WEIGHT, SCALE, ZERO_POINT, BIAS, BITS = range(6)


@pytest.mark.parametrize(
    ("position", "change"),
    [
        *((position, _apart) for position in range(BITS)),
        *((position, lambda t: t.double()) for position in range(BITS)),
        *((position, lambda t: t.to("meta")) for position in range(BITS)),
        *((position, lambda t: t[:0]) for position in range(BITS)),
        *((position, lambda t: t[..., :-1].contiguous()) for position in (X, WEIGHT, ZERO_POINT, BIAS)),
        *((position, lambda t: t[None]) for position in (WEIGHT, SCALE, ZERO_POINT, BIAS)),
        *((position, lambda t: t[:-1]) for position in (WEIGHT, SCALE, ZERO_POINT)),
        *((position, lambda t: t.as_subclass(Subclass)) for position in range(BITS)),
        *((position, lambda t: t.requires_grad_()) for position in (X, SCALE, BIAS)),
        *((position, lambda _: "text") for position in range(BITS + 1)),
        *((position, lambda _: None) for position in (X, WEIGHT, SCALE, BITS)),
        (X, lambda t: torch.zeros(())),
        (X, lambda t: torch.zeros(*[1] * 8, K)),
        (X, lambda t: torch.complex(t, t).conj().imag),
        *((position, torch._neg_view) for position in (X, SCALE, BIAS)),
        (BITS, bool),
        (X, lambda t: t.to_sparse()),
        (WEIGHT, lambda t: t[0]),
        (WEIGHT, lambda t: t.view(torch.int8)),
        (SCALE, lambda t: torch.ones(N, 3)),
        (SCALE, lambda t: t[:, 0].contiguous()),
        (ZERO_POINT, lambda t: t.view(torch.int8)),
        (BIAS, lambda t: t.half()),
        *((BITS, lambda bits, large=large: bits + large) for large in (1, 2**32, 2**64)),
    ],
)
def test_anything_else_is_left_to_others(position, change):
    arguments = list(layer())
    arguments[position] = change(arguments[position])
    assert whole("int_linear")(*arguments) is None
    assert whole("int_linear_quantized")(*arguments, None, None) is None
    ctypes.pythonapi.PyErr_Occurred.restype = ctypes.c_void_p
    assert ctypes.pythonapi.PyErr_Occurred() is None


@pytest.mark.parametrize(
    "range_",
    [
        (torch.tensor(0.03), None),
        (None, torch.tensor(100.0)),
        (torch.tensor([0.03]), torch.tensor([100.0])),
        (torch.tensor(0.03).double(), torch.tensor(100.0)),
        (torch.tensor(0.03).requires_grad_(), torch.tensor(100.0)),
        (0.03, 100.0),
        (torch.tensor(0.03 - 0.03j).conj().imag, torch.tensor(100.0)),
    ],
)
def test_ranges_of_another_form_are_left_to_others(range_):
    assert whole("int_linear_quantized")(*layer(), *range_) is None


def test_more_or_fewer_arguments_are_left_to_others():
    arguments = layer()
    assert whole("int_linear")(*arguments, None) is None
    assert whole("int_linear")() is None
    assert whole("int_linear_quantized")(*arguments) is None


def test_nothing_is_kept():
    """References: of what is given, of what is returned, and of what is known of Python."""
    arguments = layer()
    objects = (*arguments[:-1], None, int, torch.Tensor, torch.Tensor.new_empty, torch.is_grad_enabled)
    before = [sys.getrefcount(one) for one in objects]
    for _ in range(100):
        y = whole("int_linear")(*arguments)
        assert whole("int_linear")(*arguments[:-1], 5) is None
        assert whole("int_linear_quantized")(*arguments, None, None) is not None
    counts = [sys.getrefcount(one) for one in objects]
    assert all(abs(count - one) < 50 for count, one in zip(counts, before, strict=True))
    assert sys.getrefcount(y) == 2


def test_the_op_takes_other_forms_all_the_same():
    x, weight, scale, zero_point, bias, bits = layer()
    expected = F.int_linear(x, weight, scale, zero_point, bias, bits)
    for half in (bias.half(), bias.bfloat16()):
        assert_identical(
            F.int_linear(x, weight, scale, zero_point, half, bits),
            F.int_linear(x, weight, scale, zero_point, half.float(), bits),
        )
    packed = [_apart(t) for t in (weight, scale, zero_point)]
    assert_identical(F.int_linear(_apart(x), *packed, _apart(bias), bits), expected)


def test_only_where_the_cpu_backend_serves():
    assert select_whole("fake_quantize") is None
    with qnk.backend("reference"):
        assert select_whole("int_linear") is None
    with qnk.backend("cpu"):
        assert select_whole("int_linear") is not None


@pytest.mark.parametrize("table", ["no such attribute", "__doc__"])
def test_a_torch_without_the_table(monkeypatch, table):
    monkeypatch.setattr(cpu_tensors, "TABLE", table)
    assert cpu_tensors.load() == {}


def test_a_library_without_the_functions(monkeypatch):
    monkeypatch.setattr(cpu_tensors, "library_path", lambda _: ctypes.util.find_library("m"))
    assert cpu_tensors.load() == {}


def test_a_library_of_another_version(monkeypatch):
    class Library:
        def __init__(self, _):
            self.qnk_cpu_tensors = None

    monkeypatch.setattr(ctypes, "PyDLL", Library)
    assert cpu_tensors.load() == {}


def test_gradients_are_of_what_the_functions_give(monkeypatch):
    """Where a gradient is wanted autograd's forward calls them, not the checked kernel."""
    x, *packed, bias, bits = layer()
    expected = whole("int_linear")(x, *packed, bias, bits)
    called = []
    monkeypatch.setattr(ops.int_linear, "select", lambda *names: called.append(names))
    y = F.int_linear(x.requires_grad_(), *packed, bias, bits)
    assert y.requires_grad and not called
    assert_identical(y.detach(), expected)


def test_a_result_too_large_to_exist_is_not_asked_for():
    """Errors are those of the arguments, not of the memory for y."""
    many = 2_000_000
    with pytest.raises(ValueError, match=r"x: expected \[..., 8\]"):
        F.int_linear(
            torch.zeros(many, 4), torch.zeros(many, 4, dtype=torch.uint8), torch.ones(many, 1), bits=4
        )


@pytest.fixture
def quick_switches():
    """Python's threads change after 0.1 ms, not 5: calls take tens of milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def test_other_python_threads_run_meanwhile(quick_switches):
    arguments = layer(m=1024, n=2048, k=2048, groups=1)
    call = whole("int_linear")
    spans, moments = [], []

    def compute():
        for _ in range(4):
            start = time.perf_counter()
            call(*arguments)
            spans.append((start, time.perf_counter()))

    thread = threading.Thread(target=compute)
    thread.start()
    while thread.is_alive():
        moments.append(time.perf_counter())
    thread.join()
    places = [(moment - start) / (end - start) for start, end in spans for moment in moments]
    assert any(0.3 < place < 0.7 for place in places)  # with the lock held, only at both ends
