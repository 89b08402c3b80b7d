"""Heat maps of what quantization costs: groups against choices."""

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..files import replacing

TITLES = ("only this group quantized", "all but this group quantized")
DECADES = 4  # of losses that colours tell apart, below the largest
SMALLEST = 1e-12  # a loss, where all are 0
NOT_FINITE = "#999999"

Matrix = list[list[float]]  # a line for each group, a number for each choice


def draw(
    path: Path, title: str, groups: list[str], choices: list[str], losses: list[Matrix], texts: list
) -> None:
    """Two panels, coloured by loss (logarithmic; grey where it is not finite), each cell with its text."""
    values = np.array(losses, float)
    largest = max(np.max(values, initial=0.0, where=np.isfinite(values)), SMALLEST)
    norm = LogNorm(largest * 10.0**-DECADES, largest)
    colors = colormaps["viridis_r"].with_extremes(bad=NOT_FINITE)
    label_width = 0.085 * max(map(len, groups))
    width = 1.6 + label_width + 2 * max(2.6, 0.78 * len(choices))
    figure = Figure(figsize=(width, 1.5 + 0.3 * max(4, len(groups))), dpi=150, layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, name, panel, cells in zip(both, TITLES, values, texts, strict=True):
        image = axes.imshow(np.maximum(panel, norm.vmin), colors, norm, aspect="auto")
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xticks(range(len(choices)), choices, fontsize=8)
        axes.set_yticks(range(len(groups)), groups, fontsize=8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("stored as", fontsize=8)
        for i, line in enumerate(cells):
            for j, text in enumerate(line):
                loss = panel[i, j]
                dark = math.isfinite(loss) and norm(max(loss, norm.vmin)) > 0.5
                color = "white" if dark else "black"
                axes.text(j, i, text.replace(" ", "\n"), color=color, fontsize=7, ha="center", va="center")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    bar = figure.colorbar(image, ax=both, pad=0.01)
    bar.set_label("worse than full precision by", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary)
