"""Smallest and largest values: one kernel that reduces any layout, in one or two stages."""

import torch
import triton
import triton.language as tl

from ..native import layout
from . import launch
from .launch import cdiv, power_of_two
from .numeric import ALL, to_fp32

# Elements of a tile [BLOCK_C, BLOCK_O * BLOCK_I], 8 per thread, and programs per multiprocessor.
TILE = 2048
WARPS = 8
PROGRAMS = 4


@triton.jit
def is_due(step_ptr, every):
    """Whether the forward numbered *step_ptr refreshes the range: the first, and every `every`-th if > 0."""
    if step_ptr is None:
        due = True
    else:
        now = tl.load(step_ptr)
        due = (now == 0) | ((every > 0) & (now % tl.maximum(every, 1) == 0))
    return due


@triton.jit
def _tile_minmax(x_low_ptr, x_high_ptr, low, high, offset, inside, PAIR: tl.constexpr):
    """Elementwise (low, high) with a tile at `offset`; `inside` None reads it without a mask."""
    x_low = to_fp32(tl.load(x_low_ptr + offset, mask=inside))
    if PAIR:
        x_high = to_fp32(tl.load(x_high_ptr + offset, mask=inside))
    else:
        x_high = x_low
    if inside is not None:
        x_low = tl.where(inside, x_low, float("inf"))
        x_high = tl.where(inside, x_high, float("-inf"))
    return tl.minimum(low, x_low, propagate_nan=ALL), tl.maximum(high, x_high, propagate_nan=ALL)


@triton.jit(do_not_specialize=["outer", "every"])
def minmax_kernel(
    x_low_ptr,
    x_high_ptr,
    low_ptr,
    high_ptr,
    outer,
    channels,
    inner,
    step_ptr,
    every,
    momentum,
    PAIR: tl.constexpr,
    MOVING: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """low[s, c], high[s, c] = min, max over the part s of x[:, c, :]; NaN where there is one.

    x [outer, channels, inner]; low, high fp32 [splits, channels], the grid being (channel tiles, splits).
    PAIR: minima and maxima of earlier parts come from x_low and x_high; otherwise both are x.
    MOVING: low += (min - low) * momentum, except in forward 0. Nothing is done in a forward that is not due.
    Floor: bytes of x per element; none where it is not due.
    """
    if is_due(step_ptr, every):
        first_channel = tl.program_id(0).to(tl.int64) * BLOCK_C
        channel = first_channel + tl.arange(0, BLOCK_C)
        reduced = tl.arange(0, BLOCK_O * BLOCK_I)[None, :]
        o = reduced // BLOCK_I
        i = reduced % BLOCK_I
        row = tl.cast(inner, tl.int64) * channels
        start = channel[:, None] * inner + o * row + i
        low = tl.full([BLOCK_C, BLOCK_O * BLOCK_I], float("inf"), tl.float32)
        high = tl.full([BLOCK_C, BLOCK_O * BLOCK_I], float("-inf"), tl.float32)
        tiles_i = tl.cdiv(inner, BLOCK_I)
        tiles = tl.cast(tl.cdiv(outer, BLOCK_O), tl.int64) * tiles_i
        full_channels = first_channel + BLOCK_C <= channels
        for tile in range(tl.program_id(1).to(tl.int64), tiles, tl.num_programs(1)):
            first_o = tile // tiles_i * BLOCK_O
            first_i = tile % tiles_i * BLOCK_I
            offset = start + (first_o * row + first_i)
            if full_channels & (first_o + BLOCK_O <= outer) & (first_i + BLOCK_I <= inner):
                low, high = _tile_minmax(x_low_ptr, x_high_ptr, low, high, offset, None, PAIR)
            else:
                inside = (channel < channels)[:, None] & (o < outer - first_o) & (i < inner - first_i)
                low, high = _tile_minmax(x_low_ptr, x_high_ptr, low, high, offset, inside, PAIR)
        # reductions drop NaN, so whether there was one is reduced on the side
        nan = tl.max((low != low).to(tl.int32), axis=1) > 0
        low = tl.where(nan, float("nan"), tl.min(low, axis=1))
        high = tl.where(nan, float("nan"), tl.max(high, axis=1))
        slot = tl.program_id(1).to(tl.int64) * channels + channel
        if MOVING:
            old_low = tl.load(low_ptr + slot, mask=channel < channels)
            old_high = tl.load(high_ptr + slot, mask=channel < channels)
            first = tl.load(step_ptr) == 0
            low = tl.where(first, low, old_low + (low - old_low) * momentum)
            high = tl.where(first, high, old_high + (high - old_high) * momentum)
        tl.store(low_ptr + slot, low, mask=channel < channels)
        tl.store(high_ptr + slot, high, mask=channel < channels)


def _reduce(x_low, x_high, low, high, sizes, step, every, momentum, moving, splits=None) -> None:
    """Launch minmax_kernel over [outer, channels, inner]; `splits` None gives each program whole channels."""
    outer, channels, inner = sizes
    block_i, block_o, block_c = _tile(*sizes)
    launch.run(
        minmax_kernel,
        (cdiv(channels, block_c), splits or 1),
        *(x_low, x_high, low, high, outer, channels, inner, step, every, momentum),
        **dict(PAIR=x_low is not x_high, MOVING=moving, num_warps=WARPS),
        **dict(BLOCK_C=block_c, BLOCK_O=block_o, BLOCK_I=block_i),
    )


def _tile(outer: int, channels: int, inner: int) -> tuple[int, int, int]:
    """(BLOCK_I, BLOCK_O, BLOCK_C): contiguous elements of a channel first, then neighbouring channels."""
    block_i = min(power_of_two(inner), TILE)
    block_c = min(power_of_two(channels), max(32 // block_i, 1)) if outer > 1 else TILE // block_i
    block_o = min(power_of_two(outer), TILE // (block_i * block_c))
    return block_i, block_o, min(power_of_two(channels), TILE // (block_i * block_o))


def refresh(x, low, high, axis, group_size, step=None, every=0, momentum=1.0, moving=False) -> None:
    """Write (or, moving, update) the range of x in low and high; with `step`, where that forward is due."""
    sizes = outer, channels, inner = layout(x, axis, group_size)
    block_i, block_o, block_c = _tile(*sizes)
    tiles = cdiv(outer, block_o) * cdiv(inner, block_i)
    splits = min(tiles, max(PROGRAMS * launch.processors(x.device) // cdiv(channels, block_c), 1))
    if splits == 1:
        return _reduce(x, x, low, high, sizes, step, every, momentum, moving)
    parts = torch.empty(2, splits, channels, dtype=torch.float32, device=x.device)
    _reduce(x, x, *parts, sizes, step, every, 1.0, False, splits)
    _reduce(*parts, low, high, (splits, channels, 1), step, every, momentum, moving)
