"""The part of a GPU's summary that says which commit ran there, and what of the kernels has changed since."""

from pathlib import PurePosixPath

import commits
import run
from report import Row


def commits_section(
    suites: dict[str, list[Row]], tested: list[dict[str, str]], passed: dict[str, dict]
) -> list[str]:
    lines = ["## Commits", ""]
    ran = by_commit(suites, tested, passed)
    lines += [f"- {commit} ran {'; '.join(what)}." for commit, what in ran.items()]
    missing = [f"`{suite}`" for suite in run.SUITES if suite not in suites]
    lines += [f"- No table here has {', '.join(missing)}."] * bool(missing)
    if "memory check" not in passed:
        lines.append("- No passed memory check of all CUDA kernels is recorded here.")
    return [*lines, *(line for commit in ran for line in changes(commit))]


def by_commit(
    suites: dict[str, list[Row]], tested: list[dict[str, str]], passed: dict[str, dict]
) -> dict[str, list[str]]:
    """What was tested, checked and measured at each commit, in words."""
    ops: dict[str, list[str]] = {}
    tables: dict[str, list[str]] = {}
    for row in tested:
        ops.setdefault(row["commit"], []).append(row["op"])
    for suite, rows in suites.items():
        for commit in dict.fromkeys(row["commit"] for row in rows):
            tables.setdefault(commit, []).append(suite)
    found: dict[str, list[str]] = {}
    for commit, names in ops.items():
        which = "of all ops under Tests" if len(ops) == 1 else f"of {_list(names)}"
        found.setdefault(commit, []).append(f"the tests {which}")
    for step, entry in passed.items():
        found.setdefault(entry["commit"], []).append(
            f"the whole step `{step}`, {entry['tests']} tests passed"
        )
    for commit, names in tables.items():
        found.setdefault(commit, []).append(f"the benchmarks {_list(names)}")
    return found


def changes(commit: str) -> list[str]:
    """What has changed since, by folder."""
    changed = commits.kernels_changed_since(commit)
    if changed is None:
        return [f"- {commit} is not in the history here: what of the kernels has changed since is not known."]
    if commit.endswith("+"):
        then = f"{commit} (files of which differed from it in ways that are not known)"
    else:
        then = commit
    if not changed:
        return [f"- Since {then} no source of the GPU kernels has changed."]
    folders: dict[str, list[str]] = {}
    for path in map(PurePosixPath, changed):
        folders.setdefault(str(path.parent), []).append(path.name)
    return [
        f"- Since {then} these sources of the GPU kernels have changed; what {commit} ran does not speak for "
        "them as they are now:",
        *(f"  - {folder}: {_list(names)}" for folder, names in folders.items()),
    ]


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))
