"""kmeans_bounded_step_: the bits of kmeans_step, and bounds that hold."""

import math
from dataclasses import dataclass

import pytest
import torch
from numeric import assert_identical
from pairs import covering, name

import qnkernels as qnk

STEP, BOUNDED = torch.ops.qnkernels.kmeans_step, torch.ops.qnkernels.kmeans_bounded_step_
EXPONENTS = (30, 25, 20)
CASES = {
    "n": (1, 15, 16, 17, 511, 513, 2100),
    "d": (1, 3, 4, 7, 8, 9, 16, 33, 64),
    "K": (1, 5, 16, 33, 256, 700),
    "groups": (16, 32, 48, 64),
    "kind": ("plain", "offset", "lattice", "clustered", "same"),
    "weighted": (False, True),
}


def draw(kind: str, n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """Points. offset: all about 1000 from the origin. lattice: small integers, so that many distances are
    equal. clustered: a few of very different radius. same: all are one point.
    """
    points = torch.randn(n, d, generator=generator)
    if kind == "offset":
        return points + 1000
    if kind == "lattice":
        return (2 * points).round()
    if kind == "clustered":
        cluster = torch.randint(4, (n,), generator=generator)
        return points * 10.0 ** (cluster[:, None] - 3.0) + 30 * cluster[:, None]
    return points[:1].expand(n, d).contiguous() if kind == "same" else points


@dataclass
class Kept:
    """What a search with bounds carries from step to step."""

    group_of: torch.Tensor
    travelled: torch.Tensor  # float64
    unit: float
    codes: torch.Tensor
    bounds: torch.Tensor
    sums: torch.Tensor
    mass: torch.Tensor

    @classmethod
    def of(cls, n, d, K, groups, generator, unit=1e-3) -> "Kept":
        return cls(
            torch.randint(groups, (K,), generator=generator, dtype=torch.int32),
            torch.zeros(groups, dtype=torch.float64),
            unit,
            torch.full((n,), -1, dtype=torch.int32),
            torch.zeros(n, groups, dtype=torch.uint16),
            torch.zeros(K, d, dtype=torch.int64),
            torch.zeros(K, dtype=torch.int64),
        )

    def travel(self, moved: torch.Tensor) -> None:
        farthest = torch.zeros_like(self.travelled)
        self.travelled += farthest.scatter_reduce_(0, self.group_of.long(), moved, "amax")

    def step(self, points, centroids, weights):
        where = (self.group_of, (self.travelled * (1 + 2**-20)).float(), self.unit)
        kept = (self.codes, self.bounds, self.sums, self.mass)
        return BOUNDED(points, centroids, *where, *EXPONENTS, *kept, weights)

    def check_bounds(self, points, centroids) -> None:
        """None exceeds the distance, in float64, to any centroid of the group but the point's own."""
        distances = (points.double()[:, None] - centroids.double()).norm(dim=2)
        distances.scatter_(1, self.codes.long()[:, None], math.inf)
        least = torch.full(self.bounds.shape, math.inf, dtype=torch.float64)
        least.scatter_reduce_(1, self.group_of.long().expand_as(distances), distances, "amin")
        bounds = self.bounds.to(torch.float64) * self.unit - self.travelled
        assert (bounds <= least).all()


def search(points, centroids, kept, weights, steps=6, generator=None, check_bounds=False) -> list[int]:
    """Steps, each compared to kmeans_step; how many pairs of point and group each looked at."""
    looks = []
    for step in range(steps):
        codes, sums, mass, total = STEP(points, centroids, *EXPONENTS, weights)
        found, looked = kept.step(points, centroids, weights)
        assert_identical(kept.codes, codes)
        assert_identical(kept.sums, sums)
        assert_identical(kept.mass, mass)
        assert_identical(found, total)
        if check_bounds:
            kept.check_bounds(points, centroids)
        looks.append(int(looked))
        means = sums.double() * 2.0 ** -EXPONENTS[0] / (mass.double() * 2.0 ** -EXPONENTS[1])[:, None]
        if weights is None:
            means = sums.double() * 2.0 ** -EXPONENTS[0] / mass[:, None]
        means = torch.where(mass[:, None] > 0, means.float(), centroids)
        if step == 2 and generator is not None:  # one jumps
            means[len(means) // 2] = points[int(torch.randint(len(points), (), generator=generator))]
        kept.travel((means.double() - centroids.double()).norm(dim=1))
        centroids = means
    return looks


@pytest.mark.parametrize("case", list(covering(CASES)), ids=name)
def test_the_same_bits_as_whole_steps(case):
    n, d, K, groups, kind, weighted = case.values()
    generator = torch.Generator().manual_seed(n + d + K)
    points = draw(kind, n, d, generator)
    centroids = draw(kind, K, d, generator)
    weights = torch.rand(n, generator=generator) if weighted else None
    kept = Kept.of(n, d, K, groups, generator)
    search(points, centroids, kept, weights, generator=generator, check_bounds=n * K <= 600_000)


def test_the_reference_keeps_no_bounds():
    generator = torch.Generator().manual_seed(1)
    points, kept = torch.randn(50, 3, generator=generator), Kept.of(50, 3, 9, 16, generator)
    kept.bounds.fill_(7)
    with qnk.backend("reference"):
        looks = search(points, points[:9].clone(), kept, None)
    assert looks == [50 * 16] * 6 and not kept.bounds.to(torch.int32).any()


@pytest.mark.parametrize("d", [4, 8, 16])
def test_few_groups_are_looked_at_once_centroids_rest(d):
    """In the second of two steps without motion nearly none; all again once the bounds are 0."""
    generator = torch.Generator().manual_seed(d)
    points = torch.randn(4000, d, generator=generator)
    centroids, kept = points[:200].clone(), Kept.of(4000, d, 200, 16, generator)
    first, second = (int(kept.step(points, centroids, None)[1]) for _ in range(2))
    assert first == 4000 * 16 and second < 0.01 * first
    kept.bounds.zero_()
    assert int(kept.step(points, centroids, None)[1]) == first


@pytest.mark.parametrize("unit", [1e-9, 1e-5, 10.0, 1e30])
def test_any_unit(unit):
    """Far too fine: all bounds are at their top or below the ways travelled. Far too coarse: all are 0."""
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(900, 8, generator=generator)
    kept = Kept.of(900, 8, 60, 16, generator, unit)
    search(points, points[:60].clone(), kept, None, generator=generator, check_bounds=True)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_other_magnitudes(scale):
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(900, 8, generator=generator) * scale
    centroids = points[:60].clone()
    kept = Kept.of(900, 8, 60, 16, generator, 1e-3 * scale)
    first, *rest = (int(kept.step(points, centroids, None)[1]) for _ in range(2))
    assert_identical(kept.codes, STEP(points, centroids, *EXPONENTS)[0])
    assert rest[0] < 0.05 * first


def test_codes_that_are_only_partly_known():
    """Points without a code are looked at from scratch; those beside them keep theirs."""
    generator = torch.Generator().manual_seed(4)
    points = torch.randn(1200, 8, generator=generator)
    centroids, kept = points[:50].clone(), Kept.of(1200, 8, 50, 16, generator)
    kept.step(points, centroids, None)
    expected = [one.clone() for one in (kept.codes, kept.sums, kept.mass)]
    gone = torch.rand(1200, generator=generator) < 0.3
    sums, mass = torch.ops.qnkernels.kmeans_update(points[gone], kept.codes[gone], 50, *EXPONENTS[:2])
    kept.sums -= sums
    kept.mass -= mass
    kept.codes[gone] = -1
    kept.step(points, centroids, None)
    for actual, one in zip((kept.codes, kept.sums, kept.mass), expected, strict=True):
        assert_identical(actual, one)


def test_bits_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(5)
            points = torch.randn(20_011, 8, generator=generator)
            kept = Kept.of(20_011, 8, 100, 16, generator)
            looks = search(points, points[:100].clone(), kept, None)
            results.append((kept.codes, kept.bounds.to(torch.int32), kept.sums, torch.tensor(looks)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_identical(one, two)


@pytest.mark.parametrize("bad", [-2, 9, 2**31 - 1])
@pytest.mark.parametrize("argument", ["codes", "group_of"])
def test_indices_outside(argument, bad):
    generator = torch.Generator().manual_seed(6)
    points, kept = torch.randn(40, 3, generator=generator), Kept.of(40, 3, 9, 16, generator)
    kept.codes.zero_()
    getattr(kept, argument)[3] = bad if argument == "codes" or bad != 9 else 16
    codes = kept.codes.clone()
    with pytest.raises(IndexError):
        kept.step(points, points[:9].clone(), None)
    assert_identical(kept.codes, codes)  # nothing has changed
    assert not kept.bounds.to(torch.int32).any() and not kept.sums.any()


def test_opcheck():
    generator = torch.Generator().manual_seed(7)
    points, kept = torch.randn(40, 3, generator=generator), Kept.of(40, 3, 9, 16, generator)
    where = (kept.group_of, kept.travelled.float(), kept.unit)
    for weights in (None, torch.ones(40)):
        arguments = (points, points[:9].clone(), *where, *EXPONENTS)
        kept_ones = (kept.codes, kept.bounds, kept.sums, kept.mass)
        torch.library.opcheck(BOUNDED.default, (*arguments, *kept_ones, weights))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"travelled": torch.zeros(17)}, ValueError, ("travelled", "(17,)")),
        ({"travelled": torch.zeros(16).double()}, TypeError, ("travelled", "float32", "float64")),
        ({"unit": 0.0}, ValueError, ("unit", "positive", "0.0")),
        ({"unit": math.nan}, ValueError, ("unit", "positive", "nan")),
        ({"group_of": torch.zeros(8, dtype=torch.int32)}, ValueError, ("group_of", "(9,)", "(8,)")),
        ({"bounds": torch.zeros(40, 32, dtype=torch.uint16)}, ValueError, ("bounds", "(40, 16)", "(40, 32)")),
        ({"bounds": torch.zeros(40, 16, dtype=torch.int16)}, TypeError, ("bounds", "uint16", "int16")),
        ({"codes": torch.zeros(40)}, TypeError, ("codes", "int32", "float32")),
        ({"sums": torch.zeros(3, 9, dtype=torch.int64).t()}, ValueError, ("sums", "contiguous", "(9, 3)")),
        ({"mass": torch.zeros(8, dtype=torch.int64)}, ValueError, ("mass", "(9,)", "(8,)")),
    ],
)
def test_bad_input(change, error, words):
    generator = torch.Generator().manual_seed(8)
    points, kept = torch.randn(40, 3, generator=generator), Kept.of(40, 3, 9, 16, generator)
    names = ("group_of", "travelled", "unit", "codes", "bounds", "sums", "mass")
    given = {one: getattr(kept, one) for one in names} | {"travelled": torch.zeros(16)} | change
    first = (points, points[:9].clone(), *(given[one] for one in names[:3]))
    with pytest.raises(error) as caught:
        BOUNDED(*first, *EXPONENTS, *(given[one] for one in names[3:]))
    for word in words:
        assert word in str(caught.value)
