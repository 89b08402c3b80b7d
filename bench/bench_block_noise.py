"""block_noise: product-quantization noise by proxy (zeroed or averaged blocks), forward.

Bytes (3072x768 fp32, n = 2.36 M): reads 4n and writes 4n, 18.9 MB. The backward is the identity: nothing.
Operations: one 16-bit draw per block of 8, an eighth of what scalar noise draws; one multiplication per
element for "zero", eight additions and a division per block for "mean".
Floor: the copy of the weight, ratio 1.
Prediction, 2 cores and H100 alike: bound by memory, 1.0 to 1.1x the copy for both kinds.
Measured, 2 cores: 1.44x for "zero", 1.65x for "mean".
"""

from dataclasses import dataclass
from functools import partial

import torch

from harness import Case, Contender, compiled, ours
from qnkernels import functional as F

BLOCK = 8
RATE = 0.1


@dataclass
class Inputs:
    weight: torch.Tensor
    seed: torch.Tensor
    out: torch.Tensor


def make_inputs(shape, dtype, device, index) -> Inputs:
    generator = torch.Generator(device).manual_seed(index)
    weight = torch.randn(shape, device=device, generator=generator).to(dtype)
    return Inputs(weight, torch.full((), index, dtype=torch.int64, device=device), torch.empty_like(weight))


def eager(weight, kind, p):
    """The formula in torch ops, with a mask of its own."""
    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    mask = torch.rand(*blocks.shape[:2], 1, device=weight.device) < p
    if kind == "mean":
        return torch.where(mask, blocks.mean(-1, keepdim=True), blocks).reshape(weight.shape)
    return (blocks * (1 / (1 - p))).masked_fill(mask, 0).reshape(weight.shape)


def call_ours(kind, inputs: Inputs):
    return partial(F.block_noise, inputs.weight, BLOCK, RATE, inputs.seed, kind)


def contenders(kind, device_type) -> list[Contender]:
    formula = compiled(eager)
    return [
        *ours("block_noise", device_type, partial(call_ours, kind)),
        Contender("eager", "peer", lambda inputs: partial(eager, inputs.weight, kind, RATE)),
        Contender("torch.compile", "peer", lambda inputs: partial(formula, inputs.weight, kind, RATE)),
        Contender("clone", "peer", lambda inputs: inputs.weight.clone),
        Contender("copy_", "ceiling", lambda inputs: partial(inputs.out.copy_, inputs.weight)),
    ]


def case(kind, shape, dtype=torch.float32, quick=False, devices=("cpu", "cuda"), target=None) -> Case:
    rows, columns = shape
    types = str(dtype).removeprefix("torch.")
    return Case(
        op="block_noise",
        name=f"{kind} {rows}x{columns} {types} block {BLOCK} p={RATE}",
        shape=f"{rows}x{columns}",
        dtype=types,
        moved_bytes=2 * rows * columns * dtype.itemsize,
        operations=0,
        inputs=partial(make_inputs, shape, dtype),
        contenders=partial(contenders, kind),
        devices=devices,
        target=target,
        quick=quick,
    )


MAIN, LARGE = (3072, 768), (8192, 8192)
CASES = [
    *(
        case(kind, shape, dtype, quick=shape == MAIN and dtype == torch.float32)
        for kind in ("zero", "mean")
        for shape, dtype in (
            (MAIN, torch.float32),
            (MAIN, torch.bfloat16),
            ((768, 768), torch.float32),
            ((4096, 4096), torch.float32),
            ((1001, 776), torch.float32),
        )
    ),
    *(
        case(kind, LARGE, dtype, quick=True, devices=("cuda",), target=1 / 0.9)
        for kind in ("zero", "mean")
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


def test_block_noise(timed):
    """One row: a contender on a case. The fixture measures and reports."""
