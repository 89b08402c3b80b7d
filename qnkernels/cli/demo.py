"""qnkernels demo."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..recipes import demo as recipe
from ..recipes.methods import FULL_PRECISION
from ..recipes.results import Results, Row
from .console import clear_errors, err, megabytes, out, print_json


def demo(
    preset: Annotated[str, typer.Option(help=f"Size of the model: {', '.join(recipe.PRESETS)}.")] = "small",
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each run; default: the preset's.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text to train on; may be repeated. Default: the standard library's source."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of initial weights, data order and noise.")] = 0,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for results, picture and checkpoints.")
    ] = Path("runs/demo"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of a table.")
    ] = False,
) -> None:
    """Train a small language model with and without quantization noise, compress it, and compare.

    Five trainings: full precision, then int4 and int8 with all weights quantized (QAT) and with half of
    them (Quant-Noise). Prints one table; writes results.json, perplexity.png and the compressed
    checkpoints. Ctrl-C keeps what is finished.
    """
    with clear_errors(ValueError, OSError, FloatingPointError):
        settings = recipe.Settings(folder, preset, steps, seed, device, tuple(data or ()))
        with Watch() as watch:
            results = recipe.run(settings, watch)
    if as_json:
        print_json(results.to_json())
    elif results.rows:
        out.print(table(results))
        out.print(
            f"results.json, perplexity.png and checkpoints/ are in {folder}", highlight=False, soft_wrap=True
        )
    if results.note:
        err.print(f"[bold yellow]note:[/] {results.note}", highlight=False)
        raise typer.Exit(130)


class Watch:
    """A live bar per training on stderr, and one line per finished model."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
        )

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(self, *_exception) -> None:
        self.progress.stop()

    def said(self, message: str) -> None:
        self.progress.console.print(message, style="dim", highlight=False)

    def started(self, label: str, number: int, trainings: int, steps: int) -> None:
        description = f"{number}/{trainings} {label:16}"
        self.task = self.progress.add_task(description, total=steps, loss="  -  ")

    def stepped(self, step: int, loss: float) -> None:
        self.progress.update(self.task, completed=step, loss=f"{loss:5.3f}")

    def found(self, row: Row) -> None:
        if row.method == "after training":
            name = f"{row.precision} {row.method}"
        else:
            name = row.method if row.bits == 32 else f"{row.precision} {row.method}"
        self.said(f"    {name}: perplexity {row.perplexity:.3f}, {megabytes(row.bytes)} MB")


def table(results: Results) -> Table:
    """One row per model; the best of each precision in bold."""
    text = Table(title=results.title, box=box.SIMPLE_HEAD, title_justify="left")
    text.add_column("", no_wrap=True)
    text.add_column("method", no_wrap=True)
    for name in ("perplexity", "MB", "train step", "tokens/s", "to fp32"):
        text.add_column(name, justify="right", no_wrap=True)
    best = {
        bits: min(r.perplexity for r in results.rows if r.bits == bits)
        for bits in {r.bits for r in results.rows}
    }
    previous = None
    for row in results.rows:
        if previous not in (None, row.bits):
            text.add_section()
        style = "bold" if row.perplexity == best[row.bits] and row.method != FULL_PRECISION else ""
        text.add_row(
            row.precision if row.bits != previous else "",
            row.method,
            f"{row.perplexity:.3f}",
            megabytes(row.bytes),
            f"{row.training_ratio:.2f}x",
            f"{row.tokens_per_second:.0f}",
            f"{row.generation_ratio:.2f}x",
            style=style,
        )
        previous = row.bits
    return text
