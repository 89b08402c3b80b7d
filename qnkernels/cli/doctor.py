"""qnkernels doctor."""

import ctypes
import importlib.util
import os
import platform
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from .. import __version__
from ..backends import BACKENDS, BackendUnavailable, dispatch, kernels, serving
from ..backends.native import build_info, open_library
from ..ops import OPS
from .console import out, print_json

DEVICES = ("cpu", "cuda")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what was built, found and chosen: versions, instruction sets, GPUs, the backend of each op."""
    findings = examine()
    if as_json:
        print_json(findings)
    else:
        for table in tables(findings):
            out.print(table)


def examine() -> dict:
    """All findings; works with nothing built. A backend's state is "available" or why it is not."""
    return {
        "versions": _versions(),
        "build": build_info(),
        "cpu": _cpu_library(),
        "gpus": _gpus(),
        "backends": {name: _state(name) for name in BACKENDS},
        "serving": {device: {op: serving(op, device) for op in OPS} for device in DEVICES},
        "dispatch": dispatch.rules().why,
    }


def _versions() -> dict:
    triton = "not installed"
    if importlib.util.find_spec("triton") is not None:
        import triton as module

        triton = module.__version__
    return {
        "qnkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "not in this torch",
        "platform": platform.platform(),
    }


def _cpu_library() -> dict:
    """Instruction sets, threads and OpenMP as the C++ library sees them; {} where there is none."""
    try:
        library = open_library("cpu")
    except BackendUnavailable:
        return {}
    isa, detected = library.qnk_cpu_isa, library.qnk_cpu_isa_detected
    isa.restype = detected.restype = ctypes.c_char_p
    found = {
        "isa": isa().decode(),
        "isa_detected": detected().decode(),
        "threads": library.qnk_cpu_threads(),
        "openmp": bool(library.qnk_cpu_has_openmp()),
    }
    if "QNKERNELS_ISA" in os.environ:
        found["QNKERNELS_ISA"] = os.environ["QNKERNELS_ISA"]
    return found


def _gpus() -> list[dict]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "capability": capability, "bytes": properties.total_memory})
    return gpus


def _state(name: str) -> str:
    try:
        kernels(name)
    except BackendUnavailable as error:
        return str(error)
    return "available"


def tables(findings: dict) -> list[Table]:
    facts = Table(title="found", box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    for name, value in findings["versions"].items():
        facts.add_row(name, value)
    for name, value in findings["build"].items():
        facts.add_row(f"build: {name}", _text(value))
    if not findings["build"]:
        facts.add_row("build", "nothing was built")
    for name, value in findings["cpu"].items():
        facts.add_row(f"cpu: {name}", _text(value))
    for gpu in findings["gpus"]:
        facts.add_row("gpu", f"{gpu['name']}, sm {gpu['capability']}, {gpu['bytes'] / 2**30:.0f} GiB")
    if not findings["gpus"]:
        facts.add_row("gpu", "none")
    states = Table(title="backends", box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    for name, state in findings["backends"].items():
        states.add_row(name, state, style="" if state == "available" else "yellow")
    columns = [name if name == "cpu" or findings["gpus"] else f"{name} (none here)" for name in DEVICES]
    served = Table("op", *columns, title="who serves which op", box=box.SIMPLE_HEAD, title_justify="left")
    served.caption, served.caption_justify = f"cuda: {findings['dispatch']}", "left"
    for op in OPS:
        served.add_row(op, *(findings["serving"][device][op] for device in DEVICES))
    return [facts, states, served]


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) or "none"
