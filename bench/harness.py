"""Interleaved timing: the contenders of a case take turns in one process, so that drift hits them all alike.

How one sample is taken is said in samplers.py.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch

import qnkernels
import samplers
from qnkernels.backends import kernels, serving

ROLES = ("ours", "reference", "peer", "ceiling")


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `prepare(inputs)` returns the call that is timed."""

    name: str
    role: str
    prepare: Callable[[object], Callable[[], object]]
    backend: str | None = None  # forced while it runs
    capture: bool = True  # on a GPU, into a graph; not for what waits for the device or launches thousands

    @property
    def is_compiled(self) -> bool:
        """Made by `compiled`; all that are have this name."""
        return self.name.startswith("torch.compile")


@dataclass(frozen=True)
class Case:
    """One group of the suite: an op at one shape, with all its contenders; one of them is the ceiling."""

    op: str
    name: str
    shape: str
    dtype: str
    moved_bytes: int  # read once + written once
    operations: int  # multiply-adds count 2; 0 where memory is the only floor
    inputs: Callable[[torch.device, int], object]  # (device, index of the set)
    contenders: Callable[[str], list[Contender]]  # (device type); must be cheap, names are read at collection
    devices: tuple[str, ...] = ("cpu", "cuda")
    target: float | None = None  # largest accepted ratio of ours to the ceiling
    # least accepted ratio of a peer's time to ours, and the peer; "": the fastest there is
    peer_target: tuple[float, str] | None = None
    quick: bool = False  # part of the short run
    from_memory: bool = False  # on a CPU: among input sets that exceed its cache, as on a GPU always
    gradients: bool = True  # False: prepared and timed under torch.no_grad()
    size: int | None = None  # what the choice between GPU backends goes by: qnkernels.backends.dispatch.SIZES

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"

    def targets(self) -> dict[str, float | str | None]:
        """The columns of a CSV that say what ours should reach."""
        least, peer = self.peer_target or (None, None)
        return {"target": self.target, "peer_target": least, "target_peer": peer}


@dataclass(frozen=True)
class Budget:
    rounds: int  # at most, per contender
    sample_seconds: float  # shortest sample
    contender_seconds: float  # time a contender may take in all; the slow ones get fewer rounds

    def quota(self, sample_seconds: float) -> int:
        least = MIN_ROUNDS if sample_seconds < samplers.SLOW else MIN_SLOW_ROUNDS
        return max(min(self.rounds, least), min(self.rounds, int(self.contender_seconds / sample_seconds)))


MIN_ROUNDS, MIN_SLOW_ROUNDS = 5, 3
FULL = {"cpu": Budget(60, 0.01, 2.0), "cuda": Budget(60, 0.002, 1.0)}
QUICK = {"cpu": Budget(15, 0.005, 0.5), "cuda": Budget(20, 0.001, 0.2)}
# brief: every case, few rounds; torch.compile and the reference only in the cases of a quick run
BUDGETS = {"full": FULL, "brief": QUICK, "quick": QUICK}


@dataclass
class Samples:
    calls: int
    timer: str  # "wall", "graph" or "events"
    seconds: list[float] = field(default_factory=list)


@dataclass
class Measurement:
    samples: dict[str, Samples]
    failures: dict[str, str]  # contender -> why it did not run
    ceiling: str  # the contender that ratios are taken to
    other_load: float  # share of the processor that other programs took meanwhile, 0 to 1

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name].seconds)

    def ratio(self, name: str, other: str) -> float | None:
        """Median over median; None where one of the two did not run."""
        if name not in self.samples or other not in self.samples:
            return None
        return self.median(name) / self.median(other)


def ours(op: str, device_type: str, prepare: Callable) -> list[Contender]:
    """The reference and every compiled backend of ours that has the op on this device.

    Triton's interpreter, which is what serves CPU tensors, is for tests and not timed.
    """
    names = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}[device_type]
    found = [Contender(name, "ours", prepare, backend=name) for name in names if has_kernel(name, op)]
    return [*found, _reference(prepare)]


def served(op: str, device_type: str, prepare: Callable) -> list[Contender]:
    """As `ours`, where several ops work together: the backend that users get, unforced, and the reference."""
    name = serving(op, device_type)
    found = [] if name == "reference" else [Contender(name, "ours", prepare)]
    return [*found, _reference(prepare)]


def _reference(prepare: Callable) -> Contender:
    return Contender("reference", "reference", prepare, backend="reference", capture=False)


def has_kernel(backend: str, op: str) -> bool:
    try:
        return op in kernels(backend)
    except qnkernels.BackendUnavailable:
        return False


def compiled(function: Callable) -> Callable:
    """torch.compile for fixed shapes at the first call, with a fresh cache, so that no case meets the
    recompilation limit."""

    @cache
    def build() -> Callable:
        import torch._functorch.config as config

        config.donated_buffer = False  # a benchmark runs one backward graph many times
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    return lambda *arguments: build()(*arguments)


def chosen(cases: Iterable[Case], device_type: str, mode: str) -> list[Case]:
    """The cases, and of each the contenders, that a run on the device takes; mode: one of BUDGETS."""
    found = [case for case in cases if device_type in case.devices and (case.quick or mode != "quick")]
    if mode == "full":
        return found
    return [case if case.quick else replace(case, contenders=partial(_fast_ones, case)) for case in found]


def _fast_ones(case: Case, device_type: str) -> list[Contender]:
    return [one for one in case.contenders(device_type) if not one.is_compiled and one.role != "reference"]


def warm(case: Case, device: torch.device) -> None:
    """Run ours and the peers once, without timing, for what their compilers leave on disk."""
    inputs = case.inputs(device, 0)
    with torch.set_grad_enabled(case.gradients):
        for contender in case.contenders(device.type):
            if contender.role in ("ours", "peer"):
                with contextlib.suppress(Exception), _forced(contender.backend):  # the benchmark tells
                    contender.prepare(inputs)()


def turns(names: list[str], round_index: int) -> list[str]:
    """Order of a round: each pair of rounds starts one later and its second runs backwards, so that nobody
    always follows the same neighbour."""
    start = round_index // 2 % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if round_index % 2 else order


def interleave(takers: dict[str, Callable[[], float]], quotas: dict[str, int]) -> dict[str, list[float]]:
    """Seconds per call of each contender, one sample per round until its quota is reached."""
    seconds: dict[str, list[float]] = {name: [] for name in takers}
    for index in range(max(quotas.values(), default=0)):
        for name in turns(list(takers), index):
            if len(seconds[name]) < quotas[name]:
                seconds[name].append(takers[name]())
    return seconds


def measure(case: Case, device: torch.device, budget: Budget) -> Measurement:
    """Prepare every contender of the case, warm it up, and let them take turns."""
    with _side_stream(device), _no_garbage_collection(), torch.set_grad_enabled(case.gradients):
        sets = samplers.input_sets(case.moved_bytes, device, case.from_memory)
        inputs = [case.inputs(device, index) for index in range(sets)]
        samples, takers, quotas, failures = {}, {}, {}, {}
        contenders = case.contenders(device.type)
        for contender in contenders:
            # a peer may refuse the device or dtype in any way it likes; the rest of the group goes on
            try:
                with _forced(contender.backend):
                    runs = [contender.prepare(one) for one in inputs]
                    sample, calls, timer = samplers.sampler(
                        runs, budget.sample_seconds, device, contender.capture
                    )
                    longest = _elapsed(sample)
                    if longest < samplers.SLOW:
                        longest = max(longest, _elapsed(sample))
            except Exception as error:
                failures[contender.name] = _in_one_line(error)
                continue
            samples[contender.name] = Samples(calls, timer)
            takers[contender.name] = _within(contender.backend, sample)
            quotas[contender.name] = budget.quota(longest)
        before = samplers.processor_seconds()
        for name, seconds in interleave(takers, quotas).items():
            samples[name].seconds = seconds
        other_load = samplers.other_load(before, samplers.processor_seconds())
    ceiling = next(contender.name for contender in contenders if contender.role == "ceiling")
    return Measurement(samples, failures, ceiling, other_load)


def _elapsed(sample: Callable[[], float]) -> float:
    """Seconds that a sample takes, with the calls that are not timed."""
    start = time.perf_counter()
    sample()
    return time.perf_counter() - start


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _within(backend: str | None, sample: Callable[[], float]) -> Callable[[], float]:
    def forced_sample() -> float:
        with _forced(backend):
            return sample()

    return forced_sample


def _forced(backend: str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if backend is None else qnkernels.backend(backend)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Everything on one stream that is not the default one: a graph can be captured from it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
