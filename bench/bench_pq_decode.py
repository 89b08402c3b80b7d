"""pq_decode and pq_embedding: the dense weight of codes, whole or the rows asked for.

Bytes (4096x4096, d = 8, K = 256, fp32): 2.1 MB of codes read, 67 MB written. An embedding of 512 tokens in
1024 features reads 128 bytes of codes a row and writes 4 KiB, 2.1 MB in all.
Operations: none; one copy of 32 bytes (fp32, d = 8) per code, from a codebook of 8 KiB in the nearest cache.
Floor: filling the output, ratio 1. Prediction, 2 cores: decode 1.0 to 1.3x the fill, bound by memory; the
embedding, whose output stays in cache, 1.5 to 2.5x and some microseconds of the call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from harness import Case, Contender, compiled, ours
from qnkernels import functional as F


@dataclass
class Inputs:
    codes: torch.Tensor  # uint8 [rows, n_blocks], those of a block adjacent in memory
    codebook: torch.Tensor  # [K, d]
    indices: torch.Tensor  # int64 [tokens]
    table: torch.Tensor  # [rows, n_blocks * d], what they stand for
    out: torch.Tensor  # as many values as the op writes


def make_inputs(shape, d, n_centroids, tokens, dtype, device, index) -> Inputs:
    generator = torch.Generator(device).manual_seed(index)
    rows, columns = shape
    codes = torch.randint(0, n_centroids, (columns // d, rows), device=device, generator=generator)
    codes = codes.to(torch.uint8).t()
    codebook = torch.randn(n_centroids, d, device=device, generator=generator).to(dtype)
    indices = torch.randint(0, rows, (tokens or 1,), device=device, generator=generator)
    table = F.pq_decode(codes, codebook)
    return Inputs(codes, codebook, indices, table, torch.empty_like(table[indices] if tokens else table))


def fill(inputs: Inputs) -> Callable:
    return partial(inputs.out.fill_, 1.0)


def eager(codes, codebook) -> torch.Tensor:
    """The whole weight in torch ops."""
    return torch.nn.functional.embedding(codes.int(), codebook).flatten(1)


def eager_rows(codes, codebook, indices) -> torch.Tensor:
    """Rows of the codes, then of the codebook, in torch ops."""
    return torch.nn.functional.embedding(codes[indices].int(), codebook).flatten(1)


def gather(call: Callable, inputs: Inputs) -> Callable:
    return partial(call, inputs.codes, inputs.codebook)


def gather_rows(call: Callable, inputs: Inputs) -> Callable:
    return partial(call, inputs.codes, inputs.codebook, inputs.indices)


def of_codes(prepare: Callable, call: Callable, device_type: str) -> list[Contender]:
    found = [Contender("F.embedding of codes", "peer", partial(prepare, call))]
    if device_type == "cuda":
        found.append(Contender("torch.compile", "peer", partial(prepare, compiled(call))))
    return found


def decode_contenders(device_type) -> list[Contender]:
    return [
        *ours("pq_decode", device_type, lambda inputs: partial(F.pq_decode, inputs.codes, inputs.codebook)),
        *of_codes(gather, eager, device_type),
        Contender("fill_", "ceiling", fill),
    ]


def embedding_contenders(device_type) -> list[Contender]:
    return [
        *ours(
            "pq_embedding",
            device_type,
            lambda inputs: partial(F.pq_embedding, inputs.indices, inputs.codes, inputs.codebook),
        ),
        *of_codes(gather_rows, eager_rows, device_type),
        Contender(
            "F.embedding",
            "peer",
            lambda inputs: partial(torch.nn.functional.embedding, inputs.indices, inputs.table),
        ),
        Contender("fill_", "ceiling", fill),
    ]


def case(shape, d, n_centroids, dtype, tokens=0, quick=False) -> Case:
    """tokens: rows of an embedding; 0 for the whole weight."""
    (rows, columns), types = shape, str(dtype).removeprefix("torch.")
    written = (tokens or rows) * columns
    what = f"{tokens} rows of {rows}x{columns}" if tokens else f"{rows}x{columns}"
    return Case(
        op="pq_embedding" if tokens else "pq_decode",
        name=f"{what} d={d} K={n_centroids} {types}",
        shape=what,
        dtype=types,
        moved_bytes=written // d + written * dtype.itemsize,
        operations=0,
        inputs=partial(make_inputs, shape, d, n_centroids, tokens, dtype),
        contenders=embedding_contenders if tokens else decode_contenders,
        quick=quick,
    )


CASES = [
    case((4096, 4096), 8, 256, torch.float32, quick=True),
    case((4096, 4096), 8, 256, torch.bfloat16),
    case((4096, 4096), 4, 256, torch.float32),
    case((4096, 4096), 8, 16, torch.float32),
    case((3072, 768), 8, 256, torch.float32),
    case((32_000, 1024), 8, 256, torch.float32, tokens=512, quick=True),
    case((32_000, 1024), 8, 256, torch.bfloat16, tokens=512),
    case((32_000, 1024), 8, 256, torch.float32, tokens=1),
]


def test_pq_decode(timed):
    """One row: a contender on a case. The fixture measures and reports."""
