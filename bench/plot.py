"""Draw bench/results/<device>/<op>.png from the CSV beside it: `python bench/plot.py [CSV ...]`.

One row of marks per case, one colour per contender, at the ratio of its median time to the ceiling's; a line
spans the quartiles. Left is fast. A red bar stands at the target of a case that has one.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from report import Row, by_case, read_csv

RESULTS = Path(__file__).resolve().parent / "results"
COLOURS = {
    "ours": ("#D62728", "#7B1FA2"),
    "reference": ("#9E9E9E",),
    "ceiling": ("#000000", "#000000"),
    "peer": ("#E69F00", "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#8C6D31", "#B3B300", "#5D4037"),
}
MARKERS = {"ours": "D", "reference": "s", "peer": "o", "ceiling": "|"}


def plot_csv(path: Path) -> Path:
    """Draw one CSV; returns the path of the picture."""
    rows = [row for row in read_csv(path) if row["ratio_to_ceiling"]]
    cases, styles = by_case(rows), _styles(rows)
    figure = Figure(figsize=(9, 1.7 + 0.32 * len(cases)), dpi=100, layout="constrained")
    axes = figure.subplots()
    for height, contenders in enumerate(cases.values()):
        for row in contenders:
            _mark(axes, height, row, *styles[row["contender"], row["role"]])
    axes.set_yticks(range(len(cases)), list(cases), fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    _ratio_axis(axes)
    axes.set_title(_title(path, rows), fontsize=9, loc="left")
    figure.legend(
        handles=[_handle(name, *style) for (name, _), style in styles.items()],
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    picture = path.with_suffix(".png")
    figure.savefig(picture)
    return picture


def _styles(rows: list[Row]) -> dict[tuple[str, str], tuple[str, str]]:
    """Colour and marker of each (contender, role), by order of appearance within the role."""
    styles: dict[tuple[str, str], tuple[str, str]] = {}
    for row in rows:
        key = row["contender"], row["role"]
        if key not in styles:
            used = sum(role == row["role"] for _, role in styles)
            palette = COLOURS[row["role"]]
            styles[key] = palette[used % len(palette)], MARKERS[row["role"]]
    return styles


def _mark(axes: Axes, height: int, row: Row, colour: str, marker: str) -> None:
    ratio, median = float(row["ratio_to_ceiling"]), float(row["median_s"])
    quartiles = [float(row[name]) / median * ratio for name in ("q1_s", "q3_s")]
    above = 3 if row["role"] == "ours" else 2  # ours on top where marks overlap
    axes.plot(quartiles, [height, height], color=colour, linewidth=1.2, alpha=0.6, zorder=above)
    size = 11 if marker == "|" else 6
    axes.plot(ratio, height, color=colour, marker=marker, markersize=size, linestyle="none", zorder=above)
    if row["target"]:
        axes.plot(
            [float(row["target"])] * 2,
            [height - 0.32, height + 0.32],
            color="#D62728",
            linewidth=2,
            alpha=0.5,
        )


def _ratio_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.axvline(1.0, color="#000000", linewidth=0.6, alpha=0.6)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(
        "time over the ceiling's, medians of interleaved runs (left is fast; bar: target)", fontsize=8
    )


def _title(path: Path, rows: list[Row]) -> str:
    if not rows:
        return path.stem
    one = rows[0]
    threads = f", {one['threads']} threads" if not one["cuda"] else ""
    return f"{path.stem} on {one['device']}{threads}, torch {one['torch']}, commit {one['commit']}"


def _handle(name: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="none", label=name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="*", type=Path, help="files to draw (default: all under bench/results)")
    for path in parser.parse_args().csv or sorted(RESULTS.glob("*/*.csv")):
        print(plot_csv(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
