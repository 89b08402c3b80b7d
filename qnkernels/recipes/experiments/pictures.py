"""Pictures of experiments: points with bars of one standard deviation."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from ..files import replacing
from .summary import Summary, Value

# Okabe and Ito's colours, told apart by all kinds of colour vision, and markers for print.
STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"))
PLAIN = FormatStrFormatter("%g")
Curve = list[tuple[float, Value]]


def bars(summary: Summary, path: Path) -> None:
    """Rows against the first metric."""
    metric, label = next(iter(summary.metrics.items()))
    figure = Figure(figsize=(7.2, 1.2 + 0.32 * len(summary.rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for place, values in enumerate(summary.rows.values()):
        value, (color, marker) = values[metric], STYLES[0]
        axes.errorbar(value.mean, place, xerr=value.deviation, color=color, marker=marker, capsize=3)
    axes.set_yticks(range(len(summary.rows)), list(summary.rows))
    axes.invert_yaxis()
    _finish(axes, summary.title, "x")
    axes.set_xlabel(label)
    _save(figure, path)


def scatter(summary: Summary, path: Path, x: str, y: str) -> None:
    """Rows as points, one metric against another, each with its name."""
    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    points = {
        name: (values[x].mean, values[y]) for name, values in summary.rows.items() if {x, y} <= set(values)
    }
    color, marker = STYLES[0]
    for place, value in points.values():
        axes.errorbar(place, value.mean, yerr=value.deviation, color=color, marker=marker, capsize=3)
    _finish(axes, summary.title, "both")
    axes.set_xlabel(summary.metrics[x])
    axes.set_ylabel(summary.metrics[y])
    axes.margins(x=0.3)
    _name_points(axes, {name: (place, value.mean) for name, (place, value) in points.items()})
    _save(figure, path)


def _name_points(
    axes, points: dict[str, tuple[float, float]], room: float = 0.033, near: float = 0.3
) -> None:
    """Names beside points, `room` of the height apart where points are `near`, in parts of the axes."""
    axes.autoscale_view()  # else done later, and points would move
    into_axes = axes.transData + axes.transAxes.inverted()
    places = {name: into_axes.transform(point) for name, point in points.items()}
    taken: list[tuple[float, float]] = []
    for name, (across, up) in sorted(places.items(), key=lambda item: item[1][1]):
        height = max(
            [up, *(other + room for other_across, other in taken if abs(other_across - across) < near)]
        )
        taken.append((across, height))
        axes.annotate(
            name,
            (across, up),
            (across + 0.015, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=7,
            va="center",
        )


def curves(
    summary: Summary,
    path: Path,
    lines: dict[str, Curve],
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
) -> None:
    """One line for each of `lines`, with bars."""
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, points), (color, marker) in zip(lines.items(), STYLES, strict=False):
        xs = [x for x, _ in points]
        means, deviations = [v.mean for _, v in points], [v.deviation for _, v in points]
        axes.errorbar(xs, means, yerr=deviations, color=color, marker=marker, capsize=3, label=name)
    _finish(axes, summary.title, "y")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(PLAIN)
    if lines:
        axes.legend(frameon=False)
    _save(figure, path)


def _finish(axes, title: str, grid: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary)
