"""What has run where: bench/results/summary.md and, for each device, bench/results/<device>/summary.md.

Everything is read from the CSVs: <suite>.csv of the benchmarks and, for a GPU, ops.csv, which says which op
passed its tests through which backend. An op that neither holds has never run on a GPU. How far the kernels
have moved on since is told by the commits (bench/summary_commits.py).
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import targets
from qnkernels.backends.native import CUDA_ARGTYPES
from qnkernels.ops import OPS
from report import Row, by_case, duration, has_target, read_csv, verdict, write_csv
from summary_commits import commits_section

TESTED = "ops.csv"
PASSED = "passed.json"  # which steps of bench/gpu_suite.py passed at which commit
EXPERIMENTS = "experiments"  # what `qnkernels demo --experiment` found
TESTED_COLUMNS = ("op", "backend", "passed", "failed", "device", "commit", "date")
COUNTED = "A pass or a time on any GPU at any commit counts; what has changed since is said under each GPU."
# The ops that each GPU backend has. Triton has them all; a compiled kernel exists where it may win.
GPU_BACKENDS = {"triton": OPS, "cuda": tuple(CUDA_ARGTYPES)}


def benchmarks(folder: Path) -> dict[str, list[Row]]:
    """Rows of each suite of one device."""
    paths = (path for path in sorted(folder.glob("*.csv")) if path.name != TESTED)
    return {path.stem: targets.fill(path.stem, read_csv(path)) for path in paths}


def tested(folder: Path) -> list[dict[str, str]]:
    path = folder / TESTED
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def passed_steps(folder: Path) -> dict[str, dict]:
    """By step, the commit, the date and the number of tests that passed."""
    path = folder / PASSED
    return json.loads(path.read_text()) if path.exists() else {}


def update_tested(folder: Path, rows: Iterable[dict]) -> None:
    """Put these rows into the device's ops.csv, in place of older ones for the same op and backend."""
    merged = {(row["op"], row["backend"]): row for row in [*tested(folder), *rows]}
    write_csv(folder / TESTED, [merged[key] for key in sorted(merged)], TESTED_COLUMNS)


def ran_on_gpu(results: Path) -> set[tuple[str, str]]:
    """(op, backend) pairs that passed a test, or were timed, on some GPU."""
    found = set()
    for folder in device_folders(results):
        found |= {(row["op"], row["backend"]) for row in tested(folder) if int(row["passed"])}
        for rows in benchmarks(folder).values():
            found |= {(row["op"], row["contender"]) for row in rows if row["role"] == "ours" and row["cuda"]}
    return found


def never_run(results: Path) -> list[tuple[str, str]]:
    """(op, backend) pairs of the GPU backends that no GPU has run."""
    ran = ran_on_gpu(results)
    return [(op, name) for name, ops in GPU_BACKENDS.items() for op in ops if (op, name) not in ran]


def device_folders(results: Path) -> list[Path]:
    """Folders of benchmarks; the tables of experiments stand beside them."""
    folders = (path for path in results.glob("*") if path.is_dir() and path.name != EXPERIMENTS)
    return sorted(path for path in folders if any(path.glob("*.csv")))


def never_run_section(results: Path) -> list[str]:
    missing = never_run(results)
    lines = ["## Never run on a GPU", "", COUNTED, ""]
    if not missing:
        return [*lines, "Every op of every GPU backend has run."]
    for name in GPU_BACKENDS:
        ops = [f"`{op}`" for op, backend in missing if backend == name]
        if ops:
            lines.append(f"- {name}: {', '.join(ops)}")
    return lines


def ratio_table(rows: list[Row], fastest: bool = False) -> list[str]:
    """Markdown: ours, or the fastest of ours, and the best peer of each case, with ratios to the ceiling."""
    lines = [
        "| case | ours | time | to ceiling | ceiling | best peer | peer / ours | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, contenders in by_case(rows).items():
        ours, peers = ([row for row in contenders if row["role"] == role] for role in ("ours", "peer"))
        best = min(peers, key=_seconds, default=None)
        if fastest:
            backends = [row for row in ours if row["contender"] in ("cpu", *GPU_BACKENDS)]
            ours = sorted(backends or ours, key=_seconds)[:1]
        lines += [_ratio_line(case, row, best, verdict(row, contenders)) for row in ours]
    return lines if len(lines) > 2 else []


def _seconds(row: Row) -> float:
    return float(row["median_s"])


def _ratio_line(case: str, row: Row, best: Row | None, stands: str) -> str:
    seconds = float(row["median_s"])
    ratio = f"{float(row['ratio_to_ceiling']):.2f}x" if row["ratio_to_ceiling"] else ""
    peer = f"{best['contender']} {duration(float(best['median_s']))}" if best else ""
    gain = f"{float(best['median_s']) / seconds:.2f}x" if best else ""
    cells = (case, row["contender"], duration(seconds), ratio, row["ceiling"], peer, gain, stands)
    return "| " + " | ".join(cells) + " |"


def device_summary(folder: Path, results: Path, quick: bool = False) -> str:
    """Markdown for one device; `quick` says that the last run was a short one."""
    suites = benchmarks(folder)
    rows = [row for found in suites.values() for row in found]
    facts = rows[0] if rows else tested(folder)[0]
    lines = [f"# {facts['device']}", ""]
    if quick:
        lines += ["Short run: the main shapes only, few rounds.", ""]
    lines += [_stack(facts), ""]
    if facts.get("cuda"):
        lines += [*commits_section(suites, tested(folder), passed_steps(folder)), ""]
    lines += [*_ceilings(suites.get("ceilings", [])), *_tests(tested(folder))]
    for suite, found in suites.items():
        if section := ratio_table(found):
            lines += [f"## {suite}", "", *section, "", f"![{suite}]({suite}.png)", ""]
    if facts.get("cuda"):
        lines += [*never_run_section(results), ""]
    return "\n".join(lines)


def _stack(facts: dict[str, str]) -> str:
    names = ("driver", "cuda", "torch", "triton", "python", "qnkernels", "threads", "commit", "date")
    return ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name))


def _ceilings(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["## Ceilings", ""]
    for row in rows:
        rate = f"{float(row['gb_per_s']):.1f} GB/s read and written"
        if row["gflop_per_s"]:
            rate = f"{float(row['gflop_per_s']) / 1e3:.2f} TFLOP/s"
        lines.append(f"- {row['case']}: {rate}")
    return [*lines, ""]


def _tests(rows: list[dict[str, str]]) -> list[str]:
    if not rows:
        return []
    lines = ["## Tests", "", "| op | backend | passed | failed |", "|---|---|---|---|"]
    lines += [f"| {row['op']} | {row['backend']} | {row['passed']} | {row['failed']} |" for row in rows]
    return [*lines, ""]


def overall_summary(results: Path) -> str:
    """Markdown over all devices: where results are, how the targets stand, what has never run on a GPU."""
    lines = ["# Results", "", "Written by `python bench/gpu_suite.py --summary-only`.", ""]
    lines += [
        "Targets stand beside the fastest backend of each case: the largest accepted ratio of its time to"
    ]
    lines += ["the ceiling's, or how many times as fast as a peer it should be.", ""]
    for folder in device_folders(results):
        lines += [f"- [{folder.name}]({folder.name}/summary.md)"]
    for folder in device_folders(results):
        rows = [row for found in benchmarks(folder).values() for row in found]
        judged = {row["case"] for row in rows if has_target(row)}
        if section := ratio_table([row for row in rows if row["case"] in judged], fastest=True):
            lines += ["", f"## Targets on {rows[0]['device']}", "", *section]
    return "\n".join([*lines, "", *never_run_section(results), ""])


def write_summaries(results: Path, quick_folder: Path | None = None) -> list[Path]:
    """Write all summaries; `quick_folder` is the device whose last run was a short one."""
    results.mkdir(parents=True, exist_ok=True)
    written = [results / "summary.md"]
    written[0].write_text(overall_summary(results))
    for folder in device_folders(results):
        path = folder / "summary.md"
        path.write_text(device_summary(folder, results, quick=folder == quick_folder))
        written.append(path)
    return written
