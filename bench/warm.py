"""Fill the compilers' caches on disk for a suite: `python bench/warm.py SUITE --device cuda [--brief]`.

Runs each contender once, without timing, so that the benchmark, in another process, finds the kernels of
Triton and torch.compile compiled. What fails here is silent: the benchmark reports it.
"""

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import harness
import run


def warm_suites(suites: Sequence[str], device: str, mode: str, seconds: float | None = None) -> None:
    """Each suite in a process of its own, one for two cores at a time, all ended after `seconds`."""
    until = None if seconds is None else time.perf_counter() + seconds
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for suite in suites:
            pool.submit(_warm, suite, device, mode, until)


def _warm(suite: str, device: str, mode: str, until: float | None) -> None:
    command = [sys.executable, str(Path(__file__)), suite, f"--device={device}"]
    command += [f"--{mode}"] * (mode != "full")
    # kernels are compiled in this process: the cores have enough to do
    env = {**run.source_tree_env(), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    left = None if until is None else max(0.0, until - time.perf_counter())
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=run.ROOT, env=env, capture_output=True, timeout=left)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=run.SUITES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    run.add_modes(parser)
    options = parser.parse_args(arguments)
    # torch.compile times variants of a kernel and would keep what it chose on a busy machine
    torch._inductor.config.autotune_local_cache = False
    cases = importlib.import_module(f"bench_{options.suite}").CASES
    for case in harness.chosen(cases, options.device, options.mode):
        with contextlib.suppress(Exception):
            harness.warm(case, torch.device(options.device))


if __name__ == "__main__":
    main()
