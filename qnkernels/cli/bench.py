"""qnkernels bench: a thin door to the suites of the source tree."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from .console import clear_errors, out

PREFIX = "bench_"


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Suites to run; default: all.")
    ] = None,
    stored: Annotated[bool, typer.Option(help="Run nothing: show the results kept in the tree.")] = False,
    quick: Annotated[bool, typer.Option(help="Main shapes, fewer rounds.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    source: Annotated[Path, typer.Option(help="Source tree of qnkernels, with its bench folder.")] = Path(),
) -> None:
    """Run the benchmark suites of the source tree, or show the results kept there."""
    with clear_errors(ValueError, OSError):
        suites = choose(source, ops or [])
        if stored:
            for path in results(source, suites):
                out.print(table(path))
            return
    options = [f"--device={device}", *["--quick"] * quick]
    finished = subprocess.run([sys.executable, source / "bench" / "run.py", *suites, *options])
    raise typer.Exit(finished.returncode)


def choose(source: Path, ops: list[str]) -> list[str]:
    """The suites named, or all; raises ValueError where there is no such suite, or no source tree."""
    available = sorted(path.stem.removeprefix(PREFIX) for path in (source / "bench").glob(f"{PREFIX}*.py"))
    if not available:
        raise ValueError(f"source: expected a source tree of qnkernels with bench/, got {source.resolve()}")
    for op in ops:
        if op not in available:
            raise ValueError(f"op: expected one of {', '.join(available)}, got {op!r}")
    return ops or available


def results(source: Path, suites: list[str]) -> list[Path]:
    """CSV files of the suites, by device."""
    folder = source / "bench" / "results"
    found = [path for path in sorted(folder.glob("*/*.csv")) if path.stem in suites]
    if not found:
        raise ValueError(f"source: no results of {', '.join(suites)} in {folder}; run them first")
    return found


def table(path: Path) -> Table:
    """Median time and ratio to the ceiling of each contender, by case."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    title = f"{path.stem} on {path.parent.name}"
    text = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name, justify in (
        ("case", "left"),
        ("contender", "left"),
        ("median, ms", "right"),
        ("x ceiling", "right"),
    ):
        text.add_column(name, justify=justify)
    case = None
    for row in rows:
        if case not in (None, row["case"]):
            text.add_section()
        ratio = f"{float(row['ratio_to_ceiling']):.2f}" if row["ratio_to_ceiling"] else ""
        name = "" if row["case"] == case else row["case"]
        style = "bold" if row["role"] == "ours" else ""
        text.add_row(name, row["contender"], f"{1e3 * float(row['median_s']):.4g}", ratio, style=style)
        case = row["case"]
    return text
