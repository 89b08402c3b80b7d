"""The two ceilings of the machine: copy bandwidth and the rate of a large matrix product.

Bytes of the copy: read plus written. Operations of the product: 2 n^3. Every ratio of the other suites is to
a ceiling measured beside it; these figures say what the machine gives at its best.
"""

from functools import partial

import torch

from harness import Case, Contender

MEBIBYTE = 2**20
COPIES = {"cpu": 256 * MEBIBYTE, "cuda": 2048 * MEBIBYTE}
PRODUCTS = {"cpu": 2048, "cuda": 8192}


def copy_inputs(n_bytes, device, index):
    generator = torch.Generator(device).manual_seed(index)
    source = torch.randn(n_bytes // 4, device=device, generator=generator)
    return source, torch.empty_like(source)


def product_inputs(n, dtype, device, index):
    generator = torch.Generator(device).manual_seed(index)
    return tuple(torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))


def copy_case(device_type) -> Case:
    n_bytes = COPIES[device_type]
    return Case(
        op="copy",
        name=f"copy of {n_bytes // MEBIBYTE} MiB",
        shape=f"{n_bytes // MEBIBYTE} MiB",
        dtype="float32",
        moved_bytes=2 * n_bytes,
        operations=0,
        inputs=partial(copy_inputs, n_bytes),
        contenders=lambda _: [Contender("copy_", "ceiling", lambda pair: partial(pair[1].copy_, pair[0]))],
        devices=(device_type,),
        quick=True,
    )


def product_case(device_type, dtype) -> Case:
    n, types = PRODUCTS[device_type], str(dtype).removeprefix("torch.")
    return Case(
        op="matmul",
        name=f"matrix product {n}x{n}x{n} {types}",
        shape=f"{n}x{n}x{n}",
        dtype=types,
        moved_bytes=3 * n * n * dtype.itemsize,
        operations=2 * n**3,
        inputs=partial(product_inputs, n, dtype),
        contenders=lambda _: [Contender("matmul", "ceiling", lambda pair: partial(torch.matmul, *pair))],
        devices=(device_type,),
        quick=True,
    )


CASES = [
    case
    for device_type in ("cpu", "cuda")
    for case in (
        copy_case(device_type),
        product_case(device_type, torch.bfloat16),
        product_case(device_type, torch.float32),
    )
]


def test_ceilings(timed):
    """One row. The fixture measures and reports."""
