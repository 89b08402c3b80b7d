"""pack_bits and unpack_bits: every width, counts that end inside a byte, chunks."""

import pytest
import torch

from qnkernels import bitstream


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("chunk", [8, 1 << 20])
def test_round_trip(bits, chunk, monkeypatch):
    monkeypatch.setattr(bitstream, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(bits)
    dtype = torch.uint8 if bits <= 8 else torch.uint16
    for count in (1, 2, 7, 8, 9, 64, 131):
        values = torch.randint(0, 2**bits, (count,), generator=generator).to(dtype)
        values[-1] = 2**bits - 1
        packed = bitstream.pack_bits(values, bits)
        assert packed.dtype == torch.uint8 and packed.numel() == -(-count * bits // 8)
        unpacked = bitstream.unpack_bits(packed, count, bits, dtype)
        assert unpacked.dtype == dtype and torch.equal(unpacked, values)


def test_low_bits_first():
    packed = bitstream.pack_bits(torch.tensor([1, 6, 5], dtype=torch.uint8), 3)
    assert packed.tolist() == [0b01110001, 0b1]
    assert bitstream.pack_bits(torch.tensor([0x1234], dtype=torch.uint16), 16).tolist() == [0x34, 0x12]
