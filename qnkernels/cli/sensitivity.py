"""qnkernels sensitivity."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..allocation import BitAllocation, allocate_bits
from ..pq import PQConfig
from ..recipes.demo import Settings
from ..recipes.saved import Run
from ..recipes.text import Text, load, standard_library
from ..recipes.training import perplexity
from ..recipes.transformer import GROUPS, LanguageModel
from ..sensitivity import Sensitivity
from ..sensitivity import sensitivity as measure
from .compress import load_weights
from .console import clear_errors, err, out, print_json


def sensitivity(
    checkpoint: Annotated[
        Path, typer.Argument(help="checkpoints/full-precision.safetensors in the folder of qnkernels demo.")
    ],
    bits: Annotated[str, typer.Option(help="Widths of codes, 2 to 8, separated by commas.")] = "2,3,4,8",
    pq: Annotated[
        str, typer.Option(help="Product quantization, block size x codewords, 8x256,4x64 for two of them.")
    ] = "",
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Each layer, instead of attention, ffn and embedding.")
    ] = False,
    per: Annotated[str, typer.Option(help="One scale per channel or tensor.")] = "channel",
    group_size: Annotated[int | None, typer.Option(help="One scale per so many weights of a row.")] = None,
    observer: Annotated[
        str, typer.Option(help="Range: minmax, or histogram (least squared error).")
    ] = "minmax",
    symmetric: Annotated[bool, typer.Option(help="No zero points.")] = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text, as for demo; may be repeated. Default: the standard library."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Of validation text in each evaluation; default: the demo's number.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    budget: Annotated[
        int | None, typer.Option(help="Bytes of a compressed file, to print what each group should be.")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--out", help="Draw heat maps, groups by choices.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="JSON file that keeps finished evaluations; goes on from it.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of tables.")
    ] = False,
) -> None:
    """Which layers of the demo's model suffer from quantization: perplexity with one group of them quantized,
    and with all but one.

    Weights are quantized after training. With --budget, prints the choice for each group that loses least in
    all within that size, found exactly; the losses of the groups are taken to add up. Ctrl-C with --resume
    keeps what is finished.
    """
    with clear_errors(ValueError, TypeError, OSError):
        folder = checkpoint.parent.parent
        Settings(folder, device=device)  # whether the device is there
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens: expected at least 1, got {tokens}")
        if not checkpoint.is_file():
            raise FileNotFoundError(f"checkpoint: no such file, {checkpoint}")
        widths, products = _numbers("bits", bits), _products(pq)
        run = Run.read(folder)
        model = load_weights(LanguageModel(run.shape), checkpoint).to(device).eval()
        text = _text(data, run)
        encoded = run.tokenizer.encode(text.validation).to(device)
        least = run.shape.context + 2
        if len(encoded) < least:
            received = f"{len(encoded)} in {text.validation_files[0]}"
            raise ValueError(f"data: expected at least {least} tokens of validation text, got {received}")
        limit = min(tokens or run.validation, len(encoded) - 1)
        try:
            result = measure(
                model,
                lambda model: perplexity(model, encoded, limit, run.batch),
                widths,
                None if per_layer else GROUPS,
                pq=products,
                per=per,
                group_size=group_size,
                observer=observer,
                symmetric=symmetric,
                metric=f"perplexity on {limit} tokens of text {text.digest}",
                resume=resume,
            )
        except KeyboardInterrupt:
            kept = "nothing, without --resume" if resume is None else f"what is finished, in {resume}"
            err.print(f"[bold yellow]note:[/] stopped; kept is {kept}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
        if csv is not None:
            result.to_csv(csv)
        if picture is not None:
            result.plot(picture)
        _print(result, budget, as_json)


def _print(result: Sensitivity, budget: int | None, as_json: bool) -> None:
    """The tables, that of the measurement even where the budget is too small."""
    if not as_json:
        out.print(result.table())
    allocation: BitAllocation | None = None if budget is None else allocate_bits(result, budget)
    if as_json:
        print_json(result.to_json() | ({} if allocation is None else {"allocation": allocation.to_json()}))
    elif allocation is not None:
        out.print(allocation.table())


def _text(data: list[Path] | None, run: Run) -> Text:
    text = load(data or standard_library())
    if text.digest != run.digest:
        err.print(
            f"[bold yellow]note:[/] the text is not the one that the model was trained on "
            f"({text.digest} instead of {run.digest})",
            highlight=False,
        )
    return text


def _numbers(argument: str, text: str, separator: str = ",") -> list[int]:
    try:
        return [int(number) for number in text.split(separator)] if text else []
    except ValueError:
        raise ValueError(f"{argument}: expected integers with {separator!r} between, got {text!r}") from None


def _products(text: str) -> list[PQConfig]:
    pairs = [_numbers("pq", pair, "x") for pair in text.split(",")] if text else []
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"pq: expected block size x codewords, 8x256 say, got {text!r}")
    return [PQConfig(*pair, codebook_dtype=torch.float16) for pair in pairs]
