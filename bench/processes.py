"""Commands with a time limit that end with all the processes they started."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Finished:
    code: int | None  # the exit code; None: stopped at the limit
    output: str  # stdout and stderr


def finish(command: Sequence[str], seconds: float | None = None, **options) -> Finished:
    """Run to the end, or for `seconds`. What it starts stays in this process group, for Ctrl-C."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, **options)
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            end(process)
        output.seek(0)
        return Finished(code, output.read())


def end(process: subprocess.Popen) -> None:
    """Kill a process that still runs, and what it started: a tool that is killed leaves what it watches."""
    if process.poll() is not None:
        return
    for pid in (process.pid, *descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, from /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace")  # "pid (name) state parent ..."
            parent = text.rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]
