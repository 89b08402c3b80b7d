"""The clipping range of least squared error: a histogram of each row, then three searches over it."""

import torch
import triton
import triton.language as tl

from ...reference.range import HISTOGRAM_BINS, SHRINK_STEPS
from ..native import layout
from . import launch
from .launch import cdiv, power_of_two
from .minmax import is_due
from .numeric import largest_code, nearest_code, to_fp32

BINS: tl.constexpr = tl.constexpr(HISTOGRAM_BINS)
STEPS: tl.constexpr = tl.constexpr(SHRINK_STEPS)

# Elements of a counting tile, 8 per thread; bins of a search tile, each against all shrink factors.
TILE = 2048
WARPS = 8
SEARCH_BINS = 256 if launch.INTERPRETED else 32  # the interpreter prefers few large steps
PROGRAMS = 4
# Rows whose histograms exist at one time: 32 MiB of counts.
ROWS = 4096


@triton.jit
def _bin_width(low, high):
    """Width of the bins over [low, high]; 1 for an empty range."""
    width = tl.div_rn(high - low, BINS * 1.0)
    return tl.where(width > 0, width, 1.0)


@triton.jit(do_not_specialize=["every"])
def clear_kernel(counts_ptr, step_ptr, every):
    """counts[row, :] = 0, int32 [rows, bins], one program a row. Floor: 8 KiB per row."""
    if is_due(step_ptr, every):
        bins = tl.arange(0, BINS)
        tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * BINS + bins, tl.zeros_like(bins))


@triton.jit(do_not_specialize=["first_row", "outer", "every"])
def count_kernel(
    x_ptr,
    low_ptr,
    high_ptr,
    counts_ptr,
    first_row,
    outer,
    channels,
    inner,
    step_ptr,
    every,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """counts[r, min(max((x - low) / width, 0), bins - 1)] += 1 over x[:, first_row + r, :].

    x [outer, channels, inner]; low, high fp32 [channels], widened to hold 0; the grid is (rows, splits).
    Integer sums do not depend on their order. Floor: bytes of x and one L2 addition per element.
    """
    if is_due(step_ptr, every):
        row = tl.program_id(0).to(tl.int64)
        channel = first_row + row
        low = tl.minimum(tl.load(low_ptr + channel), 0.0)
        high = tl.maximum(tl.load(high_ptr + channel), 0.0)
        width = _bin_width(low, high)
        reduced = tl.arange(0, BLOCK_O * BLOCK_I)
        o = reduced // BLOCK_I
        i = reduced % BLOCK_I
        pitch = tl.cast(inner, tl.int64) * channels
        tiles_i = tl.cdiv(inner, BLOCK_I)
        tiles = tl.cast(tl.cdiv(outer, BLOCK_O), tl.int64) * tiles_i
        for tile in range(tl.program_id(1).to(tl.int64), tiles, tl.num_programs(1)):
            first_o = tile // tiles_i * BLOCK_O
            first_i = tile % tiles_i * BLOCK_I
            inside = (o < outer - first_o) & (i < inner - first_i)
            offset = channel * inner + first_o * pitch + first_i + o * pitch + i
            x = to_fp32(tl.load(x_ptr + offset, mask=inside, other=0.0))
            place = tl.div_rn(x - low, width)
            place = tl.where(place > 0, place, 0.0)  # NaN, too, which no range can fit
            place = tl.where(place < BINS - 1, place, BINS - 1.0).to(tl.int32)
            tl.atomic_add(counts_ptr + row * BINS + place, 1, mask=inside, sem="relaxed")


@triton.jit
def _search(
    counts_ptr,
    low,
    high,
    center_low,
    width,
    top,
    SHRINK_LOW: tl.constexpr,
    SHRINK_HIGH: tl.constexpr,
    BINS_TILE: tl.constexpr,
):
    """The best of (low, high) shrunk by 1 - k / 64 for k in [0, 64), the smallest k among equals."""
    factor = 1.0 - tl.arange(0, STEPS).to(tl.float32) * (1.0 / STEPS)
    lows = low * factor if SHRINK_LOW else low + tl.zeros_like(factor)
    highs = high * factor if SHRINK_HIGH else high + tl.zeros_like(factor)
    scale = tl.div_rn(highs - lows, top)
    scale = tl.where(scale != 0, scale, 1.0)
    zero_point = nearest_code(0.0 - lows, scale, 0.0, top)[:, None]
    scale = scale[:, None]
    errors = tl.zeros([STEPS, BINS_TILE], tl.float64)
    for first in range(0, BINS, BINS_TILE):
        bins = first + tl.arange(0, BINS_TILE)
        center = (center_low + (bins.to(tl.float32) + 0.5) * width)[None, :]
        count = tl.load(counts_ptr + bins).to(tl.uint32, bitcast=True).to(tl.float64)[None, :]
        error = ((nearest_code(center, scale, zero_point, top) - zero_point) * scale - center).to(tl.float64)
        errors += count * (error * error)
    error = tl.sum(errors, axis=1)
    # a NaN error is never better; where all are, the range stays as it is (k = 0)
    best = tl.argmin(tl.where(error < float("inf"), error, float("inf")), axis=0, tie_break_left=True)
    factor = 1.0 - best.to(tl.float32) * (1.0 / STEPS)
    return (low * factor if SHRINK_LOW else low), (high * factor if SHRINK_HIGH else high)


@triton.jit(do_not_specialize=["first_row", "every"])
def search_kernel(
    counts_ptr,
    low_ptr,
    high_ptr,
    out_low_ptr,
    out_high_ptr,
    first_row,
    bits_ptr,
    step_ptr,
    every,
    BINS_TILE: tl.constexpr,
):
    """out_low, out_high[first_row + r] = the range in [low, high] of least sum of counts * (Q(c) - c)^2.

    counts int32 [rows, bins], read as uint32; low, high, out fp32 [channels]; c are the centres of the bins
    and Q the quantizer of 2^bits levels over the range. Both ends shrink together, then the low end, then the
    high end; sums are fp64. Bound by arithmetic: 3 * 64 * 2048 roundings per row.
    """
    if is_due(step_ptr, every):
        row = tl.program_id(0).to(tl.int64)
        channel = first_row + row
        counts_ptr += row * BINS
        # not minimum and maximum, which may drop the NaN of a range that has none
        low = tl.load(low_ptr + channel)
        high = tl.load(high_ptr + channel)
        low = tl.where(low > 0, 0.0, low)
        high = tl.where(high < 0, 0.0, high)
        width = _bin_width(low, high)
        center_low = low
        top = largest_code(bits_ptr)
        low, high = _search(counts_ptr, low, high, center_low, width, top, True, True, BINS_TILE)
        low, high = _search(counts_ptr, low, high, center_low, width, top, True, False, BINS_TILE)
        low, high = _search(counts_ptr, low, high, center_low, width, top, False, True, BINS_TILE)
        tl.store(out_low_ptr + channel, low)
        tl.store(out_high_ptr + channel, high)


def search(x, low, high, out_low, out_high, bits, axis, group_size, step=None, every=0) -> None:
    """Write the best range in [low, high] of each row of x to out_low, out_high; where due, with `step`."""
    outer, channels, inner = layout(x, axis, group_size)
    block_i = min(power_of_two(inner), TILE)
    block_o = min(power_of_two(outer), TILE // block_i)
    tiles = cdiv(outer, block_o) * cdiv(inner, block_i)
    counts = torch.empty(min(channels, ROWS), HISTOGRAM_BINS, dtype=torch.int32, device=x.device)
    for first in range(0, channels, ROWS):
        rows = min(channels - first, ROWS)
        splits = min(tiles, max(PROGRAMS * launch.processors(x.device) // rows, 1))
        launch.run(clear_kernel, (rows,), counts, step, every, num_warps=WARPS)
        launch.run(
            count_kernel,
            (rows, splits),
            *(x, low, high, counts, first, outer, channels, inner, step, every),
            **dict(BLOCK_O=block_o, BLOCK_I=block_i, num_warps=WARPS),
        )
        launch.run(
            search_kernel,
            (rows,),
            *(counts, low, high, out_low, out_high, first, bits, step, every),
            **dict(BINS_TILE=SEARCH_BINS, num_warps=WARPS),
        )
