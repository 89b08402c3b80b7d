"""qnkernels compress."""

import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import safetensors
import typer
from safetensors.torch import load_model
from torch import nn

from ..allocation import BitAllocation, allocate_bits
from ..checkpoint import load_compressed, save_compressed
from ..container import FORMAT
from ..ptq import Int8DynamicConfig, IntWeightOnlyConfig
from ..sensitivity import Sensitivity
from .compressed import compress_model, table
from .console import clear_errors, out, print_json

# options of one quantizer for all layers, which a budget chooses for each
UNIFORM = ("bits", "activations", "per", "group_size", "observer", "symmetric", "skip")


def compress(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="Weights, .safetensors.")],
    model: Annotated[str, typer.Option(help="module:function that builds the model, unquantized.")],
    bits: Annotated[int, typer.Option(help="Of a code, 2 to 8.")] = 8,
    activations: Annotated[
        str, typer.Option(help="float, or with 8 bits dynamic: 8 bits, too, over the range of each token.")
    ] = "float",
    per: Annotated[str, typer.Option(help="One scale per channel or tensor.")] = "channel",
    group_size: Annotated[int | None, typer.Option(help="One scale per so many weights of a row.")] = None,
    observer: Annotated[
        str, typer.Option(help="Range: minmax, or histogram (least squared error).")
    ] = "minmax",
    symmetric: Annotated[bool, typer.Option(help="No zero points.")] = False,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave layers whose name matches; regular expression.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Bytes, or 1.5MB, less the header: layers get choices of --sensitivity."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--sensitivity", help="What qnkernels sensitivity --json printed for this model."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--out", help="Default: CHECKPOINT with -int8, -int8-dynamic, -mixed or the like."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize the Linear, Embedding and Conv2d layers of a saved model after training: all to so many bits,
    or with --budget each to what costs the least quality within the size.

    Writes one file for qnkernels.load_compressed and prints what became of each layer. Nothing is
    unpickled.
    """
    with clear_errors(ValueError, TypeError, OSError):
        if budget is None and measured is None:
            config, kind = uniform(bits, activations, group_size, symmetric, observer, per)
        else:
            config, kind = allocation(context, budget, measured), "mixed"
        plain = load_weights(build(model), checkpoint)
        target = target or checkpoint.with_name(f"{checkpoint.stem}-{kind}.safetensors")
        if target.resolve() == checkpoint.resolve():
            raise ValueError(f"out: expected another file than the checkpoint, got {target}")
        report = compress_model(plain, config, patterns(skip or []))
        save_compressed(plain, target)
    summary = {
        "file": str(target),
        "bytes_before": checkpoint.stat().st_size,
        "bytes": target.stat().st_size,
        "layers": [asdict(layer) for layer in report],
    }
    if as_json:
        print_json(summary)
    else:
        out.print(table(report, summary))


def uniform(
    bits: int, activations: str, group_size: int | None, symmetric: bool, observer: str, per: str
) -> tuple[IntWeightOnlyConfig, str]:
    """The config of all layers, and its name."""
    known = ["float", "dynamic"] if bits == 8 else ["float"]
    if activations not in known:
        raise ValueError(f"activations: expected one of {known} with {bits} bits, got {activations!r}")
    options = dict(group_size=group_size, symmetric=symmetric, observer=observer, per=per)
    if activations == "dynamic":
        return Int8DynamicConfig(**options), "int8-dynamic"
    return IntWeightOnlyConfig(bits, **options), f"int{bits}"


def allocation(context: typer.Context, budget: str | None, measured: Path | None) -> BitAllocation:
    """What each layer becomes, of the choices that were measured."""
    for name, value in (("budget", budget), ("sensitivity", measured)):
        if value is None:
            raise ValueError(f"{name}: expected one, since budget and sensitivity go together")
    for name in UNIFORM:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise ValueError(f"{name}: expected none with a budget, which chooses among what was measured")
    return allocate_bits(Sensitivity.load(measured), number_of_bytes(budget))


def number_of_bytes(text: str) -> int:
    """1500000, 1.5MB or 1.5 MB."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?) ?MB", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"budget: expected bytes, 1500000, or megabytes, 1.5MB, got {text!r}")
    size, megabytes = match.groups()
    return int(size) if size else round(1e6 * float(megabytes))


def build(factory: str) -> nn.Module:
    """The model that module:function returns; modules of the current folder are found, too."""
    module_name, _, function_name = factory.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"model: expected module:function, got {factory!r}")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model: {factory}: {error}") from error
    finally:
        sys.path.remove("")
    model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {factory} to return a torch.nn.Module, got {type(model).__name__}")
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill `model` from a .safetensors file, either plain or of `save_compressed`; returns it."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no such file, {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"checkpoint: {path} is not a whole .safetensors file ({error}); nothing else is read"
        ) from error
    if metadata.get("format") == FORMAT:
        if json.loads(metadata["specification"])["layers"]:
            raise ValueError(f"checkpoint: expected full-precision weights, {path} is compressed already")
        return load_compressed(model, path)
    try:
        load_model(model, path)
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not fit the model: {error}") from error
    return model


def patterns(skip: list[str]) -> list[re.Pattern]:
    try:
        return [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise ValueError(f"skip: expected a regular expression, got {error.pattern!r} ({error})") from error
