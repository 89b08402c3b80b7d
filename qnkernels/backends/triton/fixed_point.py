"""Sums in fixed point: int64 atomics, so that they do not depend on the order of the terms.

A term t is added as round(t * 2^exponent), half to even. Atomics are spread over a few copies of the table
of sums, which are added up afterwards: integer sums are the same in any order.
"""

import torch
import triton
import triton.language as tl

BITS = 61  # of a sum, without its sign
# Entries of all copies of a table together, and copies at most.
SPREAD, COPIES = 1 << 16, 32


@triton.jit
def fixed_point(terms, exponent):
    """round(terms * 2^exponent), int64, half to even; terms fp32, exponent integer from -1022 to 1023.

    Both steps are exact: a power of two scales a double, and adding and subtracting 1.5 * 2^52 rounds one
    that is below 2^51; larger ones that come from fp32 are integers.
    """
    one = tl.full([], 1, tl.int64)
    scaled = terms.to(tl.float64) * ((one * (exponent + 1023)) << 52).to(tl.float64, bitcast=True)
    rounded = (scaled + 6755399441055744.0) - 6755399441055744.0
    return tl.where(tl.abs(scaled) < 2251799813685248.0, rounded, scaled).to(tl.int64)


def copies(entries: int) -> int:
    """How many copies a table of so many sums gets."""
    return max(min(SPREAD // entries, COPIES), 1)


def exponent_below(bound: torch.Tensor) -> torch.Tensor:
    """int64 []: an exponent with which sums of magnitude up to bound, float64 [], stay below 2^BITS."""
    return (BITS - torch.frexp(bound).exponent).clamp(-900, 900).long()


def unscaled(sums: torch.Tensor, exponent: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """sums * 2^-exponent, float64; NaN everywhere where the bound of the terms is not finite."""
    return torch.ldexp(sums.double(), -exponent) + bound * 0.0
