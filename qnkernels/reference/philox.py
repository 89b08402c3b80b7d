"""Philox4x32-10 and the noise mask drawn from it.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).

The noise of the whole library is defined here. Call c is the four words of
    philox(counter = (lo32(c), hi32(c), 0, 0), key = (lo32(seed), hi32(seed)))
as 128 bits, words in turn and low bits first. Element (or block) i of a tensor takes the 16 bits from
16 (i % 8) on of call i // 8 as its draw, and is noised when draw < round(p * 65536). So a rate is realised
in steps of 2^-16. At a rate of one half a bit is enough: bit i % 128 of call i // 128, and the element is
noised when it is 0. The mask depends on (seed, i, p) alone.
"""

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK32 = 0xFFFFFFFF
HALF = 32768  # the threshold of a rate of one half


def _mulhilo(a: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * multiplier, for a in [0, 2^32) held as int64 (no 64-bit overflow)."""
    low = a * (multiplier & 0xFFFF)
    high = a * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counters: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Four 32-bit words, as int64 [n, 4], for each 64-bit counter [n] under a 0-d int64 seed."""
    c0, c1 = counters & MASK32, (counters >> 32) & MASK32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(ROUNDS):
        hi0, lo0 = _mulhilo(c0, MULTIPLIERS[0])
        hi1, lo1 = _mulhilo(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def threshold(p: float) -> int:
    """Draws of 16 bits below this integer, up to 65536, are noised."""
    return round(p * 65536)


def draw_bits(limit: int) -> int:
    """Bits of an element's draw at this threshold."""
    return 1 if limit == HALF else 16


def draws(n: int, seed: torch.Tensor, bits: int = 16) -> torch.Tensor:
    """int64 [n] in [0, 2^bits): the draws of n consecutive elements (or blocks) under a 0-d int64 seed."""
    calls = torch.arange(-(-n * bits // 128), device=seed.device)
    shifts = torch.arange(0, 32, bits, device=seed.device)
    return (philox(calls, seed)[..., None] >> shifts & (1 << bits) - 1).flatten()[:n]


def noise_mask(n: int, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Bool [n]: which of n consecutive elements (or blocks) are noised at rate p under a 0-d int64 seed."""
    bits = draw_bits(threshold(p))
    return draws(n, seed, bits) < threshold(p) >> (16 - bits)
