"""Product-quantization noise by the codebook itself: noised blocks become their nearest codeword.

Only noised blocks look for one. A first kernel copies the others and lists the noised ones, a second works
through the list, so that its threads are all busy whatever the rate.
"""

import torch
import triton
import triton.language as tl

from ...reference.philox import draw_bits, threshold
from . import launch
from .kmeans import THREADS, coordinates, nearest, points_of_program
from .launch import cdiv, power_of_two
from .numeric import from_fp32, to_fp32
from .philox import noise_mask

# Weights of a tile of the first kernel, 16 per thread.
TILE = 4096


@triton.jit(do_not_specialize=["blocks", "block_size", "threshold"])
def noised_blocks_kernel(
    weight_ptr,
    out_ptr,
    list_ptr,
    count_ptr,
    blocks,
    block_size,
    threshold,
    seed_ptr,
    BITS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out_b = w_b where b is not noised; the other b go to list int64 [blocks], their number to count.

    weight, out [blocks, block_size]; count int64 [], zero at first. The order of the list is left open: what
    is done with its entries does not depend on it. EXACT: block_size is COLS.
    Floor: bytes of weight + bytes of out per element.
    """
    width = COLS if EXACT else block_size
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLS)[None, :]
    inside = row < blocks - first
    noised = tl.reshape(noise_mask(first, seed_ptr, threshold, ROWS, BITS), [ROWS])
    listed = (noised & inside).to(tl.int32)
    position = tl.atomic_add(count_ptr, tl.sum(listed).to(tl.int64), sem="relaxed")
    position += tl.cumsum(listed, axis=0) - listed
    tl.store(list_ptr + position, first + row, mask=listed > 0)
    kept = (inside & (listed == 0))[:, None] & (column < width)
    offset = row[:, None] * width + column
    weight = to_fp32(tl.load(weight_ptr + first * width + offset, mask=kept))
    tl.store(out_ptr + first * width + offset, from_fp32(weight, out_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["n_centroids"])
def nearest_codeword_kernel(
    weight_ptr,
    codebook_ptr,
    out_ptr,
    list_ptr,
    count_ptr,
    n_centroids,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_b = the codeword nearest to w_b, the first of equals, for the first *count_ptr blocks b in list.

    weight, out [.., D]; codebook fp32 [n_centroids, D]. Programs past the end of the list stop at once.
    Floor: 2 D + 3 instructions per noised block and codeword.
    """
    left = tl.load(count_ptr) - tl.program_id(0).to(tl.int64) * BLOCK
    if left > 0:
        inside = tl.arange(0, BLOCK) < left
        slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        block = tl.load(list_ptr + slot, mask=inside, other=0)
        code, _ = nearest(coordinates(weight_ptr, block, inside, D), codebook_ptr, n_centroids, D)
        for j in tl.static_range(D):
            value = from_fp32(tl.load(codebook_ptr + code * D + j), out_ptr.dtype.element_ty)
            tl.store(out_ptr + block * D + j, value, mask=inside)


def centroid_noise(weight, p, seed, dtype, codebook):
    """block_noise with kind="centroid": blocks as long as a codeword of codebook fp32 [K, d]."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    n_centroids, d = codebook.shape
    blocks, limit = weight.numel() // d, threshold(p)
    indices = torch.empty(blocks, dtype=torch.int64, device=weight.device)
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    columns = power_of_two(d)
    rows = max(TILE // columns, 8)
    launch.run(
        noised_blocks_kernel,
        (cdiv(blocks, rows),),
        *(weight, out, indices, count, blocks, d, limit, seed),
        **dict(BITS=draw_bits(limit), EXACT=columns == d, ROWS=rows, COLS=columns, num_warps=8),
    )
    if limit:
        size = points_of_program(int(p * blocks), d, weight.device)
        launch.run(
            nearest_codeword_kernel,
            (cdiv(blocks, size),),
            *(weight, codebook, out, indices, count, n_centroids),
            **dict(D=d, BLOCK=size, num_warps=THREADS // 32),
        )
    return out
