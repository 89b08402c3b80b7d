"""How one sample of a contender is taken: seconds per call, over some back-to-back calls.

On the CPU it is wall time, after calls that are not timed: over one set of inputs, which caches hold as far
as they can, or, where the case is measured from memory, rotating among input sets that together exceed the
cache. On a GPU it is time between events on the stream, over a captured graph where the contender can be
captured (its launches then cost next to nothing), rotating among input sets always.
"""

import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

CACHE_MULTIPLE = 3  # inputs of a rotation, in units of the cache they must not fit in
MAX_SETS = 64
MAX_GRAPH_CALLS = 512
WARM_CALLS = 32  # before a sample, at most: tensors of 19 MB in a cache of 32 take 10 to 25 to settle
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
SLOW = 0.5  # seconds of a call, from which on it is not made more often than samples need

Sampler = tuple[Callable[[], float], int, str]  # takes a sample; calls in it; "wall", "graph" or "events"


def input_sets(moved_bytes: int, device: torch.device, from_memory: bool = False) -> int:
    """How many input sets to rotate among, so that no cache can hold them from one call to the next: on a GPU
    always, on a CPU where they are to come from memory."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    elif from_memory:
        cache = last_level_cache()
    else:
        return 1
    return min(MAX_SETS, max(1, math.ceil(CACHE_MULTIPLE * cache / max(moved_bytes, 1))))


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 64 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    kibibytes = [int(size[:-1]) for size in sizes if size.endswith("K")]
    return 1024 * max(kibibytes, default=64 * 1024)


def sampler(runs: list[Callable], sample_seconds: float, device: torch.device, capture: bool) -> Sampler:
    """A sampler of the same call on one or several input sets, at least `sample_seconds` long."""
    if device.type == "cuda":
        return _on_cuda(runs, sample_seconds, capture)
    return _on_cpu(runs, sample_seconds)


def _on_cpu(runs: list[Callable], sample_seconds: float) -> Sampler:
    kept: list[object] = [None] * len(runs)
    rotation = itertools.cycle(range(len(runs)))

    def work(calls: int) -> None:
        if len(runs) == 1:
            for _ in range(calls):
                runs[0]()
            return
        for index in itertools.islice(rotation, calls):
            kept[index] = runs[index]()  # outputs rotate, too

    def timed(calls: int) -> float:
        start = time.perf_counter()
        work(calls)
        return (time.perf_counter() - start) / calls

    def sample() -> float:
        # the last contender left the caches to itself, and memory that it gave back is new again
        if calls > 1:
            work(min(WARM_CALLS, calls))
        seconds = timed(calls)
        kept[:] = [None] * len(runs)
        return seconds

    once = timed(1)  # compiles, fills caches
    if once < SLOW:
        once = min(timed(1) for _ in range(3))
    calls = max(1, math.ceil(sample_seconds / once))
    return sample, calls, "wall"


def _on_cuda(runs: list[Callable], sample_seconds: float, capture: bool) -> Sampler:
    kept: list[object] = [None] * len(runs)

    def work(calls: int) -> None:
        for index in range(calls):
            kept[index % len(runs)] = runs[index % len(runs)]()  # outputs rotate, too

    work(max(3, len(runs)))
    once = _between_events(lambda: work(len(runs))) / len(runs)
    calls = len(runs) * max(1, math.ceil(sample_seconds / once / len(runs)))
    graph = _capture(lambda: work(min(calls, MAX_GRAPH_CALLS))) if capture else None
    if graph is None:
        return lambda: _between_events(lambda: work(calls)) / calls, calls, "events"
    calls = min(calls, MAX_GRAPH_CALLS)

    def sample(held: tuple = (runs, kept)) -> float:  # which the graph reads and does not own
        return _between_events(graph.replay) / calls

    return sample, calls, "graph"


def _between_events(work: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _capture(work: Callable[[], None]) -> "torch.cuda.CUDAGraph | None":
    """A graph of the work, or None where it cannot be captured (it waits for the device, say)."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def processor_seconds() -> tuple[float, float, float]:
    """Seconds so far: idle over all cores, used over all cores, used by this process."""
    fields = [float(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]  # idle and waiting for input
    own = os.times()
    ticks = os.sysconf("SC_CLK_TCK")
    return idle / ticks, (sum(fields) - idle) / ticks, own.user + own.system


def other_load(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    idle, used, own = (late - early for early, late in zip(before, after, strict=True))
    return max(0.0, used - own) / max(idle + used, 1e-9)
