"""qnkernels compress."""

import importlib
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import safetensors
import torch
import typer
from rich import box
from rich.table import Table
from safetensors.torch import load_model
from torch import nn

from ..checkpoint import load_compressed, save_compressed
from ..container import FORMAT
from ..nn.packed import PackedLayer
from ..ptq import Int4WeightOnlyConfig, Int8DynamicConfig, Int8WeightOnlyConfig, IntWeightOnlyConfig
from ..quantize import quantize_
from .console import clear_errors, megabytes, out, print_json

CONFIGS = {
    (8, "float"): Int8WeightOnlyConfig,
    (4, "float"): Int4WeightOnlyConfig,
    (8, "dynamic"): Int8DynamicConfig,
}


@dataclass(frozen=True)
class LayerReport:
    """A compressed layer. before, after: bytes; error: |decoded - weight| / |weight| (Frobenius)."""

    name: str
    shape: list[int]
    bits: int
    before: int
    after: int
    error: float


def compress(
    checkpoint: Annotated[Path, typer.Argument(help="Weights, .safetensors.")],
    model: Annotated[str, typer.Option(help="module:function that builds the model, unquantized.")],
    bits: Annotated[int, typer.Option(help="8 or 4.")] = 8,
    activations: Annotated[
        str, typer.Option(help="float, or dynamic: 8 bits, too, over the range of each token.")
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
    target: Annotated[
        Path | None, typer.Option("--out", help="Default: CHECKPOINT with -int8, -int4 or -int8-dynamic.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize the Linear, Embedding and Conv2d layers of a saved model to int8 or int4, after training.

    Writes one file for qnkernels.load_compressed and prints what became of each layer. Nothing is
    unpickled.
    """
    with clear_errors(ValueError, TypeError, OSError):
        choose = config_class(bits, activations)
        config = choose(group_size=group_size, symmetric=symmetric, observer=observer, per=per)
        plain = load_weights(build(model), checkpoint)
        kind = f"int{bits}" + ("" if activations == "float" else f"-{activations}")
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


def config_class(bits: int, activations: str) -> type[IntWeightOnlyConfig]:
    if bits not in (8, 4):
        raise ValueError(f"bits: expected one of [4, 8], got {bits}")
    known = [name for width, name in CONFIGS if width == bits]
    if activations not in known:
        raise ValueError(f"activations: expected one of {known} with {bits} bits, got {activations!r}")
    return CONFIGS[bits, activations]


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


@torch.no_grad()
def compress_model(
    model: nn.Module, config: IntWeightOnlyConfig, skip: list[re.Pattern]
) -> list[LayerReport]:
    """Quantize in place; the report has one entry per weight, under its first name if layers share it."""
    weights = {
        name: layer.weight.detach() for name, layer in model.named_modules() if type(layer) in config.CONVERTS
    }
    quantize_(model, config, lambda _, name: not any(pattern.search(name) for pattern in skip))
    report, seen = [], set()
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer) and id(layer.weight_packed) not in seen:
            seen.add(id(layer.weight_packed))
            report.append(_describe(name, layer, weights[name]))
    return report


def _describe(name: str, layer: PackedLayer, weight: torch.Tensor) -> LayerReport:
    error = (layer.weight.double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-300)
    stored = (layer.weight_packed, layer.scale, layer.zero_point)
    after = sum(tensor.nbytes for tensor in stored if tensor is not None)
    return LayerReport(name, list(weight.shape), layer.bits, weight.nbytes, after, error.item())


def table(report: list[LayerReport], summary: dict) -> Table:
    text = Table(title=summary["file"], box=box.SIMPLE_HEAD, show_footer=True, title_justify="left")
    text.add_column("layer", "whole file")
    text.add_column("shape")
    text.add_column("bits", justify="right")
    text.add_column("MB before", megabytes(summary["bytes_before"]), justify="right")
    text.add_column("MB after", megabytes(summary["bytes"]), justify="right")
    text.add_column("relative error", justify="right")
    for layer in report:
        shape = " x ".join(map(str, layer.shape))
        sizes = megabytes(layer.before), megabytes(layer.after)
        text.add_row(layer.name, shape, str(layer.bits), *sizes, f"{layer.error:.4f}")
    return text
