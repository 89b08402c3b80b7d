"""Philox4x32-10 and the noise mask drawn from it.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).

The noise of the whole library is defined here. Element (or block) i of a tensor takes the 16-bit draw
    word = philox(counter = (lo32(i // 8), hi32(i // 8), 0, 0), key = (lo32(seed), hi32(seed)))[(i % 8) // 2]
    draw = (word >> 16 * (i % 2)) & 0xffff
and is noised when draw < round(p * 65536). So a rate is realised in steps of 2^-16, eight consecutive
elements share one Philox call, and the mask depends on (seed, i, p) alone.
"""

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK32 = 0xFFFFFFFF


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
    """Draws below this 17-bit integer are noised."""
    return round(p * 65536)


def draws(n: int, seed: torch.Tensor) -> torch.Tensor:
    """int64 [n] in [0, 2^16): the draws of n consecutive elements (or blocks) under a 0-d int64 seed."""
    words = philox(torch.arange((n + 7) // 8, device=seed.device), seed)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()[:n]


def noise_mask(n: int, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Bool [n]: which of n consecutive elements (or blocks) are noised at rate p under a 0-d int64 seed."""
    return draws(n, seed) < threshold(p)
