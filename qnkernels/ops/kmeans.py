"""kmeans_assign, kmeans_update and kmeans_step: what a step of Lloyd's k-means is made of."""

import torch

from ..backends import select
from . import checks
from .library import op

MAX_DIMENSION, MAX_CLUSTERS = 64, 1 << 16


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
