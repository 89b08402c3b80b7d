"""Packed integer weights in the kernels: how their rows are cut into tiles, groups, and programs.

weight uint8 [n, k * BITS / 8], low bits first; scale fp32 and zero_point uint8 [n, groups], or None for
z = 2^(BITS - 1). A group is k / groups consecutive columns, here always whole bytes.
"""

import torch
import triton
import triton.language as tl

from ...reference.int_linear import unpack
from . import launch
from .launch import cdiv, power_of_two

# Groups of whole multiples of this many bytes are counted in them, so that loads are known to be aligned.
ALIGNMENT = 16
# Programs that a multiprocessor has to hold before the work is no longer split: those of few rows wait for
# memory, those of many fill it with one.
PROGRAMS, PROGRAMS_OF_TILES = 4, 1
FEW_ROWS = 16
# Tiles of rows that run side by side for each tile of outputs, so that both operands are found in the cache.
SWIZZLE: tl.constexpr = tl.constexpr(8)

# How a program walks over groups: the tiles of a single one, groups of one tile each, groups of several.
ONE_GROUP: tl.constexpr = tl.constexpr(0)
ONE_TILE: tl.constexpr = tl.constexpr(1)
TILES: tl.constexpr = tl.constexpr(2)


@triton.jit
def tile_of(tiles_m, tiles_n):
    """(tile of rows, tile of columns) of a program, both int64 scalars."""
    program = tl.program_id(0)
    band = program // (SWIZZLE * tiles_n)
    height = tl.minimum(tiles_m - band * SWIZZLE, SWIZZLE)
    within = program - band * SWIZZLE * tiles_n
    return (band * SWIZZLE + within % height).to(tl.int64), (within // height).to(tl.int64)


@triton.jit
def load_bytes(weight_ptr, pitch, byte, row_inside, end, ROWS: tl.constexpr):
    """Bytes uint8 [ROWS, len(byte)] of ROWS rows from weight_ptr on; 0 from byte `end` on. pitch: bytes of a
    row.
    """
    row = tl.arange(0, ROWS)
    inside = row_inside[:, None] & (byte < end)[None, :]
    return tl.load(weight_ptr + row[:, None] * pitch + byte[None, :], mask=inside, other=0)


@triton.jit
def load_zero(zero_point_ptr, slot, inside, BITS: tl.constexpr):
    """Zero points int32 at `slot` of [n, groups]."""
    if zero_point_ptr is None:
        zero = tl.zeros_like(slot).to(tl.int32) + (1 << (BITS - 1))
    else:
        zero = tl.load(zero_point_ptr + slot, mask=inside, other=0).to(tl.int32)
    return zero


@triton.jit
def level(code, zero):
    """code - zero in fp32, exactly; code uint8, zero int32. 2^23 + code is a matter of bits, not of a
    conversion, which takes four times as long as an addition.
    """
    biased = (code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    return biased - (zero | 0x4B000000).to(tl.float32, bitcast=True)


def whole_bytes(weight, scale, zero_point, bits):
    """(weight, zero_point, bits) with groups of whole bytes: 4-bit groups of odd size become 8-bit ones."""
    if bits == 8 or weight.shape[1] % scale.shape[1] == 0:
        return weight, zero_point, bits
    if zero_point is None:
        zero_point = torch.full(scale.shape, 8, dtype=torch.uint8, device=scale.device)
    return unpack(weight, bits), zero_point, 8


def unit(size: int) -> int:
    """The unit in which `size` bytes are counted."""
    return ALIGNMENT if size % ALIGNMENT == 0 else 1


def tile_bytes(group_bytes: int, columns: int, bits: int, least: int) -> int:
    """Bytes of a row in a tile of `columns` columns: less for small groups, or for those read byte by byte,
    which takes registers, but `least` for the dot.
    """
    most = columns * bits // 8 if unit(group_bytes) > 1 else least
    return max(min(power_of_two(group_bytes), most), least)


def walk(groups: int, group_bytes: int, block: int) -> int:
    """How programs walk over groups in tiles of `block` bytes."""
    if groups == 1:
        return ONE_GROUP.value
    return ONE_TILE.value if group_bytes <= block else TILES.value


def split(m: int, tiles: int, count: int, device: torch.device) -> tuple[int, int]:
    """(parts, turns of each) into which `count` turns of a loop are cut, so that few tiles fill the GPU."""
    programs = (PROGRAMS if m <= FEW_ROWS else PROGRAMS_OF_TILES) * launch.processors(device)
    parts = max(min(programs // max(tiles, 1), cdiv(count, 2)), 1)
    turns = max(cdiv(count, parts), 1)
    return max(cdiv(count, turns), 1), turns
