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
    TimeRemainingColumn,
)
from rich.table import Table

from ..recipes import demo as recipe
from ..recipes.experiments import EXPERIMENTS, Settings, run
from ..recipes.laboratory import PRESETS
from ..recipes.methods import FP32, NAMES
from ..recipes.results import Results, Row
from .console import clear_errors, err, out, print_json


def demo(
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Size of the model: {', '.join(PRESETS)}. Default: small, or that of the experiment."
        ),
    ] = None,
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
        Path | None,
        typer.Option("--out", help="Folder for results, picture and checkpoints. Default: runs/demo."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help=f"Which rows, separated by commas, of {', '.join(NAMES)}. fp32 always comes along: "
            "the others are compared to it."
        ),
    ] = ",".join(NAMES),
    experiment: Annotated[
        str | None,
        typer.Option(
            help=f"Run an experiment over several seeds instead: {', '.join(EXPERIMENTS)}. "
            "It goes on from what its folder (default: runs/EXPERIMENT) already holds."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of an experiment, separated by commas.")] = "0,1,2",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of a table.")
    ] = False,
) -> None:
    """Train a small language model with and without quantization noise, compress it, and compare.

    Seven trainings: full precision, then for int4, int8 and product quantization (iPQ) with all weights
    quantized (QAT) and with some of them (Quant-Noise). The iPQ models are quantized in stages and finetuned
    after each. int8-dynamic and int8-static also quantize the activations of the model trained in full
    precision. Prints one table; writes results.json, perplexity.png and the compressed checkpoints. Ctrl-C
    keeps what is finished.
    """
    if experiment is not None:
        folder = folder or Path("runs") / experiment
        return run_experiment(experiment, folder, seeds, preset, steps, device, tuple(data or ()), as_json)
    folder = folder or Path("runs/demo")
    with clear_errors(ValueError, OSError, FloatingPointError):
        names = tuple(name.strip().lower() for name in methods.split(","))
        settings = recipe.Settings(folder, preset or "small", steps, seed, device, tuple(data or ()), names)
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


def run_experiment(
    name: str,
    folder: Path,
    seeds: str,
    preset: str | None,
    steps: int | None,
    device: str,
    data: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Run an experiment by name and print its table."""
    with clear_errors(ValueError, OSError, FloatingPointError):
        if name not in EXPERIMENTS:
            raise ValueError(f"experiment: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
        try:
            numbers = tuple(int(seed) for seed in seeds.split(","))
        except ValueError:
            raise ValueError(f"seeds: expected integers separated by commas, got {seeds!r}") from None
        settings = Settings(folder, numbers, preset, steps, device, data)
        with Watch() as watch:
            study = run(EXPERIMENTS[name], settings, watch)
    if as_json:
        print_json(study.to_json())
    elif study.done:
        out.print(study.summary.table())
        out.print(f"{name}.json, .csv, .md and .png are in {folder}", highlight=False, soft_wrap=True)
    if study.note:
        err.print(f"[bold yellow]note:[/] {study.note}", highlight=False)
        raise typer.Exit(130)


class Watch:
    """A live bar per training on stderr, and one line per finished model."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
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
        description = f"{number:2}/{trainings} {label:27}"
        self.task = self.progress.add_task(description, total=steps, loss="  -  ")

    def stepped(self, step: int, loss: float) -> None:
        self.progress.update(self.task, completed=step, loss=f"{loss:5.3f}")

    def found(self, row: Row) -> None:
        name = row.method
        if row.precision != FP32:
            name = f"{row.precision} {row.method}"
        untuned = f" (untuned {row.finetuning.perplexity_without:.3f})" if row.finetuning else ""
        self.said(f"    {name}: perplexity {row.perplexity:.3f}{untuned}, {_megabytes(row.bytes)} MB")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f}"


def table(results: Results) -> Table:
    """One row per model, in 80 columns; the best of each precision in bold."""
    tuned = {row.precision: row.finetuning for row in results.rows if row.finetuning}
    narrow = dict(pad_edge=False, collapse_padding=True)
    text = Table(title=results.title, box=box.SIMPLE_HEAD, title_justify="left", **narrow)
    text.add_column("", no_wrap=True)
    text.add_column("method", no_wrap=True)
    untuned = ["untuned"] if tuned else []
    for name in ("perp-\nlexity", *untuned, "MB", "train\nstep", "tokens\nper s", "to\nfp32"):
        text.add_column(name, justify="right", no_wrap=True)
    best = {
        precision: min(r.perplexity for r in results.rows if r.precision == precision)
        for precision in {r.precision for r in results.rows}
    }
    previous = None
    for row in results.rows:
        # int8, int8-dynamic and int8-static stay together
        if previous and previous.split("-")[0] != row.precision.split("-")[0]:
            text.add_section()
        style = "bold" if row.perplexity == best[row.precision] and row.precision != FP32 else ""
        untuned = f"{row.finetuning.perplexity_without:.3f}" if row.finetuning else ""
        text.add_row(
            row.precision if row.precision != previous else "",
            row.method,
            f"{row.perplexity:.3f}",
            *([untuned] if tuned else []),
            _megabytes(row.bytes),
            f"{row.training_ratio:.2f}x",
            f"{row.tokens_per_second:.0f}",
            f"{row.generation_ratio:.2f}x",
            style=style,
        )
        previous = row.precision
    if tuned:
        steps = " and ".join(f"{each.ratio:.2f} ({name})" for name, each in tuned.items())
        (count,) = {each.steps for each in tuned.values()}
        text.caption = (
            f"untuned: without finetuning, {count} steps after each stage. "
            f"A step takes {steps} training steps of fp32."
        )
        text.caption_justify = "left"
    return text
