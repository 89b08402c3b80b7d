"""How one sample of a contender is taken: seconds per call, over some back-to-back calls.

On the CPU it is wall time over one set of inputs, after a call that is not timed. On a GPU it is time between
events on the stream, over a captured graph where the contender can be captured (its launches then cost next
to nothing), rotating among input sets that together exceed the cache.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

CACHE_MULTIPLE = 3  # inputs of a rotation, in units of the cache they must not fit in
MAX_SETS = 64
MAX_GRAPH_CALLS = 512
SLOW = 0.5  # seconds of a call, from which on it is not made more often than samples need

Sampler = tuple[Callable[[], float], int, str]  # takes a sample; calls in it; "wall", "graph" or "events"


def input_sets(moved_bytes: int, device: torch.device) -> int:
    """How many input sets to rotate among, so that a GPU's L2 cannot hold them from one call to the next."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, max(1, math.ceil(CACHE_MULTIPLE * cache / max(moved_bytes, 1))))


def sampler(runs: list[Callable], sample_seconds: float, device: torch.device, capture: bool) -> Sampler:
    """A sampler of the same call on one or several input sets, at least `sample_seconds` long."""
    if device.type == "cuda":
        return _on_cuda(runs, sample_seconds, capture)
    return _on_cpu(runs[0], sample_seconds)


def _on_cpu(run: Callable, sample_seconds: float) -> Sampler:

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def sample() -> float:
        if calls > 1:
            run()  # the last contender left the caches to itself, and memory that it gave back is new again
        return timed(calls)

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
