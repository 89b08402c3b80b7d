"""Which callable serves which op on which device.

A backend is a module with `load() -> dict[op name, callable]`. Each callable has the signature of the
reference function of that name, takes checked, contiguous tensors, and returns new ones. `load` raises
BackendUnavailable with one sentence that says what to do when the backend cannot work here. On a GPU, where
two backends may have an op, measurements decide: see dispatch.py.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator

from . import dispatch

BACKENDS = ("reference", "cpu", "triton", "cuda")
# The first that has the op serves it, unless a rule says otherwise.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

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
    steps = _steps(op, device_type)
    if steps:
        by_name = {name: kernels(name)[op] for name, _ in steps}
        return by_name[steps[0][0]] if len(steps) == 1 else dispatch.by_size(op, steps, by_name)
    missing = ((name, _load(name)) for name in PREFERENCE.get(device_type, ()))
    reasons = [f"{name}: {why}" for name, why in missing if isinstance(why, BackendUnavailable)]
    why = "; ".join(reasons) or f"no backend has a kernel for {device_type} tensors"
    warnings.warn(
        f"{op} on {device_type} falls back to the slow reference ({why})", RuntimeWarning, stacklevel=2
    )
    return kernels("reference")[op]


def select_whole(op: str) -> Callable | None:
    """What serves `op` on the CPU without checks of its arguments, if anything does: it returns None for what
    it leaves to the callable of `select`, and while anybody looks at ops (see watchers.py).
    """
    return _select_whole(op, _forced)


@functools.cache
def _select_whole(op: str, forced: str | None) -> Callable | None:
    if forced != "cpu" and (forced is not None or _steps(op, "cpu") != (("cpu", None),)):
        return None
    return importlib.import_module(f"{__name__}.cpu_tensors").load().get(op)


def _steps(op: str, device_type: str) -> dispatch.Steps:
    """The backends that serve `op`, by size; empty where none but the reference does."""
    loaded = {name: _load(name) for name in PREFERENCE.get(device_type, ())}
    able = [name for name, one in loaded.items() if not isinstance(one, BackendUnavailable) and op in one]
    measured = _rule(op, device_type) if len(able) > 1 else ()
    return measured or tuple((name, None) for name in able[:1])


def _rule(op: str, device_type: str) -> dispatch.Steps:
    return dispatch.rules().steps.get(op, ()) if device_type == "cuda" else ()


def serving(op: str, device_type: str) -> str:
    """Who serves `op` on `device_type` when none is forced: the name of a backend, or several by size."""
    steps = _steps(op, device_type)
    return dispatch.in_words(op, steps) if steps else "reference"


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
