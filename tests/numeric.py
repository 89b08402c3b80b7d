"""Helpers of the op tests: random inputs, exact comparison, error against float64."""

import math

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# one element, prime, below, at and past a vector; past a chunk of 4096
SHAPES = ((1,), (7,), (16,), (17,), (3, 5), (5, 64), (13, 131), (3, 4099), (2, 3, 40))


def integer(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def random_seed(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2**62, (), generator=generator)


def assert_identical(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and values, NaN where NaN is expected (0 and -0 are the same)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if not same.all():
        index = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{int((~same).sum())} of {same.numel()} differ; first at {index}: "
            f"{actual[index].item()!r} instead of {expected[index].item()!r}"
        )


def few_outside(dtype: torch.dtype, axis: int | None) -> tuple[torch.Tensor, tuple, torch.Tensor]:
    """(x, (scale, zero_point, bits), outside): 6 tiles of 2048 elements and a part of one, of which some hold
    one value below the range, one above it, or NaN, which lies nowhere; what fake_quantize marks."""
    x = (torch.rand(9, 1373, generator=torch.Generator().manual_seed(7)) - 0.5).to(dtype)
    flat = x.view(-1)
    for index, value in ((0, -2.0), (2048, math.nan), (4095, math.inf), (4097, math.nan), (-1, 2.0)):
        flat[index] = value
    scale, zero_point = torch.tensor(0.1), torch.tensor(8.0)  # from -0.8 to 0.7
    if axis is not None:
        scale, zero_point = scale.repeat(x.shape[axis]), zero_point.repeat(x.shape[axis])
    return x, (scale, zero_point, integer(4)), torch.tensor([1, 1, 0, 0, 0, 0, 1], dtype=torch.uint8)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in float64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def layouts(shape: tuple[int, ...]):
    """(axis, group_size): per tensor, per channel along each axis, per group of 8 and of 5."""
    yield None, None
    for axis in range(len(shape)):
        yield axis, None
    for group_size in (8, 5):
        if shape[-1] % group_size == 0:
            yield None, group_size
