"""What became of the layers that qnkernels compress quantized."""

import math
import re
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import nn

from ..allocation import BitAllocation
from ..pq import PQConfig
from ..ptq import IntWeightOnlyConfig
from ..quantize import quantize_
from ..sensitivity.choices import label, stored_bytes
from .console import megabytes

Config = IntWeightOnlyConfig | BitAllocation


@dataclass(frozen=True)
class LayerReport:
    """A compressed layer. bits: of a code, by weight; stored: "int4" or "pq8x256"; before, after: bytes, in a
    file; error: |decoded - weight| / |weight| (Frobenius).
    """

    name: str
    shape: list[int]
    bits: float
    stored: str
    before: int
    after: int
    error: float


@torch.no_grad()
def compress_model(model: nn.Module, config: Config, skip: list[re.Pattern]) -> list[LayerReport]:
    """Quantize in place; the report has one entry per weight, under its first name if layers share it."""
    weights = {
        name: layer.weight.detach() for name, layer in model.named_modules() if type(layer) in config.CONVERTS
    }
    quantize_(model, config, lambda _, name: not any(pattern.search(name) for pattern in skip))
    report, seen = [], set()
    for name, layer in model.named_modules():
        weight = weights.get(name)
        if weight is None or type(layer) in config.CONVERTS or weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        chosen = config.layers[name] if isinstance(config, BitAllocation) else config
        report.append(_describe(name, layer, chosen, weight))
    return report


def _describe(
    name: str, layer: nn.Module, config: IntWeightOnlyConfig | PQConfig, weight: torch.Tensor
) -> LayerReport:
    error = (layer.weight.double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-300)
    after = stored_bytes(layer, config)
    bits = math.log2(config.n_centroids) / config.block_size if isinstance(config, PQConfig) else config.bits
    return LayerReport(name, list(weight.shape), bits, label(config), weight.nbytes, after, error.item())


def table(report: list[LayerReport], summary: dict) -> Table:
    text = Table(title=summary["file"], box=box.SIMPLE_HEAD, show_footer=True, title_justify="left")
    text.add_column("layer", "whole file")
    text.add_column("shape")
    text.add_column("stored as")
    text.add_column("MB before", megabytes(summary["bytes_before"]), justify="right")
    text.add_column("MB after", megabytes(summary["bytes"]), justify="right")
    text.add_column("relative error", justify="right")
    for layer in report:
        shape = " x ".join(map(str, layer.shape))
        sizes = megabytes(layer.before), megabytes(layer.after)
        text.add_row(layer.name, shape, layer.stored, *sizes, f"{layer.error:.4f}")
    return text
