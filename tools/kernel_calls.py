"""Calls of the Triton launchers that reach every kernel with every dtype, layout, flag and tile.

Triton compiles a kernel anew for each combination of these, and of whether pointers and strides are multiples
of 16. Of the product of all, those are taken that differ in what they keep in registers: where kernels take
the same way in every dtype, which is then a matter of a load and a store, most shapes come in fp32 alone. The
tensors are never read.
"""

from collections.abc import Iterator
from itertools import product

import torch

F32, BF16, F16 = FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BITS, SEED, STEP = torch.tensor(4), torch.tensor(1), torch.tensor(0)
Calls = Iterator[tuple[str, tuple]]


def fake_quantize() -> Calls:
    """Scale per tensor, tile, 8 elements and element; all pairs of dtypes; draws of 16 bits, of one, none;
    marks of what lies outside the range, or none."""
    square, odd = (64, 64), (64, 65)
    usual = ((F32, BF16), *((one, one) for one in FLOATS))
    cases = [(torch.empty(square, dtype=dtype), other, None, 0.1) for dtype, other in product(FLOATS, FLOATS)]
    cases += [(torch.empty(square, dtype=dtype), other, None, 0.5) for dtype, other in usual]
    for shape, p, (dtype, other) in product((square, odd), (0.1, 0.5), usual):
        cases.append((torch.empty(shape, dtype=dtype), other, 0, p))
    cases += [(torch.empty(shape), F32, axis, 1.0) for shape, axis in ((square, None), (square, 0), (odd, 0))]
    cases += [(torch.empty(2, 4096, dtype=dtype), dtype, 0, p) for dtype, p in product(FLOATS, (0.1, 0.5))]
    cases += [(misaligned(square, dtype), dtype, 0, 0.5) for dtype in FLOATS]
    # indices of 64 bits; the memory is reserved, not touched
    huge = torch.empty(8, 2**28 + 1, dtype=BF16)
    cases += [(huge, BF16, axis, p) for axis, p in product((None, 0), (0.1, 0.5))]
    for x, other, axis, p in cases:
        scale = torch.empty(() if axis is None else x.shape[axis])
        grad = torch.empty(x.shape, dtype=other)
        quantizer = (scale, scale, BITS, p, SEED, axis, None)
        marks = (None, torch.empty(-(-x.numel() // 2048), dtype=torch.uint8))
        for outside in marks if x.dtype == other and p != 0.1 else marks[:1]:
            yield "fake_quantize", (x, *quantizer, other, outside)
            yield "fake_quantize_backward", (grad, x, *quantizer, outside)
            if x.dtype == other != F16:
                yield "fake_quantize_backward", (grad, x, *quantizer, outside, grad)


def dynamic() -> Calls:
    """Samples of every register count, and larger ones, aligned and not; dtypes; random or not."""
    shapes = ((64, 1), (64, 100), (64, 1024), (64, 8000), (64, 8001), (3, 9001), (3, 16384), (1 << 20,))
    for shape, stochastic in product(shapes, (False, True)):
        rare = ((F16, F16), (F32, BF16)) if shape in ((64, 100), (64, 1024), (3, 9001)) else ()
        for dtype, other in ((F32, F32), (BF16, BF16), *rare):
            x = torch.empty(shape, dtype=dtype)
            yield "dynamic_fake_quantize", (x, BITS, SEED, len(shape) > 1, stochastic, other)
    yield "dynamic_fake_quantize", (torch.empty(8, 2**28 + 1, dtype=BF16), BITS, SEED, True, True)
    low = torch.empty(())
    yield "moving_fake_quantize_", (torch.empty(64, 64), low, low.clone(), STEP, BITS, 0.1)
    for x in (*(torch.empty(64, 64, dtype=dtype) for dtype in FLOATS), torch.empty(8, 2**28 + 1, dtype=BF16)):
        quantizer = low, low.clone(), STEP, BITS, 0.1, True, True
        yield "low_precision_operands_", (x, torch.empty(64, 64), *quantizer)
        yield "stop_gradient_", (x, torch.empty((x.numel() + 7) // 8, dtype=torch.uint8))


def block_noise() -> Calls:
    """Block sizes that are tiles of their own, that leave lanes idle, and that take several tiles."""
    for dtype, kind, d in product(FLOATS, ("zero", "mean"), (1, 8, 16, 64, 9, 1000)):
        yield "block_noise", (torch.empty(16, d, dtype=dtype), d, 0.1, SEED, kind, True, dtype)
    for d in (1, 8, 64, 1000):  # draws of one bit, for a tile of several calls or a part of one
        yield "block_noise", (torch.empty(16, d), d, 0.5, SEED, "zero", True, F32)
    for dtype, other in product(FLOATS, FLOATS):
        yield "block_noise", (torch.empty(16, 8, dtype=dtype), 8, 0.1, SEED, "mean", True, other)
    for dtype in FLOATS:
        yield "block_noise", (misaligned((16, 8), dtype), 8, 0.1, SEED, "zero", True, dtype)


def centroid_noise() -> Calls:
    """Blocks of every register count; few and many; all dtypes in and out."""
    for d, rows in product((1, 3, 8, 16, 33, 64), (16, 1 << 14)):
        codebook = torch.empty(256, d)
        rare = ((BF16, BF16), (F16, F16)) if d in (8, 33) else ()
        for dtype, other in ((F32, F32), *rare, *(((F32, BF16),) if d == 8 else ())):
            weight = torch.empty(rows, 64 * d, dtype=dtype)
            yield "block_noise", (weight, d, 0.1, SEED, "centroid", True, other, codebook)
        yield "block_noise", (torch.empty(rows, 64 * d), d, 0.5, SEED, "centroid", True, F32, codebook)


def ranges() -> Calls:
    """One and two stages; whole tensors, rows, columns and groups; aligned and not; when due and always."""
    layouts = (
        ((1 << 22,), None, None),
        ((17,), None, None),
        ((640, 768), 0, None),
        ((640, 75), 0, None),
        ((640, 768), 1, None),
        ((64, 64, 9), 1, None),
        ((64, 512), None, 128),
        ((64, 512), None, 8),
    )
    for dtype, (shape, axis, group_size) in product(FLOATS, layouts):
        x = torch.empty(shape, dtype=dtype)
        if group_size is not None:
            low = torch.empty(*shape[:-1], shape[-1] // group_size)
        else:
            low = torch.empty(() if axis is None else shape[axis])
        for observer in ("ema_minmax", "histogram") if dtype == F32 else ("ema_minmax",):
            yield "update_range_", (x, low, low.clone(), STEP, BITS, observer, 100, 0.1, axis, group_size)
    for shape in ((1 << 22,), (17,)):
        yield "minmax", (torch.empty(shape),)
        yield "histogram_range", (torch.empty(shape), BITS)


def parameters() -> Calls:
    """Both kinds of quantizer."""
    for symmetric in (False, True):
        yield "quantization_parameters", (torch.empty(64), torch.empty(64), BITS, symmetric)


def int_layers() -> Calls:
    """Few and many rows; one group, groups of a tile and of several, with zero points, and of odd sizes; so
    many tiles that nothing is split.
    """
    one_group, many_outs, odd_one = (64, 256, 1, False), (1 << 16, 256, 1, True), (64, 258, 1, True)
    groups, odd_groups = (64, 256, 2, True), (65, 250, 25, True)
    long_groups, long_odd_groups = (64, 2048, 2, True), (65, 4100, 2, True)
    shapes = (groups, odd_groups, long_groups, long_odd_groups, one_group, many_outs, odd_one)
    for dtype, bits in product(FLOATS, (4, 8)):
        for shape in (groups,) if dtype == F16 else shapes:
            n, k, count, has_zero = shape
            scale = torch.empty(n, count)
            zero_point = torch.empty(n, count, dtype=torch.uint8) if has_zero else None
            packed = (torch.empty(n, k * bits // 8, dtype=torch.uint8), scale, zero_point)
            for m in (1, 64, 128):
                x, bias = torch.empty(m, k, dtype=dtype), torch.empty(n) if has_zero else None
                quantizer = (torch.empty(()), torch.empty(())) if m == 64 else (None, None)
                yield "int_linear", (x, *packed, bias, bits)
                if dtype == F32 or shape in (groups, many_outs):
                    yield "int_linear_quantized", (x, *packed, bias, bits, *quantizer)
                yield "int_linear_backward", (torch.empty(m, n, dtype=dtype), *packed, bits)
            indices = torch.zeros(3, dtype=torch.int64)
            yield "int_embedding", (indices, *packed, bits, dtype)
            if not has_zero:
                wide = torch.empty(n, 4 * k * bits // 8, dtype=torch.uint8)
                yield "int_embedding", (indices, wide, scale, zero_point, bits, dtype)
    # a group of several pieces
    for bits, m in product((4, 8), (1, 64, 128)):
        k, scale = 1 << 16, torch.empty(64, 1)
        packed = (torch.empty(64, k * bits // 8, dtype=torch.uint8), scale, scale.to(torch.uint8))
        yield "int_linear_quantized", (torch.empty(m, k), *packed, None, bits, None, None)


def kmeans() -> Calls:
    """Dimensions of every register count; few points and many; with weights and without."""
    for n, d in product((1, 1 << 20), (1, 2, 3, 4, 7, 8, 9, 12, 16, 25, 32, 33, 48, 64)):
        yield "kmeans_assign", (torch.empty(n, d), torch.empty(256, d))
    for d, weighted in product((1, 3, 4, 8, 16, 33, 64), (False, True)):
        points, codes = torch.empty(1000, d), torch.zeros(1000, dtype=torch.int32)
        weights = torch.empty(1000) if weighted else None
        yield "kmeans_update", (points, codes, 256, 40, 30, weights)
        yield "kmeans_step", (points, torch.empty(256, d), 40, 30, 35, weights)


def product_layers() -> Calls:
    """Rows of every tile; blocks that fill lanes, leave some idle, and take several steps; both layouts."""
    weights = (
        (256, 64, 8, torch.uint8, False),
        (256, 64, 8, torch.uint8, True),
        (255, 33, 9, torch.uint16, False),
        (256, 64, 4, torch.uint16, True),
        (256, 4, 64, torch.uint8, False),
        (64, 512, 1, torch.uint8, False),
    )
    indices = torch.zeros(3, dtype=torch.int64)
    for dtype, (rows, n_blocks, d, kind, transposed) in product(FLOATS, weights):
        if dtype == F16 and transposed:
            continue
        codes = torch.empty(rows, n_blocks, dtype=kind)
        if transposed:
            codes = codes.t().contiguous().t()
        codebook, bias = torch.empty(256, d, dtype=dtype), torch.empty(rows)
        for m in (1, 4, 16, 64, 1 << 14):
            x, grad = (torch.empty(m, columns, dtype=dtype) for columns in (n_blocks * d, rows))
            yield "pq_linear", (x, codes, codebook, bias)
            yield "pq_linear_backward", (grad, x, codes, codebook, True, True, True)
        yield "pq_decode", (codes, codebook)
        yield "pq_embedding", (indices, codes, codebook)
        grad = torch.empty(rows, n_blocks * d, dtype=dtype)
        yield "pq_decode_backward", (grad, codes, 256, True)
        yield "pq_embedding_backward", (grad[:3], indices, codes, 256, True)
    # so many tiles that columns are not split
    codes, codebook = torch.empty(1 << 16, 64, dtype=torch.uint8), torch.empty(256, 8, dtype=BF16)
    for m in (1, 2, 3, 16):
        yield "pq_linear", (torch.empty(m, 512, dtype=BF16), codes, codebook, torch.empty(1 << 16))


def misaligned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor whose address is not a multiple of 16 bytes."""
    return torch.empty(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)


def all_calls() -> Calls:
    for family in (
        fake_quantize,
        dynamic,
        block_noise,
        centroid_noise,
        ranges,
        parameters,
        int_layers,
        kmeans,
        product_layers,
    ):
        yield from family()
