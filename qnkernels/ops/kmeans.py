"""What a step of Lloyd's k-means is made of: kmeans_assign and kmeans_update, or both as kmeans_step; and
kmeans_bounded_step_, which goes on from the step before.
"""

import math

import torch

from ..backends import select
from . import checks
from .library import op

MAX_DIMENSION, MAX_CLUSTERS = 64, 1 << 16
GROUPS = (16, 32, 48, 64)  # of centroids, that bounds may be kept for


def _check_points(points) -> None:
    checks.check_dtype("points", points, torch.float32)
    if points.dim() != 2 or not 1 <= points.shape[1] <= MAX_DIMENSION:
        checks.fail("points", f"shape [n, d] with d from 1 to {MAX_DIMENSION}", tuple(points.shape))


def _check_centroids(points, centroids) -> None:
    checks.check_dtype("centroids", centroids, torch.float32)
    checks.check_same_device("centroids", centroids, points.device)
    expected = f"shape [K, {points.shape[1]}] with K from 1 to {MAX_CLUSTERS}"
    if centroids.dim() != 2 or centroids.shape[1] != points.shape[1]:
        checks.fail("centroids", expected, tuple(centroids.shape))
    if not 1 <= centroids.shape[0] <= MAX_CLUSTERS:
        checks.fail("centroids", expected, tuple(centroids.shape))


def _check_per_point(argument, value, points, dtype) -> None:
    if value is None:
        return
    checks.check_dtype(argument, value, dtype)
    checks.check_same_device(argument, value, points.device)
    if tuple(value.shape) != (len(points),):
        checks.fail(argument, f"shape ({len(points)},)", tuple(value.shape))


def _check_assign(points, centroids) -> None:
    _check_points(points)
    _check_centroids(points, centroids)


def _fake_assign(points, centroids):
    _check_assign(points, centroids)
    return points.new_empty(len(points), dtype=torch.int32), points.new_empty(len(points))


@op("kmeans_assign(Tensor points, Tensor centroids) -> (Tensor, Tensor)", _fake_assign)
def kmeans_assign(points, centroids):
    _check_assign(points, centroids)
    return select("kmeans_assign", points.device.type)(points.contiguous(), centroids.contiguous())


def _check_update(points, codes, n_clusters, weights) -> None:
    _check_points(points)
    if not 1 <= n_clusters <= MAX_CLUSTERS:
        checks.fail("n_clusters", f"an integer from 1 to {MAX_CLUSTERS}", n_clusters)
    _check_per_point("codes", codes, points, torch.int32)
    _check_per_point("weights", weights, points, torch.float32)


def _sums(points, n_clusters):
    shape = (n_clusters, points.shape[1])
    return points.new_empty(shape, dtype=torch.int64), points.new_empty(n_clusters, dtype=torch.int64)


def _fake_update(points, codes, n_clusters, exponent, weight_exponent=0, weights=None):
    _check_update(points, codes, n_clusters, weights)
    return _sums(points, n_clusters)


@op(
    "kmeans_update(Tensor points, Tensor codes, int n_clusters, int exponent, int weight_exponent=0, "
    "Tensor? weights=None) -> (Tensor, Tensor)",
    _fake_update,
)
def kmeans_update(points, codes, n_clusters, exponent, weight_exponent=0, weights=None):
    """Codes outside [0, n_clusters) raise IndexError on the CPU; on a GPU they are left out."""
    _check_update(points, codes, n_clusters, weights)
    kernel = select("kmeans_update", points.device.type)
    weights = None if weights is None else weights.contiguous()
    return kernel(points.contiguous(), codes.contiguous(), n_clusters, exponent, weight_exponent, weights)


def _check_step(points, centroids, weights) -> None:
    _check_assign(points, centroids)
    _check_per_point("weights", weights, points, torch.float32)


def _fake_step(points, centroids, exponent, weight_exponent, objective_exponent, weights=None):
    _check_step(points, centroids, weights)
    objective = points.new_empty((), dtype=torch.int64)
    return points.new_empty(len(points), dtype=torch.int32), *_sums(points, len(centroids)), objective


@op(
    "kmeans_step(Tensor points, Tensor centroids, int exponent, int weight_exponent, int objective_exponent, "
    "Tensor? weights=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_step,
)
def kmeans_step(points, centroids, exponent, weight_exponent, objective_exponent, weights=None):
    _check_step(points, centroids, weights)
    kernel = select("kmeans_step", points.device.type)
    exponents = (exponent, weight_exponent, objective_exponent)
    weights = None if weights is None else weights.contiguous()
    return kernel(points.contiguous(), centroids.contiguous(), *exponents, weights)


def _check_kept(name, value, dtype, shape, device) -> None:
    checks.check_dtype(name, value, dtype)
    checks.check_same_device(name, value, device)
    if tuple(value.shape) != shape or not value.is_contiguous():
        checks.fail(name, f"a contiguous tensor of shape {shape}", (tuple(value.shape), value.stride()))


def _check_bounded(points, centroids, group_of, travelled, unit, codes, bounds, sums, mass, weights) -> None:
    _check_step(points, centroids, weights)
    (n, d), (k, _) = points.shape, centroids.shape
    checks.check_dtype("travelled", travelled, torch.float32)
    if travelled.dim() != 1 or len(travelled) not in GROUPS:
        checks.fail("travelled", f"one value for each of {GROUPS} groups", tuple(travelled.shape))
    if not 0.0 < unit < math.inf:
        checks.fail("unit", "a positive number", unit)
    kept = (
        ("group_of", group_of, torch.int32, (k,)),
        ("travelled", travelled, torch.float32, (len(travelled),)),
        ("codes", codes, torch.int32, (n,)),
        ("bounds", bounds, torch.uint16, (n, len(travelled))),
        ("sums", sums, torch.int64, (k, d)),
        ("mass", mass, torch.int64, (k,)),
    )
    for name, value, dtype, shape in kept:
        _check_kept(name, value, dtype, shape, points.device)


def _fake_bounded(
    points,
    centroids,
    group_of,
    travelled,
    unit,
    exponent,
    weight_exponent,
    objective_exponent,
    codes,
    bounds,
    sums,
    mass,
    weights=None,
):
    _check_bounded(points, centroids, group_of, travelled, unit, codes, bounds, sums, mass, weights)
    return points.new_empty((), dtype=torch.int64), points.new_empty((), dtype=torch.int64)


@op(
    "kmeans_bounded_step_(Tensor points, Tensor centroids, Tensor group_of, Tensor travelled, float unit, "
    "int exponent, int weight_exponent, int objective_exponent, Tensor(a!) codes, Tensor(b!) bounds, "
    "Tensor(c!) sums, Tensor(d!) mass, Tensor? weights=None) -> (Tensor, Tensor)",
    _fake_bounded,
)
def kmeans_bounded_step_(
    points,
    centroids,
    group_of,
    travelled,
    unit,
    exponent,
    weight_exponent,
    objective_exponent,
    codes,
    bounds,
    sums,
    mass,
    weights=None,
):
    """A kmeans_step from the codes, sums and masses of these finite points with other centroids, which become
    those with these; with lower bounds of distances that spare most of it. Returns the objective and how many
    pairs of a point and a group were looked at, int64 0-d.

    group_of: int32 [K], the group of each centroid. bounds: uint16 [n, groups], 0 or as left by a call with
    the same groups and unit. travelled: fp32 [groups], sum over the steps since bounds were 0 of what the
    farthest moving centroid of each group moved. unit: of distances; 65,536 of them are the most that is
    told apart. Codes, groups outside their range raise IndexError.
    """
    _check_bounded(points, centroids, group_of, travelled, unit, codes, bounds, sums, mass, weights)
    kernel = select("kmeans_bounded_step_", points.device.type)
    weights = None if weights is None else weights.contiguous()
    exponents = (exponent, weight_exponent, objective_exponent)
    return kernel(
        *(points.contiguous(), centroids.contiguous(), group_of, travelled, unit, *exponents),
        *(codes, bounds, sums, mass, weights),
    )
