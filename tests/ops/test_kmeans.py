"""kmeans_assign, kmeans_update and kmeans_step, on the backend that serves and the reference."""

import contextlib
import math

import pytest
import torch
from numeric import assert_identical
from pairs import covering, name

import qnkernels as qnk
from qnkernels import functional as F
from qnkernels.backends import kernels

SIZES = {
    "n": (1, 2, 15, 16, 17, 33, 100, 1003),
    "d": (1, 2, 3, 4, 7, 8, 9, 16, 33, 64),
    "K": (1, 2, 16, 255, 256, 257, 1000, 4096),
}
KINDS = ("plain", "offset", "spread", "lattice", "far")
EPS = torch.finfo(torch.float32).eps
STEP = torch.ops.qnkernels.kmeans_step


def possible(n, d, K, **rest) -> bool:
    return n * d * K <= 8_000_000


@pytest.fixture(params=["served", "reference"])
def backend(request):
    return contextlib.nullcontext if request.param == "served" else lambda: qnk.backend("reference")


@pytest.fixture
def threads():
    """A function that sets the number of threads; the number of before is set at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(n, d, K, kind, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and centroids. offset: all about 1000 from the origin. spread: clusters of radius 1e-4 to 1e2.
    lattice: small integers, so that many distances are equal. far: some points 1000 times as far out.
    """
    if kind == "lattice":
        return tuple(torch.randint(-2, 3, (size, d), generator=generator).float() for size in (n, K))
    points, centroids = (torch.randn(size, d, generator=generator) for size in (n, K))
    if kind == "offset":
        return points + 1000, centroids + 1000
    if kind == "far":
        points[5::97] *= 1000
    if kind == "spread":
        n_clusters = min(K, 5)
        centers = 100 * torch.randn(n_clusters, d, generator=generator)
        radius = 10.0 ** torch.linspace(-4, 2, n_clusters)[:, None]
        for values in (points, centroids):
            cluster = torch.randint(n_clusters, (len(values),), generator=generator)
            values.mul_(radius[cluster]).add_(centers[cluster])
    return points, centroids


def exact_distances(points, centroids) -> torch.Tensor:
    """Squared, float64 [n, K]."""
    return torch.stack([((centroids.double() - point) ** 2).sum(1) for point in points.double()])


def check_assignment(points, centroids, codes, distances=None) -> None:
    exact = exact_distances(points, centroids)
    best, chosen = exact.min(1).values, exact.gather(1, codes.long()[:, None])[:, 0]
    assert codes.dtype == torch.int32 and codes.shape == (len(points),)
    worse = chosen > best * (1 + 1e-5) + 1e-36
    assert not worse.any(), f"{int(worse.sum())} of {len(codes)}: {chosen[worse][0]} where {best[worse][0]}"
    if distances is not None:
        assert distances.dtype == torch.float32 and distances.shape == (len(points),)
        scale = (points.double() - points.double().mean(0)).square().sum(1).max()
        assert ((distances.double() - chosen).abs() <= 1e-5 * chosen + 4 * EPS * scale).all()


@pytest.mark.parametrize("case", list(covering(SIZES | {"kind": KINDS}, possible)), ids=name)
def test_assignments_against_float64(backend, case):
    n, d, K, kind = case.values()
    generator = torch.Generator().manual_seed(n * d * K)
    points, centroids = draw(n, d, K, kind, generator)
    with backend():
        check_assignment(points, centroids, *F.kmeans_assign(points, centroids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [4, 8, 16])
@pytest.mark.parametrize("K", [16, 256, 1024])
def test_assignments_of_common_shapes(kind, d, K):
    points, centroids = draw(2531, d, K, kind, torch.Generator().manual_seed(d + K))
    check_assignment(points, centroids, *F.kmeans_assign(points, centroids))
    check_assignment(points, centroids, STEP(points, centroids, 20, 0, 20)[0])


def test_as_many_centroids_as_there_may_be(backend):
    points, centroids = draw(60, 2, 65_536, "plain", torch.Generator().manual_seed(12))
    with backend():
        codes, distances = F.kmeans_assign(points, centroids)
        check_step(points, centroids, (exponent_of(points), 0), None)
    check_assignment(points, centroids, codes, distances)
    assert codes.max() > 2**15


@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e8, 1e15])
def test_assignments_at_other_magnitudes(backend, scale):
    points, centroids = draw(200, 8, 100, "plain", torch.Generator().manual_seed(3))
    with backend():
        check_assignment(
            points * scale, centroids * scale, *F.kmeans_assign(points * scale, centroids * scale)
        )


@pytest.mark.parametrize("K", [10, 33, 100, 256, 1000])
@pytest.mark.parametrize("d", [2, 7, 8, 16, 33])
def test_centroids_that_are_no_numbers_are_nobodys_nearest(d, K):
    points, centroids = draw(1003, d, K, "plain", torch.Generator().manual_seed(d * K))
    spoilt = centroids.clone()
    spoilt[K // 3, d // 2], spoilt[K - 1, 0] = math.nan, math.inf
    kept = torch.tensor([index for index in range(K) if index not in (K // 3, K - 1)])
    codes, distances = F.kmeans_assign(points, spoilt)
    expected, exact = F.kmeans_assign(points, centroids[kept])
    assert_identical(codes, kept[expected.long()].int())
    assert_identical(distances, exact)


@pytest.mark.parametrize("scale", [1e-16, 1.2e-15, 1e-14, 3e-14])
def test_tiny_centroids_and_points_far_beyond_them(scale):
    generator = torch.Generator().manual_seed(5)
    points, centroids = draw(2000, 8, 64, "plain", generator)
    points[7::31] *= 20
    check_assignment(points * scale, centroids * scale, F.kmeans_assign(points * scale, centroids * scale)[0])


@pytest.mark.parametrize("d", SIZES["d"])
def test_the_lowest_index_wins_among_equals(backend, d):
    """Every centroid comes three times: one after the other, and table after table."""
    generator = torch.Generator().manual_seed(d)
    points, centroids = draw(300, d, 37, "plain", generator)
    with backend():
        for code, table in (
            (lambda codes: codes % 3, centroids.repeat_interleave(3, 0)),
            (lambda codes: codes // 37, centroids.repeat(3, 1)),
            (lambda codes: codes, centroids[:1].expand(500, d)),
        ):
            for codes in (F.kmeans_assign(points, table)[0], STEP(points, table, 20, 0, 20)[0]):
                check_assignment(points, table, codes)
                assert (code(codes) == 0).all()


def test_points_that_are_centroids_have_distance_0(backend):
    generator = torch.Generator().manual_seed(5)
    for d in (1, 3, 8, 64):
        points, _ = draw(300, d, 1, "offset", generator)
        with backend():
            codes, distances = F.kmeans_assign(points, points)
        assert_identical(points[codes.long()], points)
        assert (distances <= 4 * EPS * d).all()


def exponent_of(points, weights=None) -> int:
    """So that sums stay below 2^61, as qnk.kmeans chooses it."""
    heaviest = 1.0 if weights is None else float(weights.max())
    return 61 - math.frexp(len(points) * float(points.abs().max()) * heaviest)[1]


UPDATE = SIZES | {"kind": KINDS, "weighted": (False, True)}


@pytest.mark.parametrize("case", list(covering(UPDATE, lambda n, d, K, **rest: n * d * K < 10**8)), ids=name)
def test_sums_are_those_of_the_reference_bit_for_bit(case):
    n, d, K, kind, weighted = case.values()
    generator = torch.Generator().manual_seed(n + d + K)
    points, centroids = draw(n, d, K, kind, generator)
    codes = torch.randint(0, K, (n,), generator=generator, dtype=torch.int32)
    weights = torch.rand(n, generator=generator) * 10 if weighted else None
    exponents = (exponent_of(points, weights), 50 if weighted else 0)
    update = kernels("reference")["kmeans_update"]
    for actual, expected in zip(
        F.kmeans_update(points, codes, K, *exponents, weights),
        update(points, codes, K, *exponents, weights),
        strict=True,
    ):
        assert_identical(actual, expected)
    if possible(n, d, K):
        check_step(points, centroids, exponents, weights)


def check_step(points, centroids, exponents, weights) -> None:
    objective_exponent = 10
    codes, sums, mass, objective = STEP(points, centroids, *exponents, objective_exponent, weights)
    check_assignment(points, centroids, codes)
    expected = kernels("reference")["kmeans_update"](points, codes, len(centroids), *exponents, weights)
    assert_identical(sums, expected[0])
    assert_identical(mass, expected[1])
    terms = (points.double() - centroids.double()[codes.long()]).square().sum(1)
    total = (terms if weights is None else terms * weights.double()).sum().item()
    assert objective.dtype == torch.int64 and objective.shape == ()
    scale = (points.double() - points.double().mean(0)).square().sum().item() * 10
    # each term is rounded to the unit once
    allowed = 1e-5 * total + 4 * EPS * scale + len(points) * 0.5**objective_exponent
    assert abs(objective.item() / 2**objective_exponent - total) <= allowed


@pytest.mark.parametrize("weighted", [False, True])
def test_step_of_the_reference(weighted):
    generator = torch.Generator().manual_seed(8)
    for kind in KINDS:
        points, centroids = draw(100, 7, 20, kind, generator)
        weights = torch.rand(100, generator=generator) if weighted else None
        with qnk.backend("reference"):
            check_step(points, centroids, (exponent_of(points, weights), 40), weights)


def test_sums_in_whole_numbers(backend):
    """Against Python's integers: rounding half to even, exponents of either sign, terms up to 2^60."""
    points = torch.tensor([[0.5], [1.5], [2.5], [-0.5], [-1.5], [3.25], [0.0], [-0.0], [1e-30]])
    codes = torch.tensor([0, 0, 2, 2, 2, 0, 1, 1, 1], dtype=torch.int32)
    with backend():
        for exponent in (-3, -1, 0, 1, 2, 30, 58):
            sums, mass = F.kmeans_update(points, codes, 4, exponent)
            terms = [round(value * 2.0**exponent) for value in points[:, 0].tolist()]
            expected = [sum(term for term, c in zip(terms, codes, strict=True) if c == k) for k in range(4)]
            assert sums[:, 0].tolist() == expected
            assert mass.tolist() == [3, 3, 3, 0]
        sums, _ = F.kmeans_update(torch.tensor([[2.0**100], [2.0**100]]), codes[:2], 1, -41)
        assert sums.item() == 2**60


def test_weights_of_products_and_masses(backend):
    """The product weight * point is rounded to fp32 before it is added."""
    generator = torch.Generator().manual_seed(4)
    points, weights = torch.randn(500, 3, generator=generator), torch.rand(500, generator=generator)
    weights[::7] = 0
    codes = torch.randint(0, 10, (500,), generator=generator, dtype=torch.int32)
    with backend():
        sums, mass = F.kmeans_update(points, codes, 10, 45, 40, weights)
    terms = ((points * weights[:, None]).double() * 2**45).round().long()
    masses = (weights.double() * 2**40).round().long()
    for k in range(10):
        assert_identical(sums[k], terms[codes == k].sum(0))
        assert mass[k] == masses[codes == k].sum()


def test_the_order_and_the_split_of_points_do_not_matter(backend):
    generator = torch.Generator().manual_seed(6)
    points, centroids = draw(5003, 8, 50, "plain", generator)
    weights = torch.rand(5003, generator=generator)
    order = torch.randperm(5003, generator=generator)
    exponents = (exponent_of(points, weights), 40, 30)
    with backend():
        whole = STEP(points, centroids, *exponents, weights)
        shuffled = STEP(points[order], centroids, *exponents, weights[order])
        parts = [STEP(points[s], centroids, *exponents, weights[s]) for s in (slice(1237), slice(1237, None))]
    assert_identical(shuffled[0], whole[0][order])
    assert_identical(torch.cat([part[0] for part in parts]), whole[0])
    for i in (1, 2, 3):
        assert_identical(shuffled[i], whole[i])
        assert_identical(parts[0][i] + parts[1][i], whole[i])


@pytest.mark.parametrize(("d", "K"), [(1, 3), (4, 256), (8, 256), (16, 33), (33, 20)])
def test_bits_do_not_depend_on_the_number_of_threads(threads, d, K):
    points, centroids = draw(20_011, d, K, "plain", torch.Generator().manual_seed(d))
    weights = torch.rand(20_011, generator=torch.Generator().manual_seed(1))
    results = []
    for count in (1, 2):
        threads(count)
        codes, distances = F.kmeans_assign(points, centroids)
        results.append(
            (
                codes,
                distances,
                *F.kmeans_update(points, codes, K, 40),
                *F.kmeans_update(points, codes, K, 40, 40, weights),
                *STEP(points, centroids, 40, 0, 30),
                *STEP(points, centroids, 40, 40, 30, weights),
            )
        )
    for one, two in zip(*results, strict=True):
        assert_identical(one, two)


def test_no_points(backend):
    centroids = torch.randn(5, 3)
    points, no_codes = torch.empty(0, 3), torch.empty(0, dtype=torch.int32)
    with backend():
        codes, distances = F.kmeans_assign(points, centroids)
        assert codes.shape == distances.shape == (0,)
        assert codes.dtype == torch.int32 and distances.dtype == torch.float32
        for weights in (None, torch.empty(0)):
            sums, mass = F.kmeans_update(points, no_codes, 5, 10, 10, weights)
            assert_identical(sums, torch.zeros(5, 3, dtype=torch.int64))
            assert_identical(mass, torch.zeros(5, dtype=torch.int64))
            codes, sums, mass, objective = STEP(points, centroids, 10, 10, 10, weights)
            assert codes.shape == (0,) and not sums.any() and not mass.any() and objective == 0


def test_memory_that_is_not_contiguous(backend):
    generator = torch.Generator().manual_seed(9)
    points, centroids = draw(100, 8, 40, "plain", generator)
    weights = torch.rand(100, generator=generator)

    def strided(x):
        return x.repeat_interleave(2, 0)[::2] if x.dim() == 1 else x.t().contiguous().t()

    codes = torch.randint(0, 40, (100,), generator=generator, dtype=torch.int32)
    with backend():
        for function, given in (
            (F.kmeans_assign, (points, centroids)),
            (lambda *t: F.kmeans_update(t[0], t[1], 40, 30, 30, t[2]), (points, codes, weights)),
            (lambda *t: STEP(t[0], t[1], 30, 30, 30, t[2]), (points, centroids, weights)),
        ):
            for actual, expected in zip(function(*map(strided, given)), function(*given), strict=True):
                assert_identical(actual, expected)


@pytest.mark.parametrize("code", [-1, 5, 2**31 - 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_codes_outside(code, weighted):
    codes = torch.tensor([0, 4, code], dtype=torch.int32)
    weights = torch.ones(3) if weighted else None
    with pytest.raises(IndexError):
        F.kmeans_update(torch.ones(3, 2), codes, 5, 10, 10, weights)


def test_opcheck():
    points, centroids = draw(30, 4, 5, "plain", torch.Generator().manual_seed(2))
    codes, weights = torch.zeros(30, dtype=torch.int32), torch.ones(30)
    ops = torch.ops.qnkernels
    torch.library.opcheck(ops.kmeans_assign.default, (points, centroids))
    for extra in ((), (20, weights)):
        torch.library.opcheck(ops.kmeans_update.default, (points, codes, 5, 20, *extra))
    for given in (None, weights):
        torch.library.opcheck(ops.kmeans_step.default, (points, centroids, 20, 20, 20, given))


P, C = torch.ones(6, 3), torch.ones(4, 3)
CODES = torch.zeros(6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.kmeans_assign(P.half(), C), TypeError, ("points", "float32", "float16")),
        (lambda: F.kmeans_assign(P[0], C), ValueError, ("points", "[n, d]", "(3,)")),
        (lambda: F.kmeans_assign(torch.ones(6, 65), C), ValueError, ("points", "64", "(6, 65)")),
        (lambda: F.kmeans_assign(P[:, :0], C[:, :0]), ValueError, ("points", "1 to 64", "(6, 0)")),
        (lambda: F.kmeans_assign(P, C.double()), TypeError, ("centroids", "float32", "float64")),
        (lambda: F.kmeans_assign(P, C[:, :2]), ValueError, ("centroids", "[K, 3]", "(4, 2)")),
        (lambda: F.kmeans_assign(P, C[0]), ValueError, ("centroids", "[K, 3]", "(3,)")),
        (lambda: F.kmeans_assign(P, C[:0]), ValueError, ("centroids", "1 to 65536", "(0, 3)")),
        (lambda: F.kmeans_assign(P, torch.ones(65537, 3)), ValueError, ("centroids", "65536", "(65537, 3)")),
        (lambda: F.kmeans_assign(P, C.to("meta")), ValueError, ("centroids", "cpu", "meta")),
        (lambda: F.kmeans_update(P, CODES.long(), 4, 10), TypeError, ("codes", "int32", "int64")),
        (lambda: F.kmeans_update(P, CODES[:5], 4, 10), ValueError, ("codes", "(6,)", "(5,)")),
        (lambda: F.kmeans_update(P, CODES, 0, 10), ValueError, ("n_clusters", "65536", "got 0")),
        (lambda: F.kmeans_update(P, CODES, 65537, 10), ValueError, ("n_clusters", "65536", "65537")),
        (
            lambda: F.kmeans_update(P, CODES, 4, 10, 0, torch.ones(5)),
            ValueError,
            ("weights", "(6,)", "(5,)"),
        ),
        (lambda: STEP(P, C, 1, 1, 1, P[:, 0].double()), TypeError, ("weights", "float32", "float64")),
        (lambda: STEP(P, C, 1, 1, 1, P), ValueError, ("weights", "(6,)", "(6, 3)")),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
