"""Integers of a few bits each, one after the other in bytes, low bits first."""

import numpy as np
import torch

CHUNK = 1 << 20  # values spread into bits at once; a multiple of 8, so that chunks end at bytes


def pack_bits(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values uint8 or uint16 [n], below 2^bits -> uint8 [ceil(n * bits / 8)]; the last bits are 0."""
    if bits == 8:
        return values.to(torch.uint8)
    places = np.arange(bits, dtype=np.uint16)
    chunks = [
        np.packbits((chunk.numpy().astype(np.uint16)[:, None] >> places) & 1 != 0, bitorder="little")
        for chunk in values.split(CHUNK)
    ]
    return torch.from_numpy(np.concatenate(chunks))


def unpack_bits(packed: torch.Tensor, count: int, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The first `count` values of packed uint8 [ceil(count * bits / 8)], as `dtype` (uint8 or uint16)."""
    if bits == 8:
        return packed[:count].to(dtype)
    powers = (1 << np.arange(bits)).astype(np.int32)
    chunks = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        part = packed[start * bits // 8 : -(-(start + size) * bits // 8)].numpy()
        spread = np.unpackbits(part, count=size * bits, bitorder="little").reshape(size, bits)
        chunks.append((spread @ powers).astype(np.uint16))
    return torch.from_numpy(np.concatenate(chunks)).to(dtype)
