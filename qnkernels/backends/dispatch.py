"""Which of the GPU backends serves an op, by size: a rule measured on the machine, or what an H200 measured.

Where both "triton" and "cuda" have an op, "cuda" serves it unless DEFAULT says otherwise, as was measured
on an NVIDIA H200. Measurements on the machine change that: `python bench/gpu_suite.py` times both on its
GPU, and at its end writes, as `python bench/dispatch.py` does from the tables that it left, a rule for
each op that both have: from the smallest size up, the backend that was faster, as in

    {"format": 1, "qnkernels": "0.1.0", "devices": {"NVIDIA H100 80GB HBM3": {
        "measured": "2026-01-31, commit 0123456789",
        "rules": {"int_linear": [["cuda", 16], ["triton", null]]}}}}

which reads: cuda up to 16 rows of x, triton for more. SIZES says what the size of each op is. The file is
~/.config/qnkernels/dispatch.json ($XDG_CONFIG_HOME is minded), or the one that QNKERNELS_DISPATCH names;
empty means none. It is read once in a process. It can choose between backends of this package and do nothing
else. Without a file, for another GPU, or where the GPUs of a machine differ the defaults hold; so they
do, with one warning, where the file is of another version of qnkernels or not what is described here.

Nothing is tuned at run time. `qnkernels doctor` shows what serves what, and why.
"""

import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

FORMAT = 1
CHOICES = ("triton", "cuda")
HOW_TO_MEASURE = "`python bench/gpu_suite.py` in the source tree measures"
LARGEST_FILE = 1 << 20  # bytes

Steps = tuple[tuple[str, int | None], ...]  # (backend, the largest size it serves), None: the rest

DEFAULT: dict[str, Steps] = {"fake_quantize": (("triton", None),)}
DEFAULT_WHY = "as measured on an NVIDIA H200"


@dataclass(frozen=True)
class Size:
    """What an op's rule depends on: the name of the number, and how to read it from a kernel's arguments."""

    name: str
    of: Callable[..., int]


SIZES = {
    "fake_quantize": Size("elements", lambda x, *_: x.numel()),
    "int_linear": Size("rows of x", lambda x, *_: x.shape[0]),
    "pq_linear": Size("rows of x", lambda x, *_: x.shape[0]),
    "pq_linear_backward": Size("rows of x", lambda grad, *_: grad.shape[0]),
    "kmeans_step": Size("centroids", lambda points, centroids, *_: centroids.shape[0]),
}


@dataclass(frozen=True)
class Rules:
    """The rules of the GPU of this process, by op, and where they come from in words."""

    why: str
    steps: dict[str, Steps] = field(default_factory=DEFAULT.copy)


def path() -> Path | None:
    named = os.environ.get("QNKERNELS_DISPATCH")
    if named is not None:
        return Path(named) if named else None
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "qnkernels" / "dispatch.json"


@functools.cache
def rules() -> Rules:
    """The rules that hold in this process; read once."""
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    if len(names) != 1:
        return Rules(f"{DEFAULT_WHY}: there are GPUs of several kinds here" if names else "no GPU here")
    file = path()
    if file is None or not file.exists():
        return Rules(f"{DEFAULT_WHY}: nothing was measured on this machine ({HOW_TO_MEASURE})")
    device = names.pop()
    try:
        devices = read(file)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{file} is ignored: {error}; {HOW_TO_MEASURE} anew, and removing the file ends this warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return Rules(f"{DEFAULT_WHY}: {file} is ignored: {error}")
    if device not in devices:
        return Rules(f"{DEFAULT_WHY}: {file} has no rules for {device} ({HOW_TO_MEASURE})")
    return Rules(f"measured on {device}, {devices[device][0]}: {file}", DEFAULT | devices[device][1])


def package_version() -> str:
    return sys.modules[__package__.split(".")[0]].__version__  # of the root, which imports this module


def read(file: Path) -> dict[str, tuple[str, dict[str, Steps]]]:
    """(when measured, steps by op) by device name; raises ValueError naming what is wrong with the file."""
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError("it is larger than any such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'expected an object with "format": {FORMAT}')
    measured_with, here = content.get("qnkernels"), package_version()
    if measured_with != here:
        raise ValueError(f"it was measured with qnkernels {measured_with!r:.40}, and this is {here!r}")
    return {
        name: (str(_get(one, "measured", str)), _steps(_get(one, "rules", dict)))
        for name, one in _get(content, "devices", dict).items()
    }


def _get(holder: object, key: str, kind: type):
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"expected {key!r} as in its documentation, got {value!r:.60}")
    return value


def _steps(by_op: dict) -> dict[str, Steps]:
    for op, steps in by_op.items():
        if op not in SIZES:
            raise ValueError(f"expected ops of {', '.join(SIZES)}, got {op!r:.40}")
        if not _well_formed(steps):
            raise ValueError(f"expected for {op} growing sizes with backends of {CHOICES}, got {steps!r:.80}")
    return {op: tuple((name, limit) for name, limit in steps) for op, steps in by_op.items()}


def _well_formed(steps: object) -> bool:
    if not isinstance(steps, list) or not steps:
        return False
    if not all(isinstance(step, list) and len(step) == 2 and step[0] in CHOICES for step in steps):
        return False
    *limits, last = (limit for _, limit in steps)
    whole = all(type(limit) is int and limit > 0 for limit in limits)
    return last is None and whole and all(low < high for low, high in itertools.pairwise(limits))


def write(file: Path, device: str, measured: str, by_op: dict[str, Steps]) -> None:
    """Put these rules into the file; those of other ops and devices in it stay, where it is as described."""
    try:
        devices = read(file) if file.exists() else {}
    except ValueError:
        devices = {}
    devices[device] = (measured, {**devices.get(device, ("", {}))[1], **by_op})
    content = {
        "format": FORMAT,
        "qnkernels": package_version(),
        "devices": {name: {"measured": when, "rules": steps} for name, (when, steps) in devices.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def in_words(op: str, steps: Steps) -> str:
    """ "cuda up to 16 rows of x, then triton"."""
    *bounded, (last, _) = steps
    parts = [f"{name} up to {limit:,} {SIZES[op].name}" for name, limit in bounded]
    return ", then ".join([*parts, last])


def by_size(op: str, steps: Steps, kernels: dict[str, Callable]) -> Callable:
    """A kernel that hands its arguments to that of the step they belong to."""
    size = SIZES[op].of
    bounded = tuple((limit, kernels[name]) for name, limit in steps[:-1])
    rest = kernels[steps[-1][0]]

    def chosen(*arguments):
        asked = size(*arguments)
        for limit, kernel in bounded:
            if asked <= limit:
                return kernel(*arguments)
        return rest(*arguments)

    return chosen
