"""Scales of sums in fixed point: int64 sums of round(term * 2^exponent), the same in any order."""

import torch

BITS = 61  # of a sum, without its sign


def exponent_below(bound: torch.Tensor) -> torch.Tensor:
    """int64 []: an exponent with which sums of magnitude up to bound, float64 [], stay below 2^BITS."""
    return (BITS - torch.frexp(bound).exponent).clamp(-900, 900).long()


def unscaled(sums: torch.Tensor, exponent: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """sums * 2^-exponent, float64; NaN everywhere where the bound of the terms is not finite."""
    return torch.ldexp(sums.double(), -exponent) + bound * 0.0
