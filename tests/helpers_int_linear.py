"""Random packed weights, and int_linear_quantized in numpy: exact integers, apart from the reference."""

from dataclasses import dataclass

import numpy as np
import torch

from qnkernels.reference.int_linear import pack, unpack

UNIT = 2.0**-24  # relative error of an fp32 rounding
PIECE = 32_768  # columns of a group whose sum fits 32 bits


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def possible(k, group, bits, **rest) -> bool:
    """Whether a row of k codes fills whole bytes and whole groups."""
    return k * bits % 8 == 0 and (group is None or k % group == 0)


@dataclass
class Packed:
    """The arguments of int_linear that describe the weight [n, k]."""

    codes: torch.Tensor  # uint8 [n, k * bits / 8]
    scale: torch.Tensor  # fp32 [n, groups]
    zero_point: torch.Tensor | None  # uint8 [n, groups]
    bits: int

    @property
    def arguments(self) -> tuple:
        return self.codes, self.scale, self.zero_point

    def levels(self) -> np.ndarray:
        """Codes less their zero points, float64 [n, groups, k / groups]."""
        n, groups = self.scale.shape
        codes = unpack(self.codes, self.bits).numpy().astype(np.float64).reshape(n, groups, -1)
        if self.zero_point is None:
            return codes - 2.0 ** (self.bits - 1)
        return codes - self.zero_point.numpy().astype(np.float64)[..., None]

    def decoded(self) -> torch.Tensor:
        """The weight in float64 [n, k]: a level and an fp32 scale multiply there without rounding."""
        weight = self.levels() * self.scale.double().numpy()[..., None]
        return torch.from_numpy(weight.reshape(len(weight), -1))


def random_packed(
    n: int,
    k: int,
    bits: int,
    groups: int,
    generator: torch.Generator,
    zero_point: bool = True,
    unit: float = 1.0,
) -> Packed:
    """Codes and zero points of all values; scales in [0.1, 1.1) * unit."""
    weight = pack(torch.randint(0, 2**bits, (n, k), generator=generator), bits)
    scale = (torch.rand(n, groups, generator=generator) + 0.1) * unit
    zero = torch.randint(0, 2**bits, (n, groups), generator=generator).to(torch.uint8)
    return Packed(weight, scale, zero if zero_point else None, bits)


def quantized_rows(
    x: torch.Tensor, quantizer: tuple[float, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """8-bit codes less their zero point, float64 [m, k], and fp32 scale [m, 1], NaN for rows without one.

    quantizer: the (scale, zero point) of all rows; None for a range of each row's own.
    """
    rows = x.detach().float().numpy()
    with np.errstate(all="ignore"):
        if quantizer is None:
            low = np.minimum(rows.min(1, keepdims=True), np.float32(0))
            high = np.maximum(rows.max(1, keepdims=True), np.float32(0))
            scale = (high - low) / np.float32(255)
            scale[scale == 0] = 1
            zero = np.rint(-low / scale).clip(0, 255)
            lost = ~np.isfinite(scale)
        else:
            scale, zero = (np.full((len(rows), 1), value, np.float32) for value in quantizer)
            lost = np.isnan(rows).any(1, keepdims=True)
        codes = np.rint(rows / scale + zero).clip(0, 255) - zero
    return np.where(lost, 0, codes).astype(np.float64), np.where(lost, np.float32("nan"), scale)


@dataclass
class Exact:
    """int_linear_quantized without rounding, what rounding may add, and, for one group, its very bits."""

    value: torch.Tensor  # float64 [m, n]
    bound: torch.Tensor  # float64 [m, n]
    rounded: torch.Tensor | None  # in the dtype of x [m, n]


def exact_quantized(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, quantizer: tuple[float, float] | None = None
) -> Exact:
    """y = (sum over groups of fp32(acc) * scale) * x_scale + bias; acc in float64 is exact below 2^53.

    Groups of more than 32,768 columns are summed in pieces of so many, as if each were a group.
    In fp32, with G of them: acc is rounded, multiplied (1 rounding each), added to G - 1 others (G - 1), and
    the sum multiplied by x_scale (1): G + 2 roundings, each at most UNIT times the sum of absolute terms.
    One more, of y, for the bias; then that to the dtype of x.
    """
    shifted, x_scale = quantized_rows(x, quantizer)
    levels = packed.levels()
    _, groups, size = levels.shape
    columns = shifted.reshape(len(shifted), groups, size)
    pieces = [(g, slice(at, at + PIECE)) for g in range(groups) for at in range(0, size, PIECE)]
    sums = [columns[:, g, piece] @ levels[:, g, piece].T for g, piece in pieces]
    scales = [packed.scale.numpy()[:, g] for g, _ in pieces]
    added = np.zeros(len(levels), np.float32) if bias is None else bias.detach().float().numpy()
    terms = [acc * scale.astype(np.float64) * x_scale for acc, scale in zip(sums, scales, strict=True)]
    value = torch.from_numpy(sum(terms) + added)
    bound = (len(sums) + 3) * UNIT * torch.from_numpy(sum(map(np.abs, terms))) + UNIT * value.abs()
    bound += output_rounding(value, x.dtype)
    rounded = None
    if len(sums) == 1:
        with np.errstate(all="ignore"):
            y = (np.zeros(len(levels), np.float32) + sums[0].astype(np.float32) * scales[0]) * x_scale
            rounded = torch.from_numpy(y if bias is None else y + added).to(x.dtype)
    return Exact(value, bound, rounded)


def output_rounding(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of `value` in `dtype`, float64; 0 for fp32, whose bounds count it."""
    if dtype == torch.float32:
        return torch.zeros_like(value)
    kind = torch.finfo(dtype)
    return kind.eps / 2 * value.abs() * 1.001 + kind.smallest_normal * kind.eps / 2


def assert_within(actual: torch.Tensor, value: torch.Tensor, bound: torch.Tensor) -> None:
    """|actual - value| <= bound for every element; the message tells the worst."""
    assert actual.shape == value.shape
    excess = (actual.detach().double() - value).abs() / bound.clamp(min=1e-300)
    if excess.numel() and not (excess <= 1).all():
        index = tuple(int(i) for i in np.unravel_index(int(excess.nan_to_num(1e300).argmax()), excess.shape))
        raise AssertionError(
            f"{int((~(excess <= 1)).sum())} of {excess.numel()} beyond the bound; worst at {index}: "
            f"{actual[index].item()!r} instead of {value[index].item()!r}, {excess[index]:.2f}x the bound"
        )
