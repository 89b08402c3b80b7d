"""qnk.kmeans: parity, determinism, refilled clusters, weights, distribution, errors."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import helpers_kmeans
import numpy as np
import pytest
import torch
from numeric import DTYPES, assert_identical

import qnkernels as qnk


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def squared_error(points, result, weights=None, importance=None) -> float:
    """The (weighted) sum of squared distances to the centroids, in float64."""
    terms = (points.double() - result.centroids.double()[result.codes.long()]) ** 2
    if importance is not None:
        terms = terms * importance.double()
    return float((terms.sum(1) if weights is None else terms.sum(1) * weights.double()).sum())


def assert_same(one, two) -> None:
    assert_identical(one.centroids, two.centroids)
    assert_identical(one.codes, two.codes)
    assert one.objective == two.objective


@pytest.fixture
def threads():
    """A function that sets the number of threads; the number of before is set at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("d", [8, 4])
def test_parity_with_the_original_implementation(d):
    """From the same start: objective of every iteration, and the codes and centroids at the end."""
    file = np.load(Path(__file__).parent / "data" / "fairseq_product.npz")
    golden = {key: torch.from_numpy(file[key]) for key in file}
    points = golden["weight"].reshape(128, -1, d).transpose(0, 1).reshape(-1, d)
    start, objective = golden[f"pq{d}_start_centroids"], golden[f"pq{d}_objective"]
    result = qnk.kmeans(points, len(start), len(objective), init=start)
    assert result.objective == pytest.approx(objective.tolist(), rel=1e-4)
    assert_identical(result.codes.to(torch.uint8), golden[f"pq{d}_assignments"])
    torch.testing.assert_close(result.centroids, golden[f"pq{d}_centroids"], rtol=0, atol=1e-6)
    decoded = result.centroids[result.codes.long()].reshape(-1, 128, d).transpose(0, 1).reshape(128, 96)
    torch.testing.assert_close(decoded, golden[f"pq{d}_decoded"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize(
    ("n", "d", "K"), [(1, 1, 1), (50, 1, 2), (501, 3, 17), (2003, 16, 300), (700, 64, 5)]
)
def test_result_is_consistent(init, n, d, K):
    points = torch.randn(n, d, generator=seeded(n))
    result = qnk.kmeans(points, K, 9, init)
    assert result.centroids.shape == (K, d) and result.centroids.dtype == torch.float32
    assert result.codes.shape == (n,) and result.codes.dtype == torch.int32
    assert int(result.codes.min()) >= 0 and int(result.codes.max()) < K
    assert result.objective[-1] == pytest.approx(math.sqrt(squared_error(points, result)), rel=1e-5)
    for before, after in zip(result.objective, result.objective[1:], strict=False):
        assert after <= before * (1 + 1e-6)
    for k in result.codes.unique().tolist():
        mean = points[result.codes == k].double().mean(0)
        torch.testing.assert_close(result.centroids[k].double(), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_lloyd_in_float64(offset):
    """Weights and importance against the plain algorithm: all centroids, codes, every objective."""
    points = torch.randn(800, 6, generator=seeded(1)) + offset
    weights = torch.rand(800, generator=seeded(2)) * 3
    weights[::11] = 0
    importance = torch.tensor([0.0, 0.1, 1.0, 2.0, 30.0, 0.5])
    start = points[:12].clone()
    # importance scales the points in fp32, which far from the origin moves them by more than the rest rounds
    scales = (None, importance) if offset == 0 else (None,)
    for w, h in itertools.product((None, weights), scales):
        result = qnk.kmeans(points, 12, 6, start, weights=w, importance=h)
        mass = np.ones(800) if w is None else w.double().numpy()
        scale = np.ones(6) if h is None else h.double().numpy()
        x, centroids, objective = points.double().numpy(), start.double().numpy(), []
        for _ in range(6):
            codes = (((x[:, None] - centroids) ** 2) * scale).sum(2).argmin(1)
            for k in range(12):
                centroids[k] = np.average(x[codes == k], axis=0, weights=mass[codes == k])
            objective.append(math.sqrt((mass[:, None] * scale * (x - centroids[codes]) ** 2).sum()))
        assert result.objective == pytest.approx(objective, rel=1e-4)
        assert (result.codes.numpy() == codes).all()
        np.testing.assert_allclose(result.centroids.numpy(), centroids, rtol=1e-6, atol=2e-6)


def test_weights_count_as_repetitions_and_their_unit_does_not_matter():
    points = torch.randn(300, 4, generator=seeded(4))
    times = torch.randint(0, 4, (300,), generator=seeded(5))
    weighted = qnk.kmeans(points, 10, 8, points[:10], weights=times.float())
    repeated = qnk.kmeans(points.repeat_interleave(times, 0), 10, 8, points[:10])
    torch.testing.assert_close(weighted.centroids, repeated.centroids, rtol=1e-6, atol=1e-6)
    assert_identical(weighted.codes.repeat_interleave(times), repeated.codes)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-6)
    for unit in (2.0**-80, 2.0**80):
        scaled = qnk.kmeans(points, 10, 8, points[:10], weights=times * unit)
        assert_identical(scaled.centroids, weighted.centroids)
        assert scaled.objective == pytest.approx([v * unit**0.5 for v in weighted.objective], rel=1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_the_unit_of_points_does_not_matter(scale):
    points = torch.randn(500, 8, generator=seeded(6))
    plain, scaled = qnk.kmeans(points, 20, 5), qnk.kmeans(points * scale, 20, 5)
    assert_identical(scaled.codes, plain.codes)
    torch.testing.assert_close(scaled.centroids / scale, plain.centroids, rtol=1e-5, atol=1e-6)
    assert scaled.objective == pytest.approx([value * scale for value in plain.objective], rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_and_memory_of_points(dtype):
    points = torch.randn(5, 400, generator=seeded(7)).to(dtype).t()
    assert_same(qnk.kmeans(points, 9, 4), qnk.kmeans(points.float().contiguous(), 9, 4))


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_a_seed_gives_one_result_and_another_seed_another(init):
    points = torch.randn(3000, 4, generator=seeded(8))
    torch.manual_seed(1)
    first = qnk.kmeans(points, 50, 5, init, seed=3)
    torch.manual_seed(2)
    assert_same(first, qnk.kmeans(points, 50, 5, init, seed=3))
    other = qnk.kmeans(points, 50, 5, init, seed=4)
    assert not torch.equal(first.centroids, other.centroids)


def test_no_result_depends_on_the_number_of_threads(threads):
    """Also not where clusters are refilled, nor with so many centroids that torch splits a sum of them."""
    points, weights = torch.randn(40_000, 8, generator=seeded(9)), torch.rand(40_000, generator=seeded(10))
    far = torch.cat((points[:3], torch.full((60, 8), 50.0)))
    calls = (
        (points, 64, {"n_iter": 3}),
        (points, 16, {"n_iter": 3, "init": "k-means++", "weights": weights}),
        (points, 63, {"n_iter": 4, "init": far}),
        (points[:9000], 4500, {"n_iter": 2, "weights": weights[:9000]}),
        (points, 16, {"n_iter": 2, "importance": torch.arange(8.0)}),
    )
    for given, count, options in calls:
        results = []
        for number in (1, 2):
            threads(number)
            results.append(qnk.kmeans(given, count, **options))
        assert_same(*results)


def test_two_processes_give_the_bits_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(qnk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, helpers_kmeans.__file__, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for one, two in zip(helpers_kmeans.results(), shared, strict=True):
            assert_same(qnk.KMeansResult(*one), qnk.KMeansResult(*two))


@pytest.mark.parametrize("distance", [10.0, 1e3, 1e6])
def test_empty_clusters_are_refilled(distance):
    """All centroids but one start where no point is: the populated cluster is split until all are used."""
    points = torch.randn(600, 5, generator=seeded(11))
    start = torch.cat((points[:1], torch.full((31, 5), distance)))
    result = qnk.kmeans(points, 32, 25, start)
    assert len(result.objective) == 25
    assert torch.bincount(result.codes, minlength=32).min() > 0
    assert result.objective[-1] == pytest.approx(math.sqrt(squared_error(points, result)), rel=1e-5)
    assert result.objective[-1] < 1.1 * qnk.kmeans(points, 32, 25).objective[-1]


@pytest.mark.parametrize("distance", [1e3, 1e5, 1e8])
def test_a_start_far_from_all_points(distance):
    """The first objective is still that of the means, and the search goes on."""
    points = torch.randn(600, 5, generator=seeded(12))
    start = torch.randn(20, 5, generator=seeded(13)) + distance
    result = qnk.kmeans(points, 20, 15, start)
    assert len(result.objective) == 15
    assert result.objective[-1] < 1.1 * qnk.kmeans(points, 20, 15).objective[-1]
    first = qnk.kmeans(points, 20, 1, start)
    assert first.objective == result.objective[:1]
    occupied = torch.bincount(first.codes, minlength=20) > 0
    means = torch.zeros(20, 5, dtype=torch.float64)
    for k in occupied.nonzero()[:, 0].tolist():
        means[k] = points[first.codes == k].double().mean(0)
    exact = (points.double() - means[first.codes.long()]).square().sum().sqrt().item()
    assert first.objective[0] == pytest.approx(exact, rel=1e-4)


def test_fewer_different_points_than_clusters():
    values = torch.randn(5, 3, generator=seeded(14))
    points = values[torch.randint(5, (400,), generator=seeded(15))]
    for init in ("random", "k-means++"):
        result = qnk.kmeans(points, 16, 20, init)
        assert result.objective[-1] == pytest.approx(0, abs=1e-5)
        torch.testing.assert_close(result.centroids[result.codes.long()], points)
    one = qnk.kmeans(torch.full((100, 3), 7.5), 4, 5)
    assert one.objective[-1] == 0 and (one.centroids[one.codes.long()] == 7.5).all()


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_as_many_clusters_as_points(init):
    points = torch.randn(120, 4, generator=seeded(16))
    result = qnk.kmeans(points, 120, 20, init)
    assert result.objective == [0.0]
    assert_identical(result.centroids[result.codes.long()], points)
    assert result.codes.unique().numel() == 120


def test_plus_plus_finds_clusters_far_apart_and_ignores_points_without_weight():
    centers = 100 * torch.eye(8)
    points = centers.repeat(50, 1) + 1e-3 * torch.randn(400, 8, generator=seeded(17))
    for seed in range(5):
        result = qnk.kmeans(points, 8, 1, "k-means++", seed)
        assert result.codes[:8].unique().numel() == 8
    weights = torch.ones(400)
    weights[7::8] = 0
    for seed in range(5):
        result = qnk.kmeans(points, 7, 1, "k-means++", seed, weights)
        assert result.codes[:7].unique().numel() == 7
        assert result.objective[0] < 1


def test_tolerance_stops_early():
    points = torch.randn(2000, 2, generator=seeded(18))
    full = qnk.kmeans(points, 8, 60)
    assert len(full.objective) == 60
    for tolerance in (1e-2, 1e-3):
        early = qnk.kmeans(points, 8, 60, tolerance=tolerance)
        count = len(early.objective)
        assert 2 <= count < 60 and early.objective == full.objective[:count]
        falls = [(a - b) / b for a, b in zip(early.objective, early.objective[1:], strict=False)]
        assert falls[-1] <= tolerance and all(fall > tolerance for fall in falls[:-1])


def test_progress_is_told_after_every_iteration():
    told = []
    points = torch.randn(100, 3, generator=seeded(19))
    result = qnk.kmeans(points, 5, 6, progress=lambda iteration, value: told.append((iteration, value)))
    assert told == list(enumerate(result.objective, 1))


def test_inputs_are_left_alone():
    points = torch.randn(100, 3, generator=seeded(20), requires_grad=True)
    start, weights = points.detach()[:5].clone(), torch.rand(100)
    before = [tensor.detach().clone() for tensor in (points, start, weights)]
    result = qnk.kmeans(points, 5, 3, start, weights=weights, importance=torch.ones(3))
    for tensor, copy in zip((points.detach(), start, weights), before, strict=True):
        assert_identical(tensor, copy)
    assert not result.centroids.requires_grad


MEMORY = """
import torch, qnkernels as qnk
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))
points = torch.randn(200_000, 2)
qnk.kmeans(points[:5000], 16, 1)
before = peak()
qnk.kmeans(points, 4096, 1)
print(peak() - before)
"""


def test_memory_does_not_grow_with_points_times_clusters():
    """200,000 points and 4,096 clusters: a byte per pair would be 781 MiB; n and K d are 5 MiB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(qnk.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 150


P = torch.randn(20, 3, generator=seeded(0))


def poisoned(value: float) -> torch.Tensor:
    points = P.clone()
    points[3, 1] = points[7, 2] = value
    return points


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: qnk.kmeans(poisoned(math.nan), 4), ValueError, ("points", "finite", "2 that are NaN")),
        (lambda: qnk.kmeans(poisoned(math.inf), 4), ValueError, ("points", "finite", "2 that are")),
        (lambda: qnk.kmeans(poisoned(-math.inf), 4), ValueError, ("points", "finite", "2 that are")),
        (lambda: qnk.kmeans(P, 21), ValueError, ("points", "21 clusters", "got 20")),
        (lambda: qnk.kmeans(P[:0], 1), ValueError, ("points", "1 clusters", "got 0")),
        (lambda: qnk.kmeans(P[0], 1), ValueError, ("points", "[n, d]", "(3,)")),
        (lambda: qnk.kmeans(torch.ones(9, 65), 1), ValueError, ("points", "64", "(9, 65)")),
        (lambda: qnk.kmeans(P.long(), 1), TypeError, ("points", "float32", "int64")),
        (lambda: qnk.kmeans(P, 0), ValueError, ("n_clusters", "at least 1", "0")),
        (lambda: qnk.kmeans(P, 2.0), ValueError, ("n_clusters", "integer", "2.0")),
        (lambda: qnk.kmeans(torch.ones(70_000, 1), 65_537), ValueError, ("n_clusters", "65536", "65537")),
        (lambda: qnk.kmeans(P, 4, 0), ValueError, ("n_iter", "at least 1", "0")),
        (lambda: qnk.kmeans(P, 4, True), ValueError, ("n_iter", "integer", "True")),
        (lambda: qnk.kmeans(P, 4, init="best"), ValueError, ("init", "k-means++", "'best'")),
        (lambda: qnk.kmeans(P, 4, init=P[:5]), ValueError, ("init", "(4, 3)", "(5, 3)")),
        (lambda: qnk.kmeans(P, 20, init=poisoned(math.nan)), ValueError, ("init", "finite", "NaN")),
        (lambda: qnk.kmeans(P, 4, weights=P), ValueError, ("weights", "(20,)", "(20, 3)")),
        (lambda: qnk.kmeans(P, 4, weights=[1.0] * 20), ValueError, ("weights", "tensor", "1.0")),
        (lambda: qnk.kmeans(P, 4, weights=-torch.ones(20)), ValueError, ("weights", "at least 0", "-1")),
        (lambda: qnk.kmeans(P, 4, weights=torch.zeros(20)), ValueError, ("weights", "not all 0", "0")),
        (
            lambda: qnk.kmeans(P, 4, weights=poisoned(math.nan)[:, 1]),
            ValueError,
            ("weights", "finite", "nan"),
        ),
        (lambda: qnk.kmeans(P, 4, importance=torch.ones(2)), ValueError, ("importance", "(3,)", "(2,)")),
        (lambda: qnk.kmeans(P, 4, importance=-torch.ones(3)), ValueError, ("importance", "at least 0", "-1")),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


def test_points_whose_squares_overflow_are_refused():
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    points[7, 2] = 1e18
    with pytest.raises(ValueError, match=r"points: expected magnitudes up to 1e\+17.*got 1e\+18"):
        qnk.kmeans(points, 5)
