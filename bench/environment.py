"""What a measurement ran on: device, versions, threads, commit."""

import ctypes
import datetime
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import qnkernels
from qnkernels.backends import BackendUnavailable
from qnkernels.backends.native import open_library

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("device", "threads", "python", "torch", "triton", "qnkernels", "cuda", "driver", "commit", "date")


def describe(device: torch.device) -> dict[str, str]:
    """One value per name in FIELDS, empty where it does not apply."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "qnkernels": qnkernels.__version__,
        "cuda": (torch.version.cuda or "") if on_gpu else "",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else "",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's, its number of logical cores, and our kernels' instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    name = processor_name(cpuinfo.read_text()) if cpuinfo.exists() else ""
    name = name or platform.processor() or platform.machine()
    return f"{name} x{os.cpu_count()} {_instruction_set()}".strip()


def processor_name(cpuinfo: str) -> str:
    """The model; where the name has no number that tells generations apart ("AMD EPYC"), the family as well,
    and Intel's model number, whose family is always 6. "" if there is none."""
    name, family, model = (
        re.search(rf"^{field}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        for field in ("model name", "cpu family", "model")
    )
    if name is None:
        return ""
    told = re.search(r"\d", name[1]) or family is None
    if not told and name[1].startswith("AMD"):
        return f"{name[1]} family {family[1]}"
    if not told and name[1].startswith("Intel") and model is not None:
        return f"{name[1]} family {family[1]} model {model[1]}"
    return name[1]


def folder_name(device_name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    plain = re.sub(r"\((R|TM|C)\)", "", device_name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def commit() -> str:
    """Short commit of the source tree, "+" where files differ from it. QNKERNELS_COMMIT names the commit of
    a copy without history."""
    named = os.environ.get("QNKERNELS_COMMIT")
    if named:
        return named
    revision = _first_line("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if not revision:
        return "unknown"
    changed = _first_line(
        "git", "-C", str(ROOT), "status", "--porcelain", "--", "qnkernels", "csrc", "bench/*.py"
    )
    return revision + ("+" if changed else "")


def _instruction_set() -> str:
    try:
        function = open_library("cpu").qnk_cpu_isa
    except BackendUnavailable:
        return ""
    function.restype = ctypes.c_char_p
    return function().decode()


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return ""
    import triton

    return triton.__version__


def _first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = result.stdout.strip().splitlines()
    return lines[0] if result.returncode == 0 and lines else ""
