"""kmeans_assign, kmeans_update and kmeans_step under the interpreter."""

import pytest
import torch
from numeric import assert_identical

import qnkernels as qnk
from qnkernels.backends import kernels

# n, d, K: one of each; odd; no power of two; past a program's points; many clusters; the largest d
SIZES = (
    (1, 1, 1),
    (37, 3, 5),
    (700, 8, 16),
    (1100, 2, 7),
    (90, 9, 33),
    (33, 24, 3),
    (150, 33, 5),
    (40, 64, 11),
)
OFFSETS = (0.0, 100.0, -3e4)


def case(n, d, n_clusters, offset=0.0, seed=0):
    """points [n, d], centroids [K, d] and weights [n]; every third point lies close to a centroid."""
    generator = torch.Generator().manual_seed(n * d + n_clusters + seed)
    points = torch.randn(n, d, generator=generator) + offset
    centroids = torch.randn(n_clusters, d, generator=generator) + offset
    owner = torch.randint(0, n_clusters, (len(points[::3]),), generator=generator)
    points[::3] = centroids[owner] + 1e-3 * torch.randn(len(owner), d, generator=generator)
    return points, centroids, torch.rand(n, generator=generator) * 3


def squared_distances(points, centroids):
    """float64 [n, K]."""
    return ((points.double()[:, None] - centroids.double()) ** 2).sum(2)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("n", "d", "n_clusters"), SIZES)
def test_assignment_reaches_the_float64_minimum(n, d, n_clusters, offset):
    points, centroids, _ = case(n, d, n_clusters, offset)
    codes, distances = kernels("triton")["kmeans_assign"](points, centroids)
    assert codes.dtype == torch.int32 and distances.dtype == torch.float32
    exact = squared_distances(points, centroids)
    least = exact.min(1).values
    chosen = exact.gather(1, codes.long()[:, None])[:, 0]
    assert (chosen <= least * (1 + 1e-5)).all()
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-5, atol=1e-30)


def test_the_lowest_index_among_equals():
    centroids = torch.tensor([[5.0, 5.0], [1.0, 2.0], [1.0, 2.0], [5.0, 5.0]])
    points = torch.tensor([[1.0, 2.0], [5.0, 5.0], [1.5, 2.0], [3.0, 3.5]])
    codes, distances = kernels("triton")["kmeans_assign"](points, centroids)
    assert codes.tolist() == [1, 0, 1, 0]
    assert distances.tolist() == [0.0, 0.0, 0.25, 6.25]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "n_clusters"), SIZES)
def test_sums_equal_the_reference(n, d, n_clusters, weighted):
    points, _, weights = case(n, d, n_clusters, offset=0.3)
    codes = torch.randint(0, n_clusters, (n,), dtype=torch.int32)
    for exponent, weight_exponent in ((40, 30), (0, 3), (-2, 45), (50, 1)):
        arguments = (points, codes, n_clusters, exponent, weight_exponent, weights if weighted else None)
        results = [kernels(name)["kmeans_update"](*arguments) for name in ("triton", "reference")]
        for actual, expected in zip(*results, strict=True):
            assert_identical(actual, expected)


def test_ties_round_to_even_and_large_terms_are_exact():
    points = torch.tensor([[0.5], [1.5], [2.5], [-0.5], [-1.5], [2.0**60], [3 * 2.0**30], [-(2.0**52) - 1]])
    codes = torch.arange(8, dtype=torch.int32)
    sums, mass = kernels("triton")["kmeans_update"](points, codes, 8, 0, 0, None)
    assert sums[:, 0].tolist() == [0, 2, 2, 0, -2, 2**60, 3 * 2**30, -(2**52)]
    assert mass.tolist() == [1] * 8
    for exponent, value in ((-900, 2.0**60), (-50, 1.5 * 2.0**50), (160, 2.0**-120)):
        tiny = torch.tensor([[value]])
        arguments = (tiny, codes[:1], 1, exponent, 0, None)
        results = [kernels(name)["kmeans_update"](*arguments)[0] for name in ("triton", "reference")]
        assert_identical(*results)


def test_codes_out_of_range_are_left_out():
    points = torch.ones(5, 2)
    codes = torch.tensor([0, -1, 3, 2, 2**31 - 1], dtype=torch.int32)
    sums, mass = kernels("triton")["kmeans_update"](points, codes, 3, 4, 0, None)
    assert sums.tolist() == [[16, 16], [0, 0], [16, 16]]
    assert mass.tolist() == [1, 0, 1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "n_clusters"), SIZES)
def test_step(n, d, n_clusters, weighted):
    """The sums are those of its own codes, bit for bit; the objective that of the float64 distances."""
    points, centroids, weights = case(n, d, n_clusters)
    weights = weights if weighted else None
    arguments = (points, centroids, 40, 30, 35, weights)
    codes, sums, mass, objective = kernels("triton")["kmeans_step"](*arguments)
    assert_identical(codes, kernels("triton")["kmeans_assign"](points, centroids)[0])
    expected = kernels("reference")["kmeans_update"](points, codes, n_clusters, 40, 30, weights)
    assert_identical(sums, expected[0])
    assert_identical(mass, expected[1])
    least = squared_distances(points, centroids).min(1).values
    exact = (least if weights is None else least * weights.double()).sum()
    assert objective.shape == () and objective.dtype == torch.int64
    torch.testing.assert_close(
        torch.ldexp(objective.double(), torch.tensor(-35)), exact, rtol=1e-5, atol=1e-8
    )


def test_bounded_step_is_a_step():
    points, centroids, weights = case(70, 33, 4)
    kept = (
        torch.full((70,), -1, dtype=torch.int32),
        torch.ones(70, 16).to(torch.uint16),
        torch.ones(4, 33, dtype=torch.int64),
        torch.ones(4, dtype=torch.int64),
    )
    groups = (torch.arange(4, dtype=torch.int32), torch.zeros(16), 0.1)
    step = kernels("triton")["kmeans_bounded_step_"]
    total, _ = step(points, centroids, *groups, 40, 30, 35, *kept, weights)
    expected = kernels("triton")["kmeans_step"](points, centroids, 40, 30, 35, weights)
    for found, one in zip((kept[0], *kept[2:], total), expected, strict=True):
        assert_identical(found, one)
    assert not kept[1].to(torch.int32).any()


def test_no_points():
    points, centroids = torch.empty(0, 3), torch.randn(4, 3)
    codes, sums, mass, objective = kernels("triton")["kmeans_step"](points, centroids, 10, 0, 10, None)
    assert codes.shape == (0,) and not sums.any() and not mass.any() and objective == 0
    assert [one.shape for one in kernels("triton")["kmeans_assign"](points, centroids)] == [(0,), (0,)]


def test_through_the_public_face():
    """The whole algorithm ends where the reference does, and does so twice."""
    generator = torch.Generator().manual_seed(4)
    points = torch.randn(5, 3, generator=generator).repeat_interleave(60, 0) * 4
    points += torch.randn(points.shape, generator=generator)
    results = []
    for name in ("triton", "triton", "reference"):
        with qnk.backend(name):
            results.append(qnk.kmeans(points, 6, n_iter=4, seed=1))
    first, again, expected = results
    assert_identical(first.centroids, again.centroids)
    assert first.objective == again.objective
    assert_identical(first.codes, expected.codes)
    assert_identical(first.centroids, expected.centroids)
    torch.testing.assert_close(
        torch.tensor(first.objective), torch.tensor(expected.objective), rtol=1e-5, atol=0
    )
