"""minmax and histogram_range: the ranges that quantizers cover.

Bytes (3072x768 fp32, n = 2.36 M): minmax reads 4n = 9.4 MB once; histogram_range reads it twice (range, then
counts) and afterwards searches 192 candidate ranges over 2048 bins per parameter.
Operations: two compares per element; for the histogram a subtraction, a division and a counter per element,
then 192 x 2048 quantizations (0.4 M, the work of a sixth of the weight's) per parameter.
Floor: a sum of the weight, which reads it once, ratio 1; the histogram 2, plus its search.
Prediction, 2 cores: minmax 1.0 to 1.2x the sum; histogram_range 10 to 20x, bound by the counters.
Measured, 2 cores: minmax 1.23x the sum; histogram_range 24x.
"""

from functools import partial

import torch

from harness import Case, Contender, compiled, ours
from qnkernels import functional as F

BITS = 8


def make_inputs(shape, dtype, device, index) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(index)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def both_ends(x, axis):
    """Smallest and largest value, along the other dimension where there is an axis."""
    return torch.aminmax(x) if axis is None else torch.aminmax(x, dim=1 - axis)


def minmax_contenders(axis, device_type) -> list[Contender]:
    formula = compiled(both_ends)
    return [
        *ours("minmax", device_type, lambda x: partial(F.minmax, x, axis)),
        Contender("torch.aminmax", "peer", lambda x: partial(both_ends, x, axis)),
        Contender("torch.compile", "peer", lambda x: partial(formula, x, axis)),
        Contender("sum", "ceiling", lambda x: x.sum),
    ]


def observe(x):
    """torch's histogram observer: a histogram, then a search for the range of least squared error."""
    from torch.ao.quantization import HistogramObserver

    observer = HistogramObserver(dtype=torch.quint8).to(x.device)
    observer(x)
    return observer.calculate_qparams()


def histogram_contenders(axis, device_type) -> list[Contender]:
    observer = Contender("HistogramObserver", "peer", lambda x: partial(observe, x), capture=False)
    return [
        *ours("histogram_range", device_type, lambda x: partial(F.histogram_range, x, BITS, axis)),
        *([observer] if axis is None else []),
        Contender("sum", "ceiling", lambda x: x.sum),
    ]


def case(op, shape, dtype=torch.float32, axis=None, quick=False) -> Case:
    rows, columns = shape
    types = str(dtype).removeprefix("torch.")
    per = "tensor" if axis is None else "channel"
    return Case(
        op=op,
        name=f"{op} {rows}x{columns} {types} per {per}",
        shape=f"{rows}x{columns}",
        dtype=types,
        moved_bytes=(1 if op == "minmax" else 2) * rows * columns * dtype.itemsize,
        operations=0,
        inputs=partial(make_inputs, shape, dtype),
        contenders=partial(minmax_contenders if op == "minmax" else histogram_contenders, axis),
        quick=quick,
    )


MAIN = (3072, 768)
CASES = [
    case("minmax", MAIN, quick=True),
    case("minmax", MAIN, axis=0),
    case("minmax", MAIN, dtype=torch.bfloat16),
    case("minmax", (4096, 4096)),
    case("minmax", (1001, 777)),
    case("histogram_range", MAIN, quick=True),
    case("histogram_range", MAIN, axis=0),
    case("histogram_range", (4096, 4096)),
]


def test_minmax(timed):
    """One row: a contender on a case. The fixture measures and reports."""
