"""k-means on a GPU: nearest in float64, and sums equal to the reference on the CPU bit for bit."""

import pytest
import torch

import qnkernels as qnk

SIZES = ((1, 1, 1), (300, 3, 5), (1500, 8, 16), (130, 9, 33), (70, 33, 4), (65, 64, 7))  # n, d, K
LARGE = ((100_003, 8, 256), (50_000, 4, 1024), (20_001, 16, 300), (3_000, 8, 5_000), (9_000, 64, 100))


def case(n, d, n_clusters, offset=0.0):
    """points [n, d], of which every third lies close to a centroid, centroids [K, d], weights [n]."""
    generator = torch.Generator().manual_seed(n + d * n_clusters)
    points = torch.randn(n, d, generator=generator) + offset
    centroids = torch.randn(n_clusters, d, generator=generator) + offset
    owner = torch.randint(0, n_clusters, (len(points[::3]),), generator=generator)
    points[::3] = centroids[owner] + 1e-3 * torch.randn(len(owner), d, generator=generator)
    return points, centroids, torch.rand(n, generator=generator) * 3


def assert_nearest(points, centroids, codes, distances):
    """The float64 distance to the chosen centroid is the least, up to 1e-5 of it."""
    assert codes.dtype == torch.int32 and distances.dtype == torch.float32
    with qnk.backend("reference"):
        _, least = torch.ops.qnkernels.kmeans_assign(points, centroids)
    chosen = ((points.double() - centroids.double()[codes.long()]) ** 2).sum(1)
    assert (chosen <= least.double() * (1 + 1e-5)).all()
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-5, atol=1e-30)


def assign(device, backend, points, centroids):
    with qnk.backend(backend):
        found = torch.ops.qnkernels.kmeans_assign(points.to(device), centroids.to(device))
    return [one.cpu() for one in found]


@pytest.mark.of("kmeans_assign")
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(("n", "d", "n_clusters"), SIZES)
def test_kmeans_assign(device, backend, n, d, n_clusters, offset):
    points, centroids, _ = case(n, d, n_clusters, offset)
    assert_nearest(points, centroids, *assign(device, backend, points, centroids))


@pytest.mark.of("kmeans_assign")
@pytest.mark.needs_cuda
@pytest.mark.parametrize(("n", "d", "n_clusters"), LARGE)
def test_kmeans_assign_of_many(device, backend, n, d, n_clusters):
    points, centroids, _ = case(n, d, n_clusters)
    assert_nearest(points, centroids, *assign(device, backend, points, centroids))


@pytest.mark.of("kmeans_assign")
def test_kmeans_assign_takes_the_lowest_index_among_equals(device, backend):
    centroids = torch.tensor([[5.0, 5.0], [1.0, 2.0], [1.0, 2.0], [5.0, 5.0]])
    points = torch.tensor([[1.0, 2.0], [5.0, 5.0], [1.5, 2.0], [3.0, 3.5]])
    codes, distances = assign(device, backend, points, centroids)
    assert codes.tolist() == [1, 0, 1, 0] and distances.tolist() == [0.0, 0.0, 0.25, 6.25]


def assert_update_equals_reference(device, backend, n, d, n_clusters):
    points, _, weights = case(n, d, n_clusters, offset=0.3)
    codes = torch.randint(0, n_clusters, (n,), dtype=torch.int32)
    for given in (None, weights):
        arguments = (n_clusters, 38, 30)
        with qnk.backend("reference"):
            expected = torch.ops.qnkernels.kmeans_update(points, codes, *arguments, given)
        on_device = None if given is None else given.to(device)
        with qnk.backend(backend):
            actual = torch.ops.qnkernels.kmeans_update(
                points.to(device), codes.to(device), *arguments, on_device
            )
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == torch.int64 and torch.equal(one.cpu(), other)


@pytest.mark.of("kmeans_update")
@pytest.mark.parametrize(("n", "d", "n_clusters"), SIZES)
def test_kmeans_update(device, backend, n, d, n_clusters):
    assert_update_equals_reference(device, backend, n, d, n_clusters)


@pytest.mark.of("kmeans_update")
@pytest.mark.needs_cuda
@pytest.mark.parametrize(("n", "d", "n_clusters"), LARGE)
def test_kmeans_update_of_many(device, backend, n, d, n_clusters):
    assert_update_equals_reference(device, backend, n, d, n_clusters)


@pytest.mark.of("kmeans_step")
@pytest.mark.parametrize(("n", "d", "n_clusters"), SIZES)
def test_kmeans_step(device, backend, n, d, n_clusters):
    """Its sums are those of its own codes; the objective is the float64 one to 1e-5."""
    points, centroids, weights = case(n, d, n_clusters)
    exponents = (38, 30, 35)
    with qnk.backend(backend):
        moved = (one.to(device) for one in (points, centroids))
        found = torch.ops.qnkernels.kmeans_step(*moved, *exponents, weights.to(device))
    codes, sums, mass, objective = (one.cpu() for one in found)
    with qnk.backend("reference"):
        expected = torch.ops.qnkernels.kmeans_update(points, codes, n_clusters, 38, 30, weights)
        _, least = torch.ops.qnkernels.kmeans_assign(points, centroids)
    assert torch.equal(sums, expected[0]) and torch.equal(mass, expected[1])
    exact = (least.double() * weights.double()).sum()
    torch.testing.assert_close(objective.double() * 2.0**-35, exact, rtol=1e-5, atol=1e-8)


@pytest.mark.of("kmeans_step")
def test_kmeans_repeats_itself_and_agrees_with_the_cpu(device, backend):
    generator = torch.Generator().manual_seed(4)
    points = torch.randn(5, 3, generator=generator).repeat_interleave(60, 0) * 4
    points += torch.randn(points.shape, generator=generator)
    with qnk.backend("reference"):
        expected = qnk.kmeans(points, 6, n_iter=4, seed=1)
    with qnk.backend(backend):
        first, again = (qnk.kmeans(points.to(device), 6, n_iter=4, seed=1) for _ in range(2))
    assert torch.equal(first.centroids, again.centroids) and first.objective == again.objective
    assert torch.equal(first.codes.cpu(), expected.codes)
    torch.testing.assert_close(first.centroids.cpu(), expected.centroids, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(first.objective), torch.tensor(expected.objective), rtol=1e-5, atol=0
    )


@pytest.mark.of("kmeans_step")
@pytest.mark.needs_cuda
@pytest.mark.large
def test_kmeans_step_of_more_than_2_31_coordinates(device, backend):
    n, d = 2**25 + 77, 64
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 5 * n * d:
        pytest.skip("needs 11 GiB of free GPU memory, and a kernel")
    points = torch.randint(-3, 4, (n, d), device=device, dtype=torch.int8).float()
    centroids = torch.full((2, d), -9.0, device=device)
    centroids[1] = 0.0
    with qnk.backend(backend):
        codes, sums, mass, _ = torch.ops.qnkernels.kmeans_step(points, centroids, 4, 0, 0)
    assert bool((codes == 1).all()) and mass.tolist() == [0, n] and not sums[0].any()
    assert torch.equal(sums[1], 16 * points.sum(0, dtype=torch.float64).long())


@pytest.mark.of("kmeans_step")
def test_kmeans_step_of_no_points(device, backend):
    points, centroids = torch.empty(0, 3, device=device), torch.randn(4, 3, device=device)
    with qnk.backend(backend):
        codes, sums, mass, objective = torch.ops.qnkernels.kmeans_step(points, centroids, 10, 0, 10)
    assert codes.shape == (0,) and not sums.any() and not mass.any() and int(objective) == 0


@pytest.mark.of("kmeans_bounded_step_")
def test_kmeans_bounded_step_is_a_step(device, backend):
    """In place of what the step before left, bit for bit, and no bound is kept."""
    points, centroids, weights = (one.to(device) for one in case(1500, 8, 16))
    exponents, like = (38, 30, 35), {"device": device}
    codes, bounds = torch.full((1500,), -1, dtype=torch.int32, **like), torch.ones(1500, 16, **like)
    sums, mass = (torch.ones(shape, dtype=torch.int64, **like) for shape in ((16, 8), (16,)))
    kept = (codes, bounds.to(torch.uint16), sums, mass)
    groups = (torch.arange(16, dtype=torch.int32, **like), torch.zeros(16, **like), 0.1)
    with qnk.backend(backend):
        total, looks = torch.ops.qnkernels.kmeans_bounded_step_(
            points, centroids, *groups, *exponents, *kept, weights
        )
        expected = torch.ops.qnkernels.kmeans_step(points, centroids, *exponents, weights)
    found = (kept[0], *kept[2:], total)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert int(looks) == 1500 * 16 and not kept[1].to(torch.int32).any()
