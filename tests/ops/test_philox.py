"""The generator against published vectors, and the statistics of the noise mask."""

import pytest
import torch
from numeric import integer

from qnkernels.reference.philox import noise_mask, philox


def words(counter: int, seed: int) -> list[int]:
    return philox(torch.tensor([counter]), integer(seed))[0].tolist()


def test_known_answers():
    """Random123's kat_vectors for philox4x32-10, where the two high counter words are 0."""
    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_mask_is_made_of_the_words():
    """16 bits an element, and at one half the bits one by one, from the low one of the first word on."""
    first, second = words(0, 0), words(1, 0)
    draws = [half for word in first for half in (word & 0xFFFF, word >> 16)]
    assert noise_mask(8, 0.75, integer(0)).tolist() == [draw < 49152 for draw in draws]
    bits = [word >> i & 1 for word in first + second for i in range(32)]
    assert noise_mask(200, 0.5, integer(0)).tolist() == [bit == 0 for bit in bits[:200]]


def test_counter_and_seed_use_64_bits():
    assert words(1, 0) != words(1 + 2**32, 0)
    assert words(0, 1) != words(0, 1 + 2**32)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate(p):
    n = 1 << 18
    rate = noise_mask(n, p, integer(12345)).float().mean().item()
    assert abs(rate - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-17


def test_ends_of_the_rate():
    assert not noise_mask(1000, 0.0, integer(1)).any()
    assert noise_mask(1000, 1.0, integer(1)).all()


def test_draws_are_independent_of_neighbours_and_seeds():
    n = 1 << 18
    first, second = (noise_mask(n, 0.5, integer(seed)).float() - 0.5 for seed in (7, 8))
    for a, b in ((first, second), *((first[:-lag], first[lag:]) for lag in (1, 8, 32, 128))):
        assert abs((a * b).mean().item() * 4) < 5 / n**0.5


def test_mask_is_nested_in_the_rate():
    """A higher rate noises the same elements and more: but for one half, the draw does not depend on p."""
    low, high = (noise_mask(5000, p, integer(3)) for p in (0.2, 0.6))
    assert (high | ~low).all()
