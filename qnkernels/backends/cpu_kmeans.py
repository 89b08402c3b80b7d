"""Bindings of the C++ kernels of k-means."""

import torch

from .native import pointer, raise_for_status


class KMeansKernels:
    """Part of CpuKernels, whose functions it calls."""

    def kmeans_assign(self, points, centroids):
        n, d = points.shape
        codes, distances = torch.empty(n, dtype=torch.int32), torch.empty(n)
        arguments = (points.data_ptr(), n, d, centroids.data_ptr(), len(centroids))
        raise_for_status(self._c["kmeans_assign"](*arguments, codes.data_ptr(), distances.data_ptr()))
        return codes, distances

    def kmeans_update(self, points, codes, n_clusters, exponent, weight_exponent, weights):
        n, d = points.shape
        sums = torch.empty(n_clusters, d, dtype=torch.int64)
        mass = torch.empty(n_clusters, dtype=torch.int64)
        arguments = (points.data_ptr(), codes.data_ptr(), pointer(weights), n, d, n_clusters)
        status = self._c["kmeans_update"](
            *arguments, exponent, weight_exponent, sums.data_ptr(), mass.data_ptr()
        )
        raise_for_status(status)
        return sums, mass

    def kmeans_step(self, points, centroids, exponent, weight_exponent, objective_exponent, weights):
        (n, d), k = points.shape, len(centroids)
        codes = torch.empty(n, dtype=torch.int32)
        sums, mass = torch.empty(k, d, dtype=torch.int64), torch.empty(k, dtype=torch.int64)
        objective = torch.empty((), dtype=torch.int64)
        status = self._c["kmeans_step"](
            *(points.data_ptr(), pointer(weights), n, d, centroids.data_ptr(), k),
            *(exponent, weight_exponent, objective_exponent),
            *(t.data_ptr() for t in (codes, sums, mass, objective)),
        )
        raise_for_status(status)
        return codes, sums, mass, objective

    def kmeans_bounded_step_(self, points, centroids, group_of, travelled, unit, *rest):
        *exponents, codes, bounds, sums, mass, weights = rest
        (n, d), k = points.shape, len(centroids)
        objective, looks = torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)
        status = self._c["kmeans_bounded_step"](
            *(points.data_ptr(), pointer(weights), n, d, centroids.data_ptr(), k),
            *(group_of.data_ptr(), len(travelled), travelled.data_ptr(), unit, *exponents),
            *(t.data_ptr() for t in (codes, bounds, sums, mass, objective, looks)),
        )
        raise_for_status(status)
        return objective, looks
