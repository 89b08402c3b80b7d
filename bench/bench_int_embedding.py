"""int_embedding: rows of a table in packed integer codes, decoded to the dtype asked for.

Bytes (512 tokens of 32000x1024, 8 bits, fp32): 1 KiB of codes a row read, 4 KiB written, 2.6 MB in all; in
4 bits with groups of 128 half of the codes and 40 bytes of parameters a row.
Operations: one subtraction and one product a value.
Floor: those bytes; the ceiling writes the output only, and the codes are an eighth to a half of that.
Prediction, one core: 1.2 to 2x the fill while the output stays in cache.
Peers: F.embedding of the decoded table in the dtype of the output, and the formula (q - z) * s in torch ops
on the rows asked for, which is what a layer without a kernel does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from harness import Case, Contender, compiled, ours
from qnkernels import functional as F
from qnkernels.reference.int_linear import pack, unpack

GROUP = {8: None, 4: 128}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Inputs:
    weight: torch.Tensor  # uint8 [rows, columns * bits / 8]
    scale: torch.Tensor  # [rows, groups]
    zero_point: torch.Tensor  # uint8 [rows, groups]
    bits: int
    dtype: torch.dtype  # of the output
    indices: torch.Tensor  # int64 [tokens]
    table: torch.Tensor  # [rows, columns] in dtype, what the codes stand for
    out: torch.Tensor  # [tokens, columns]


def make_inputs(shape, bits, tokens, dtype, device, index) -> Inputs:
    generator = torch.Generator(device).manual_seed(index)
    rows, columns = shape
    groups = columns // (GROUP[bits] or columns)
    draw = partial(torch.randint, device=device, generator=generator)
    weight = pack(draw(0, 2**bits, shape, dtype=torch.uint8), bits)
    scale = torch.rand(rows, groups, device=device, generator=generator) / 2**bits
    zero_point = draw(0, 2**bits, (rows, groups), dtype=torch.uint8)
    indices = draw(0, rows, (tokens,))
    everything = torch.arange(rows, device=device)
    table = F.int_embedding(everything, weight, scale, zero_point, bits, dtype=dtype)
    return Inputs(weight, scale, zero_point, bits, dtype, indices, table, table.new_empty(tokens, columns))


def decode(inputs: Inputs) -> Callable:
    options = {"bits": inputs.bits, "dtype": inputs.dtype}
    return partial(F.int_embedding, inputs.indices, inputs.weight, inputs.scale, inputs.zero_point, **options)


def eager(indices, weight, scale, zero_point, bits, dtype) -> torch.Tensor:
    """(q - z) * s in torch ops."""
    scale, zero_point = scale[indices][..., None], zero_point[indices][..., None]
    codes = unpack(weight[indices], bits).view(len(indices), scale.shape[1], -1)
    return ((codes.float() - zero_point) * scale).view(len(indices), -1).to(dtype)


def formula(call: Callable, inputs: Inputs) -> Callable:
    table = inputs.weight, inputs.scale, inputs.zero_point
    return partial(call, inputs.indices, *table, inputs.bits, inputs.dtype)


def embedding(inputs: Inputs) -> Callable:
    return partial(torch.nn.functional.embedding, inputs.indices, inputs.table)


def contenders(dtype, device_type) -> list[Contender]:
    found = [
        *ours("int_embedding", device_type, decode),
        Contender(f"F.embedding {SHORT[dtype]}", "peer", embedding),
        Contender("formula in torch ops", "peer", partial(formula, eager)),
        Contender("fill_", "ceiling", lambda inputs: partial(inputs.out.fill_, 1.0)),
    ]
    if device_type == "cuda":
        found.append(Contender("torch.compile", "peer", partial(formula, compiled(eager))))
    return found


def case(shape, bits, tokens, dtype, quick=False) -> Case:
    (rows, columns), group = shape, GROUP[bits]
    read = columns * bits // 8 + 5 * (columns // (group or columns))
    what = f"{tokens} rows of {rows}x{columns}"
    return Case(
        op="int_embedding",
        name=f"{what} {bits} bits {SHORT[dtype]}",
        shape=what,
        dtype=str(dtype).removeprefix("torch."),
        moved_bytes=tokens * (read + columns * dtype.itemsize),
        operations=0,
        inputs=partial(make_inputs, shape, bits, tokens, dtype),
        contenders=partial(contenders, dtype),
        quick=quick,
    )


TABLE = (32_000, 1024)
CASES = [
    case(TABLE, 8, 512, torch.float32, quick=True),
    case(TABLE, 8, 512, torch.bfloat16, quick=True),
    case(TABLE, 8, 512, torch.float16),
    case(TABLE, 4, 512, torch.float32),
    case(TABLE, 4, 512, torch.bfloat16),
    case(TABLE, 8, 1, torch.float32),
    case(TABLE, 8, 16_384, torch.bfloat16),
    case((50_257, 768), 8, 1024, torch.float32),
]


def test_int_embedding(timed):
    """One row: a contender on a case. The fixture measures and reports."""
