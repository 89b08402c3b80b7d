"""The CUDA kernels of k-means in the emulator: assignments by fp32 distances, and sums, bit for bit."""

import contextlib

import pytest
import torch
from helpers_emulator import _kernels as kernels_of
from helpers_emulator import alignment, emulated, launches, processors, shared_memory
from numeric import assert_identical
from pairs import covering, name

from qnkernels.backends import kernels

# rows of a warp and one past them, and of several; dimensions of every padded width
SIZES = {
    "n": (1, 2, 31, 64, 65, 257),
    "d": (1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64),
    "K": (1, 2, 3, 8, 9, 16, 255, 256, 257, 1024, 4096),
    "kind": ("plain", "offset", "spread", "lattice", "near"),
}


def possible(n, d, K, **rest) -> bool:
    """Products that the emulator takes about half a second for."""
    return max(n, 64) * max(d, 8) * K <= 1_100_000 or (n <= 64 and d <= 8)


def draw(n, d, K, kind, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and centroids. offset: all about 1000 from the origin. spread: clusters of radius 1e-4 to 1e2.
    lattice: small integers, so that many distances are equal. near: points on centroids and beside them.
    """
    if kind == "lattice":
        return tuple(torch.randint(-2, 3, (size, d), generator=generator).float() for size in (n, K))
    points, centroids = (torch.randn(size, d, generator=generator) for size in (n, K))
    if kind == "offset":
        return points + 1000, centroids + 1000
    if kind == "near":
        owner = torch.randint(K, (n,), generator=generator)
        away = torch.tensor([0.0, 1e-6, 1e-3])[torch.arange(n) % 3, None]
        return centroids[owner] + away * points, centroids
    if kind == "spread":
        centers = 100 * torch.randn(5, d, generator=generator)
        radius = 10.0 ** torch.linspace(-4, 2, 5)[:, None]
        for values in (points, centroids):
            cluster = torch.randint(5, (len(values),), generator=generator)
            values.mul_(radius[cluster]).add_(centers[cluster])
    return points, centroids


def nearest(points, centroids) -> tuple[torch.Tensor, torch.Tensor]:
    """codes, distances of sum_j (x_j - c_j)^2 in fp32, each term added by one rounding; the lowest of equals.

    0 and infinity where no distance is below infinity.
    """
    codes, distances = [], []
    for rows in points.split(max(1, (1 << 21) // len(centroids))):
        squared = torch.zeros(len(rows), len(centroids))
        for j in range(points.shape[1]):
            difference = (rows[:, j, None] - centroids[:, j]).double()
            squared = (difference * difference + squared.double()).float()
        squared.nan_to_num_(nan=float("inf"), posinf=float("inf"))
        least = squared.min(1).values
        codes.append((squared == least[:, None]).int().argmax(1).int())
        distances.append(least)
    return torch.cat(codes), torch.cat(distances)


def assign(points, centroids):
    return emulated("kmeans")["kmeans_assign"](points, centroids)


def check_assign(points, centroids) -> torch.Tensor:
    codes, distances = assign(points, centroids)
    expected = nearest(points, centroids)
    assert_identical(codes, expected[0])
    assert_identical(distances, expected[1])
    return codes


def check_step(points, centroids, codes, weights, exponents=(38, 30, 20)) -> None:
    """Its sums are the reference's of these codes; the objective that of the distances in fp32."""
    actual = emulated("kmeans")["kmeans_step"](points, centroids, *exponents, weights)
    expected = kernels("reference")["kmeans_update"](points, codes, len(centroids), *exponents[:2], weights)
    assert_identical(actual[0], codes)
    assert_identical(actual[1], expected[0])
    assert_identical(actual[2], expected[1])
    terms = nearest(points, centroids)[1]
    terms = terms if weights is None else terms * weights
    objective = torch.round(terms.double() * 2.0 ** exponents[2]).long().sum()
    assert_identical(actual[3], objective)


@pytest.mark.parametrize("case", list(covering(SIZES, possible)), ids=name)
def test_assignments_and_steps(case):
    n, d, K, kind = case.values()
    generator = torch.Generator().manual_seed(n * d + K)
    points, centroids = draw(n, d, K, kind, generator)
    codes = check_assign(points, centroids)
    weights = torch.rand(n, generator=generator) if (n + d + K) % 2 else None
    check_step(points, centroids, codes, weights)


def test_many_centroids_of_the_largest_dimension():
    points, centroids = draw(3, 64, 2050, "plain", torch.Generator().manual_seed(2))
    check_assign(points, centroids)


def test_as_many_centroids_as_there_may_be():
    points, centroids = draw(3, 2, 65_536, "plain", torch.Generator().manual_seed(3))
    points[1] = centroids[-1]
    assert check_assign(points, centroids).max() > 2**15


@pytest.mark.parametrize("d", SIZES["d"])
def test_the_lowest_index_wins_among_equals(d):
    """Every centroid comes three times: one after the other, and table after table."""
    points, centroids = draw(70, d, 37, "plain", torch.Generator().manual_seed(d))
    assert (check_assign(points, centroids.repeat_interleave(3, 0)) % 3 == 0).all()
    assert (check_assign(points, centroids.repeat(3, 1)) < 37).all()
    assert (check_assign(points, centroids[:1].repeat(70, 1)) == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-15, 1e-13, 1e-8, 1e8, 1e13, 1e15, 1e17, 1e25])
def test_assignments_at_other_magnitudes(scale):
    """Down to distances that are all 0, and up to those that are all infinite."""
    points, centroids = draw(70, 8, 100, "plain", torch.Generator().manual_seed(3))
    check_assign(points * scale, centroids * scale)


@pytest.mark.parametrize("reach", [1e-6, 1e2, 1e4, 1e6, 1e20, 1e38])
def test_points_far_from_small_codebooks(reach):
    """Up to halves, squares and differences that overflow."""
    for d in (3, 16):
        points, centroids = draw(70, d, 100, "plain", torch.Generator().manual_seed(d))
        check_assign(points * reach, centroids)
        check_assign(points, centroids * reach)


@pytest.mark.parametrize("where", ["points", "centroids"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value, where):
    points, centroids = draw(70, 5, 50, "plain", torch.Generator().manual_seed(4))
    (points if where == "points" else centroids)[7, 2] = value
    codes = check_assign(points, centroids)
    assert (codes >= 0).all() and (codes < 50).all()


@contextlib.contextmanager
def device(bytes_shared, count, bytes_aligned):
    with (
        shared_memory(bytes_shared, "kmeans"),
        processors(count, "kmeans"),
        alignment(bytes_aligned, "kmeans"),
    ):
        yield


def form_of_search(d: int, K: int) -> tuple[str, str]:
    """Where the last search had the codebook, and its sums. What they take of shared memory is all it had."""
    width = next(one for one in (8, 16, 32, 64) if d <= one)
    rows, search = 64 if width == 8 else 32, launches("kmeans")[-1]
    assert search.kernel.startswith(f"kmeans_search_kernel<{width}, ")
    scratch = search.threads // 32 * rows * (4 * (width + 4) + 12)
    whole, tiles = -(-K // 32) * 4 * (64 + 48 * width), 2 * (128 // width) * 4 * (64 + 16 * width)
    resident = search.kernel.endswith(" true>")
    sums = search.shared_bytes - scratch - (whole if resident else tiles)
    assert sums in (0, -(-8 * K * (d + 1) // 16) * 16)
    return "whole" if resident else "tiles", "table" if sums else "totals"


@pytest.mark.parametrize(
    ("n", "d", "K", "kilobytes", "large", "small"),
    [
        (1100, 8, 20, 36, ("whole", "table"), ("whole", "totals")),
        (130, 8, 1500, 48, ("whole", "totals"), ("tiles", "totals")),
        (600, 16, 32, 33, ("whole", "table"), ("whole", "totals")),
        (70, 16, 400, 40, ("whole", "totals"), ("tiles", "totals")),
        (70, 32, 200, 40, ("whole", "totals"), ("tiles", "totals")),
        (1552, 32, 97, 96, ("whole", "table"), ("tiles", "table")),
        (270, 33, 10, 58, ("whole", "table"), ("whole", "totals")),
        (544, 64, 34, 92, ("whole", "table"), ("tiles", "table")),
        (270, 64, 130, 99, ("whole", "totals"), ("tiles", "totals")),
    ],
)
def test_neither_memory_nor_multiprocessors_nor_alignment_change_a_bit(n, d, K, kilobytes, large, small):
    """The codebook whole and in tiles, sums in a table and not, one round of blocks and several."""
    generator = torch.Generator().manual_seed(d + K)
    points, centroids = draw(n, d, K, "near", generator)
    weights = torch.rand(len(points), generator=generator)
    results, forms = [], []
    for size, count, aligned in ((227, 3, 64), (kilobytes, 1, 64), (227, 1, 1)):
        with device(size * 1024, count, aligned):
            step = emulated("kmeans")["kmeans_step"](points, centroids, 38, 30, 20, weights)
            forms.append(form_of_search(d, K))
            update = emulated("kmeans")["kmeans_update"](points, step[0], K, 38, 30, weights)
        results.append((*step, *update))
    assert forms == [large, small, large]
    assert_identical(results[0][0], nearest(points, centroids)[0])
    for other in results[1:]:
        for one, first in zip(other, results[0], strict=True):
            assert_identical(one, first)


@pytest.mark.parametrize("kilobytes", [227, 99])
def test_sums_in_shared_memory_and_without(kilobytes):
    """From 16 points to a centroid on there is a table, where it fits beside the rest."""
    generator = torch.Generator().manual_seed(kilobytes)
    for d, K in ((8, 20), (33, 9), (64, 12)):
        points, centroids = draw(16 * K, d, K, "plain", generator)
        weights = torch.rand(16 * K, generator=generator)
        with shared_memory(kilobytes * 1024, "kmeans"):
            check_step(points, centroids, nearest(points, centroids)[0], weights)


@pytest.mark.parametrize(("d", "K"), [(1, 100), (4, 100), (8, 33), (17, 70), (64, 40)])
def test_the_codebook_that_is_searched(d, K):
    """What decides how many points need more than one group compared: the work memory starts with it."""
    generator = torch.Generator().manual_seed(d)
    points, centroids = draw(1, d, K, "offset", generator)
    ops = kernels_of("kmeans")
    work = torch.full((ops._c["kmeans_work_bytes"](d, K) // 4,), float("nan"))
    codes, distances = torch.empty(1, dtype=torch.int32), torch.empty(1)
    pointers = (t.data_ptr() for t in (work, codes, distances))
    ops._launch("kmeans_assign", points.device, points.data_ptr(), 1, d, centroids.data_ptr(), K, *pointers)
    shift, reach, scale, longest, error = work[:131].split((64, 64, 1, 1, 1))
    padded = -(-d // 8) * 8
    torch.testing.assert_close(shift[:d], centroids.mean(0))
    assert not shift[d:padded].any() and not reach[d:padded].any()
    assert_identical(reach[:d], (centroids - shift[:d]).abs().max(0).values)
    scaled = (centroids - shift[:d]) * scale
    assert 0.5 <= reach.nan_to_num().norm() * scale < 1
    torch.testing.assert_close(longest[0], scaled.norm(dim=1).max())
    torch.testing.assert_close(error[0], (scaled - scaled.half().float()).norm(dim=1).max())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "K"), [(1, 1, 1), (37, 3, 5), (700, 8, 16), (90, 9, 33), (150, 33, 5), (1100, 2, 7)]
)
def test_sums_equal_the_reference(n, d, K, weighted):
    generator = torch.Generator().manual_seed(n)
    points, weights = torch.randn(n, d, generator=generator), torch.rand(n, generator=generator) * 3
    codes = torch.randint(0, K, (n,), dtype=torch.int32, generator=generator)
    for exponent, weight_exponent in ((40, 30), (0, 3), (-2, 45), (50, 1)):
        arguments = (points, codes, K, exponent, weight_exponent, weights if weighted else None)
        results = [one["kmeans_update"](*arguments) for one in (emulated("kmeans"), kernels("reference"))]
        for actual, expected in zip(*results, strict=True):
            assert_identical(actual, expected)


@pytest.mark.parametrize("copies", [1, 40])
def test_ties_round_to_even_and_words_carry(copies):
    """Against Python's integers; with many copies in a table of two words per sum."""
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -1.0, 2.0**32 - 1, 2.0**31, -(2.0**31), 2.0**55, 3 * 2.0**30]
    points = torch.tensor(values * copies)[:, None]
    codes = torch.tensor([0] * len(values) * copies, dtype=torch.int32)
    for exponent in (-3, 0, 1, 2):
        sums, mass = emulated("kmeans")["kmeans_update"](points, codes, 2, exponent, 0, None)
        terms = [round(value * 2.0**exponent) for value in points[:, 0].tolist()]
        assert sums[:, 0].tolist() == [sum(terms), 0]
        assert mass.tolist() == [len(points), 0]


def test_codes_out_of_range_are_left_out():
    points = torch.ones(5, 2)
    codes = torch.tensor([0, -1, 3, 2, 2**31 - 1], dtype=torch.int32)
    for copies in (1, 40):
        sums, mass = emulated("kmeans")["kmeans_update"](
            points.repeat(copies, 1), codes.repeat(copies), 3, 4, 0, None
        )
        assert sums.tolist() == [[16 * copies] * 2, [0, 0], [16 * copies] * 2]
        assert mass.tolist() == [copies, 0, copies]


def test_no_points():
    points, centroids = torch.empty(0, 3), torch.randn(20, 3)
    ops = emulated("kmeans")
    for weights in (None, torch.empty(0)):
        codes, sums, mass, objective = ops["kmeans_step"](points, centroids, 10, 0, 10, weights)
        assert codes.shape == (0,) and not sums.any() and not mass.any() and objective == 0
        sums, mass = ops["kmeans_update"](points, codes, 20, 10, 0, weights)
        assert sums.shape == (20, 3) and not sums.any() and not mass.any()
    assert [one.shape for one in ops["kmeans_assign"](points, centroids)] == [(0,), (0,)]


@pytest.mark.parametrize("d", SIZES["d"])
def test_the_order_and_the_split_of_points_do_not_matter(d):
    generator = torch.Generator().manual_seed(d)
    points, centroids = draw(200, d, 12, "plain", generator)
    weights, order = torch.rand(200, generator=generator), torch.randperm(200, generator=generator)

    def step(index):
        return emulated("kmeans")["kmeans_step"](points[index], centroids, 38, 30, 20, weights[index])

    whole, shuffled = step(slice(None)), step(order)
    parts = [step(slice(77)), step(slice(77, None))]
    assert_identical(shuffled[0], whole[0][order])
    for i in (1, 2, 3):
        assert_identical(shuffled[i], whole[i])
        assert_identical(parts[0][i] + parts[1][i], whole[i])
