"""Which commit something ran at, and what of the kernels has changed since."""

import subprocess

from environment import ROOT

# What a GPU runs of ours: csrc and the bindings that launch it, and Triton's kernels.
KERNELS = (
    *("csrc/cuda", "csrc/common", "csrc/qnkernels.h", "qnkernels/backends/triton"),
    *("qnkernels/backends/cuda*.py", "qnkernels/backends/native.py", "qnkernels/backends/dispatch.py"),
)


def is_exact(commit: str) -> bool:
    """Whether it names one state of the source tree: "+" stands for files that differ from it."""
    return bool(commit) and commit != "unknown" and not commit.endswith("+")


def differs(*paths: str) -> bool:
    """Whether files there differ from the commit that the source tree is at; False without a history."""
    return bool(git("status", "--porcelain", "--", *paths))


def kernels_changed_since(commit: str) -> list[str] | None:
    """Source files of GPU kernels that differ now; None where the commit is not in the history here."""
    changed = git("diff", "--name-only", commit.rstrip("+"), "--", *KERNELS)
    return None if changed is None else changed.splitlines()


def git(*arguments: str) -> str | None:
    """What git prints, None where it fails or is missing."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
