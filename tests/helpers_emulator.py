"""The real CUDA kernels on CPU tensors: csrc/cuda compiled as C++ against tests/native/emulator.

`emulated("fake_quantize")["fake_quantize"](x, ...)` has the signature of the reference. Each call runs in
three orders of the threads, with every tensor between pages that may not be touched, and raises where the
orders disagree (a barrier is missing), an access is out of bounds or misaligned, an argument is written,
threads wait for each other forever, or a launch writes an element twice of what it finds unwritten.
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from qnkernels.backends.cuda import CudaKernels
from qnkernels.backends.native import CUDA_ARGTYPES, CUDA_QUERIES, CUDA_STEPS, declare
from qnkernels.reference.fake_quantize import OUTSIDE_TILE

ROOT = Path(__file__).resolve().parent.parent
CUDA, EMULATOR = ROOT / "csrc" / "cuda", ROOT / "tests" / "native" / "emulator"
# Like nvcc's --fmad=false: no contraction.
FLAGS = (
    *("-std=c++17", "-g", "-fPIC", "-DQNK_EMULATE", "-fvisibility=hidden", "-fno-gnu-unique"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"),
    *("-I", str(ROOT / "csrc"), "-I", str(EMULATOR)),
)
# Undefined behaviour of kernels traps, misaligned loads among it.
KERNEL_FLAGS = ("-O1", "-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error")
ALIGNED = 64  # bytes; torch aligns no less
# orders of threads (lowest first, highest first, shuffled), and whether tensors end or start at a guard page
RUNS = ((0, False), (1, True), (2, True))
TRACKED_ORDER = 0  # in which writes are tracked: one is enough, and another would find the same
MOST_TRACKED = 1 << 16  # bytes of a tensor whose writes are tracked
TYPES = {  # in the names of kernels
    **{torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"},
    **{torch.uint8: "unsigned char", torch.uint16: "unsigned short"},
}

# Workers of one run of the tests share what they compile (conftest.py).
_folder = Path(os.environ.get("QNKERNELS_EMULATED") or tempfile.mkdtemp(prefix="emulated-"))
if "QNKERNELS_EMULATED" not in os.environ:
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)


@functools.cache
def _object(source: Path) -> Path:
    out = _folder / f"{source.parent.name}-{source.name}.o"
    flags = KERNEL_FLAGS if source.suffix == ".cu" else ("-O2",)
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first compiles, others wait for it
        if not out.exists():
            part = out.with_suffix(".part")
            command = ["g++", *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(part)]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            part.rename(out)
    return out


@functools.cache
def library(*sources: Path) -> ctypes.CDLL:
    """.cu files and the emulator in one shared library."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(_object, (*sources, *sorted(EMULATOR.glob("*.cpp")))))
    path = _folder / f"{'-'.join(source.stem for source in sources)}-{os.getpid()}.so"
    subprocess.run(["g++", "-shared", "-o", str(path), *map(str, objects)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.qnk_emulator_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    loaded.qnk_emulator_allocate.restype = ctypes.c_void_p
    loaded.qnk_emulator_free.argtypes = [ctypes.c_void_p]
    loaded.qnk_emulator_track.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    loaded.qnk_emulator_launches.restype = ctypes.POINTER(_Launch)
    loaded.qnk_cuda_last_error.restype = ctypes.c_char_p
    return loaded


def explain(message: str, path: str) -> str:
    """The message with the line of the source in place of the offset of a faulting instruction."""
    found = re.search(r"\[\+0x([0-9a-f]+)\]", message)
    if not found:
        return message
    command = ["addr2line", "-Cfpie", path, f"0x{found[1]}"]
    with contextlib.suppress(OSError):
        lines = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        place = "" if lines.startswith("??") else "at " + " ".join(lines.split())
        return message.replace(found[0], place)
    return message


class _Launch(ctypes.Structure):
    _fields_ = (
        *(("kernel", ctypes.c_uint64), ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32)),
        ("shared_bytes", ctypes.c_uint64),
    )


@dataclass
class Launch:
    kernel: str  # "int_linear_few_kernel<bf16, 4, 2, 4, 1, 8, false>"
    grid: tuple[int, int, int]
    threads: int  # of a block
    shared_bytes: int  # dynamic


@functools.cache
def _functions(path: str) -> dict[int, str]:
    """Those of a library, by offset, without their namespaces and parameters."""
    command = ["nm", "-C", "--defined-only", path]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {}
    for line in symbols.splitlines():
        offset, _, name = line.split(" ", 2)
        name = re.sub(r"(\(anonymous namespace\)|\w+)::", "", name).removeprefix("void ")
        names[int(offset, 16)] = name.split("(")[0].replace(" >", ">")
    return names


class Memory(TorchDispatchMode):
    """Inside, new tensors lie between guard pages, and those without values hold NaN.

    tracked: and a launch may write each element of these once.
    """

    def __init__(self, library: ctypes.CDLL, at_end: bool, tracked: bool, alignment: int) -> None:
        super().__init__()
        self._library, self._at_end, self._tracked, self.alignment = library, at_end, tracked, alignment
        self._pointers: list[int] = []

    def guarded(self, tensor: torch.Tensor, fill: bool = True) -> torch.Tensor:
        """A contiguous copy between guard pages, or, without fill, one of poison."""
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return tensor
        alignment = max(self.alignment, tensor.element_size())
        pointer = self._library.qnk_emulator_allocate(size, alignment, self._at_end)
        self._pointers.append(pointer)
        raw = torch.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype=torch.uint8)
        copy = raw.view(tensor.dtype).view(tensor.shape)
        if fill:
            copy.copy_(tensor)
        elif self._tracked and size <= MOST_TRACKED:
            name = f"a {tensor.dtype} {list(tensor.shape)}"
            self._library.qnk_emulator_track(pointer, tensor.element_size(), name.encode())
        return copy

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name in ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"):
            return self.guarded(result, fill=False)
        if name in ("zeros", "new_zeros", "zeros_like", "full", "new_full", "full_like", "_to_copy", "clone"):
            return self.guarded(result)
        return result

    def free(self) -> bool:
        """Whether what surrounds the tensors is as it was."""
        intact = [self._library.qnk_emulator_free(pointer) for pointer in self._pointers]
        self._pointers.clear()
        return all(intact)


class EmulatedKernels(CudaKernels):
    """The bindings of the CUDA library on CPU tensors."""

    def __init__(self, loaded: ctypes.CDLL, argtypes: dict[str, list] = CUDA_ARGTYPES | CUDA_STEPS) -> None:
        functions = argtypes | CUDA_QUERIES
        present = {name: types for name, types in functions.items() if hasattr(loaded, f"qnk_cuda_{name}")}
        super().__init__(declare(loaded, "cuda", present), loaded.qnk_cuda_last_error)
        self.library, self.alignment, self.alignment_of_new = loaded, ALIGNED, ALIGNED
        self.ops = (*(name for name in present if name in argtypes), "fake_quantize_marked")

    def _launch(self, name: str, device: torch.device, *arguments) -> None:
        try:
            self._call(name, *arguments, None)
        except RuntimeError as error:
            raise RuntimeError(explain(str(error), self.library._name)) from None

    def _query(self, name: str, device: torch.device, *arguments) -> int:
        return self._c[name](*arguments)

    def is_dense(self, op: str, x: torch.Tensor) -> bool:
        """As on a GPU where decode.cu is among the sources; others are tested with any number of tokens."""
        return "int_decode" in self._c and super().is_dense(op, x)

    def fake_quantize_marked(self, x, *arguments):
        """y and the marks, which run() would take for an argument that is written."""
        outside = x.new_empty(-(-x.numel() // OUTSIDE_TILE), dtype=torch.uint8)
        return self.fake_quantize(x, *arguments, outside), outside

    def run(self, op: str, *arguments, **keywords):
        """One op in every order; its result if they agree."""
        results = []
        for order, at_end in RUNS:
            memory = Memory(self.library, at_end, order == TRACKED_ORDER, self.alignment)
            copies = tree_map_only(torch.Tensor, memory.guarded, (arguments, keywords))
            memory.alignment = self.alignment_of_new
            self.library.qnk_emulator_schedule(order, order)
            self.library.qnk_emulator_forget_launches()
            try:
                with memory:
                    result = getattr(self, op)(*copies[0], **copies[1])
                results.append(tree_map_only(torch.Tensor, torch.clone, result))
                _assert_same(copies, (arguments, keywords), f"{op}: it writes an argument")
            finally:
                del copies
                result = None
                intact = memory.free()
            assert intact, f"{op}: it writes beside a tensor"
            _assert_same(results[-1], results[0], f"{op}: the result depends on the order of the threads")
        return results[0]


def _assert_same(actual, expected, message: str) -> None:
    """Bit for bit: nothing but the payload of a NaN may differ."""
    ones, others = (torch.utils._pytree.tree_leaves(tree) for tree in (actual, expected))
    for one, other in zip(ones, others, strict=True):
        if isinstance(one, torch.Tensor):
            same = (one == other) | ((one != one) & (other != other))
            assert same.all(), f"{message} ({int((~same).sum())} of {same.numel()} elements)"


@functools.cache
def _kernels(*names: str) -> EmulatedKernels:
    sources = [CUDA / f"{name}.cu" for name in (*names, "status")]
    return EmulatedKernels(library(*sources))


def emulated(*names: str) -> dict[str, Callable]:
    """The ops of csrc/cuda/<name>.cu, by name, like `kernels("cuda")`."""
    kernels = _kernels(*names)
    return {op: functools.partial(kernels.run, op) for op in kernels.ops}


@contextlib.contextmanager
def alignment(size: int, *names: str, of_new: int | None = None) -> Iterator[None]:
    """Tensors of the kernels of `names` start at multiples of `size` bytes and, below 64, of no more.

    of_new: the same of those that the ops make, where it is another.
    """
    kernels = _kernels(*names)
    kernels.alignment, kernels.alignment_of_new = size, size if of_new is None else of_new
    try:
        yield
    finally:
        kernels.alignment = kernels.alignment_of_new = ALIGNED


@contextlib.contextmanager
def processors(count: int, *names: str) -> Iterator[None]:
    """A device of `count` multiprocessors, which launchers may ask for (3 otherwise)."""
    loaded = _kernels(*names).library
    loaded.qnk_emulator_processors(count)
    try:
        yield
    finally:
        loaded.qnk_emulator_processors(3)


def launches(*names: str) -> list[Launch]:
    """What the last op of the kernels of `names` has launched."""
    loaded, count = _kernels(*names).library, ctypes.c_size_t()
    found = loaded.qnk_emulator_launches(ctypes.byref(count))[: count.value]
    functions = _functions(loaded._name)
    return [Launch(functions[one.kernel], tuple(one.grid), one.threads, one.shared_bytes) for one in found]


@contextlib.contextmanager
def capability(tens: int, *names: str) -> Iterator[None]:
    """A device of compute capability tens / 10 (8.0 otherwise), with its shared memory."""
    loaded = _kernels(*names).library
    loaded.qnk_emulator_capability(tens)
    try:
        yield
    finally:
        loaded.qnk_emulator_capability(80)


@contextlib.contextmanager
def wgmma_wherever_possible(*names: str) -> Iterator[None]:
    """Launchers do not weigh whether wgmma is the fastest."""
    use = _kernels(*names).library.qnk_cuda_use_wgmma
    before = use(2)
    try:
        yield
    finally:
        use(before)


def warpgroup_products(*names: str) -> int:
    """How many wgmma the kernels of `names` have run since the last call."""
    return _kernels(*names).library.qnk_emulator_products()


@contextlib.contextmanager
def shared_memory(size: int, *names: str) -> Iterator[None]:
    """A device whose blocks may have `size` bytes of shared memory, whatever its compute capability."""
    loaded = _kernels(*names).library
    loaded.qnk_emulator_shared_memory(size)
    try:
        yield
    finally:
        loaded.qnk_emulator_shared_memory(0)
