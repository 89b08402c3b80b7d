"""The demo's picture: perplexity against size on disk."""

from pathlib import Path

from matplotlib.figure import Figure

from .files import replacing
from .methods import (
    AFTER_TRAINING,
    FP32,
    INT8,
    INT8_DYNAMIC,
    INT8_STATIC,
    PRODUCT,
    PRODUCT_INT8,
    QAT,
    QUANT_NOISE,
)
from .results import Row

# Okabe and Ito's colours, told apart by all kinds of colour vision, and markers for print.
STYLES = {
    AFTER_TRAINING: ("#d55e00", "s"),
    QAT: ("#0072b2", "^"),
    QUANT_NOISE: ("#009e73", "o"),
}
FULL = ("#333333", "D")
# Precisions that quantize activations, too: what they are hardly larger or smaller than, and a hollow marker.
APART = {INT8_DYNAMIC: (INT8, "v"), INT8_STATIC: (INT8, "p"), PRODUCT_INT8: (PRODUCT, "o")}


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Write a PNG: one point per row, one line per method, and off the lines those in APART."""
    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    full = [row for row in rows if row.precision == FP32]
    for row in full:
        axes.axhline(row.perplexity, color=FULL[0], linewidth=0.8, linestyle=":", zorder=1)
    for method, (color, marker) in STYLES.items():
        points = {row.precision: (row.bytes / 1e6, row.perplexity) for row in rows if row.method == method}
        apart = {precision: points.pop(precision) for precision in APART if precision in points}
        style = dict(color=color, markersize=7)
        if points:
            axes.plot(*zip(*sorted(points.values()), strict=True), label=method, marker=marker, **style)
        for precision, point in apart.items():
            # larger and on top: the point of the solid marker is often the same
            style |= dict(linestyle="", fillstyle="none", marker=APART[precision][1], markersize=11, zorder=3)
            axes.plot(*point, label=f"{method}, {precision}", **style)
    for row in full:
        axes.plot(row.bytes / 1e6, row.perplexity, FULL[1], color=FULL[0], markersize=7, label=row.method)
    axes.set_xscale("log")
    ticks: dict[str, tuple[float, str]] = {}  # one for those of hardly different sizes
    for row in rows:
        size = row.bytes / 1e6
        like, _ = APART.get(row.precision, (row.precision, ""))
        ticks.setdefault(like, (size, f"{row.precision}\n{size:.3f} MB"))
    axes.set_xticks(*zip(*ticks.values(), strict=True))
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("size on disk (logarithmic)")
    axes.set_ylabel("validation perplexity per token (lower is better)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary)
