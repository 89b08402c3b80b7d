"""dynamic_fake_quantize and moving_fake_quantize_: the quantizers of low-precision training.

Bytes (1024 x 768 fp32, the gradient of an output layer, n = 0.79 M): each reads 4n and writes 4n, 6.3 MB; a
range over the whole tensor is a second read, from the cache where it fits.
Operations per element: 2 compares for the range and 13/16 vector instructions to the nearest level; to a
random level 23/16 more, 15 of them of Philox.
Floor: a copy of x, ratio 1. Prediction, 2 cores with AVX-512, in cache: 2x a copy to the nearest level, 4x
to a random one, since both are bound by instructions there; on a GPU 1x for samples that fit registers, and
1.5x with a second read.
Measured, 2 cores with AVX-512 and no AMX, copies from the cache: 2.8x to the nearest level (118 us), 6.8x
to a random one (329 us); over a whole tensor of 2.4 M 3.2x; moving 3.1x, and 5.3x for 12.6 M, where the pages
of a new result cost as much as the work. torch.compile takes 1.7 to 2.7 times as long to the nearest level,
12 to 19 times to a random one, and as long for 12.6 M.
"""

from functools import partial

import torch

from harness import Case, Contender, compiled, ours
from qnkernels import functional as F

BITS, SEED = 6, 7


def make_inputs(shape, dtype, device, index) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(index)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def formula(x, per_sample, stochastic):
    """As it is usually written: range, scale, round and clamp, with torch's own random numbers."""
    rows = x.float().reshape(len(x) if per_sample else 1, -1)
    low, high = rows.amin(1, True).clamp(max=0), rows.amax(1, True).clamp(min=0)
    scale = (high - low) / (2**BITS - 1)
    zero_point = torch.round(-low / scale)
    codes = rows / scale + zero_point
    codes = torch.floor(codes + torch.rand_like(codes)) if stochastic else torch.round(codes)
    return ((codes.clamp(0, 2**BITS - 1) - zero_point) * scale).reshape(x.shape).to(x.dtype)


def counters(x):
    return (torch.tensor(value, device=x.device) for value in (BITS, SEED))


def dynamic(per_sample, stochastic, x):
    bits, seed = counters(x)
    return partial(F.dynamic_fake_quantize, x, bits, per_sample, stochastic, seed)


def moving(x):
    low, high = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    step = torch.zeros((), dtype=torch.int64, device=x.device)
    return partial(F.moving_fake_quantize_, x, low, high, step, torch.tensor(BITS, device=x.device))


def contenders(op, per_sample, stochastic, device_type) -> list[Contender]:
    prepare = moving if op == "moving_fake_quantize_" else partial(dynamic, per_sample, stochastic)
    fast = compiled(formula)
    return [
        *ours(op, device_type, prepare),
        Contender("eager", "peer", lambda x: partial(formula, x, per_sample, stochastic)),
        Contender("torch.compile", "peer", lambda x: partial(fast, x, per_sample, stochastic)),
        Contender("copy_", "ceiling", lambda x: partial(torch.empty_like(x).copy_, x)),
    ]


def case(op, shape, per_sample=False, stochastic=False, dtype=torch.float32, quick=False, **options) -> Case:
    types, size = str(dtype).removeprefix("torch."), "x".join(map(str, shape))
    kind = "moving range" if op == "moving_fake_quantize_" else "per sample" if per_sample else "per tensor"
    return Case(
        op=op,
        name=f"{kind} {size} {types}{' random' if stochastic else ''}",
        shape=size,
        dtype=types,
        moved_bytes=2 * torch.Size(shape).numel() * dtype.itemsize,
        operations=0,
        inputs=partial(make_inputs, shape, dtype),
        contenders=partial(contenders, op, per_sample, stochastic),
        quick=quick,
        **options,
    )


GRADIENT, DYNAMIC, MOVING = (16, 64, 768), "dynamic_fake_quantize", "moving_fake_quantize_"
CASES = [
    case(DYNAMIC, GRADIENT, True, True, quick=True),
    case(DYNAMIC, GRADIENT, True, False),
    case(DYNAMIC, GRADIENT, True, True, torch.bfloat16),
    case(DYNAMIC, (3072, 768), False, False, quick=True),
    case(DYNAMIC, (3072, 768), True, False),
    case(DYNAMIC, (4096, 4096), True, True, torch.bfloat16),
    case(MOVING, GRADIENT, quick=True),
    case(MOVING, (8, 512, 3072)),
    case(MOVING, (8, 512, 3072), dtype=torch.bfloat16, devices=("cuda",)),
]


def test_dynamic_fake_quantize(timed):
    """One row: a contender on a case. The fixture measures and reports."""
