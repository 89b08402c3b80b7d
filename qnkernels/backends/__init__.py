"""Which callable serves which op on which device.

A backend is a module with `load() -> dict[op name, callable]`. Each callable has the signature of the
reference function of that name, takes checked, contiguous tensors, and returns new ones. `load` raises
BackendUnavailable with one sentence that says what to do when the backend cannot work here.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator

BACKENDS = ("reference", "cpu", "triton", "cuda")
# First that is available serves the op. "cuda" stands behind "triton" until measurements say otherwise.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_forced: str | None = None


class BackendUnavailable(RuntimeError):
    """The backend cannot work here; the message says why and what to do."""


@functools.cache
def _load(name: str) -> dict[str, Callable] | BackendUnavailable:
    try:
        return importlib.import_module(f"{__name__}.{name}").load()
    except BackendUnavailable as error:
        return error


def kernels(name: str) -> dict[str, Callable]:
    """The callables of a backend by op name; raises BackendUnavailable."""
    loaded = _load(name)
    if isinstance(loaded, BackendUnavailable):
        raise loaded
    return loaded


def select(op: str, device_type: str) -> Callable:
    """The callable that serves `op` for tensors on `device_type` ("cpu", "cuda", ...)."""
    return _select(op, device_type, _forced)


@functools.cache
def _select(op: str, device_type: str, forced: str | None) -> Callable:
    if forced is not None:
        available = kernels(forced)
        if op not in available:
            raise BackendUnavailable(
                f"backend {forced!r} has no kernel for {op!r}; leave it unforced for this op"
            )
        return available[op]
    reasons = []
    for name in PREFERENCE.get(device_type, ()):
        loaded = _load(name)
        if isinstance(loaded, BackendUnavailable):
            reasons.append(f"{name}: {loaded}")
        elif op in loaded:
            return loaded[op]
    why = "; ".join(reasons) or f"no backend has a kernel for {device_type} tensors"
    warnings.warn(
        f"{op} on {device_type} falls back to the slow reference ({why})", RuntimeWarning, stacklevel=2
    )
    return kernels("reference")[op]


def serving(op: str, device_type: str) -> str:
    """Name of the backend that serves `op` on `device_type` when none is forced."""
    for name in PREFERENCE.get(device_type, ()):
        loaded = _load(name)
        if not isinstance(loaded, BackendUnavailable) and op in loaded:
            return name
    return "reference"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend, "reference", "cpu", "triton" or "cuda", for all ops inside the block.

    The choice is that of the process, not of the thread, because autograd runs backward kernels in
    threads of its own. Raises ValueError for an unknown name and BackendUnavailable for a missing one.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    kernels(name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
