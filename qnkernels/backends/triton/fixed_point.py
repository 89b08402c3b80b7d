"""Sums in fixed point (../fixed_point.py): int64 atomics, which do not depend on the order of the terms.

A term t is added as round(t * 2^exponent), half to even. Atomics are spread over a few copies of the table
of sums, which are added up afterwards: integer sums are the same in any order.
"""

import triton
import triton.language as tl

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
