"""From what this machine's GPU measured to who serves which op there: `python bench/dispatch.py [FOLDER]`.

FOLDER is bench/results/<gpu>, by default that of the GPU here. For each op that Triton and CUDA C++ both
have, and at each size timed, the geometric mean over all cases of the ratio of their times decides; Triton,
which needs no compiler, keeps a draw. Neighbouring sizes with the same winner make one step. A backend of
which a test of the op failed on this GPU is not chosen. The rules go where qnkernels reads them: see
qnkernels/backends/dispatch.py, which explains the choice and the file. bench/gpu_suite.py ends with this.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import environment
import run
import summary
from qnkernels.backends import dispatch
from report import Row

DRAW = 1.03  # times that are closer than this are the same

Steps = dispatch.Steps


def ratios(rows: Iterable[Row]) -> dict[str, dict[int, list[float]]]:
    """By op and size, Triton's time over that of CUDA C++ in each case that has both."""
    cases: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in rows:
        if row["op"] in dispatch.SIZES and row["role"] == "ours" and row.get("size") and row["cuda"]:
            case = row["op"], int(row["size"]), row["case"]
            cases.setdefault(case, {})[row["contender"]] = float(row["median_s"])
    found: dict[str, dict[int, list[float]]] = {}
    for (op, size, _), seconds in cases.items():
        if set(dispatch.CHOICES) <= set(seconds):
            found.setdefault(op, {}).setdefault(size, []).append(seconds["triton"] / seconds["cuda"])
    return found


def steps(by_size: dict[int, list[float]], barred: set[str] = frozenset()) -> Steps:
    """(backend, largest size) from the ratios at each size."""
    found: list[tuple[str, int | None]] = []
    for size in sorted(by_size):
        name = faster(by_size[size])
        name = next(other for other in dispatch.CHOICES if other != name) if name in barred else name
        found[-1 if found and found[-1][0] == name else len(found) :] = [(name, size)]
    return (*found[:-1], (found[-1][0], None))


def faster(several: list[float]) -> str:
    mean = math.exp(sum(map(math.log, several)) / len(several))
    return "cuda" if mean > DRAW else "triton"


def derive(folder: Path) -> dict[str, Steps]:
    """The rules that the tables of a device give, by op."""
    rows = [row for suite in summary.benchmarks(folder).values() for row in suite]
    failed = {(row["op"], row["backend"]) for row in summary.tested(folder) if int(row["failed"])}
    found = {}
    for op, by_size in ratios(rows).items():
        barred = {name for name in dispatch.CHOICES if (op, name) in failed}
        if barred != set(dispatch.CHOICES):
            found[op] = steps(by_size, barred)
    return found


def install(folder: Path) -> list[str]:
    """Write the rules of a device to the file that this process would read; says in lines what holds."""
    found, file = derive(folder), dispatch.path()
    if not found:
        return ["no rules: no op was timed with both triton and cuda"]
    if file is None:
        return ["no rules written: QNKERNELS_DISPATCH is empty"]
    facts = next(row for rows in summary.benchmarks(folder).values() for row in rows)
    dispatch.write(file, facts["device"], f"{facts['date']}, commit {facts['commit']}", found)
    return [
        f"wrote {file}",
        *(f"  {op}: {dispatch.in_words(op, rule)}" for op, rule in sorted(found.items())),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="default: bench/results/<gpu>")
    folder = parser.parse_args(arguments).folder
    if folder is None:
        if not torch.cuda.is_available():
            print("dispatch needs a folder of results where torch finds no GPU.", file=sys.stderr)
            return 2
        folder = run.RESULTS / environment.folder_name(environment.device_name(torch.device("cuda")))
    print(*install(folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
