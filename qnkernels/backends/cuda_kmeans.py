"""Bindings of the CUDA C++ kernels of k-means."""

import torch

from .native import pointer


class KMeansKernels:
    """Part of CudaKernels, whose _launch and _query it uses."""

    def kmeans_assign(self, points, centroids):
        n, d = points.shape
        codes = torch.empty(n, dtype=torch.int32, device=points.device)
        distances = torch.empty(n, dtype=torch.float32, device=points.device)
        work = self._work(centroids)
        self._launch(
            *("kmeans_assign", points.device),
            *(points.data_ptr(), n, d, centroids.data_ptr(), len(centroids)),
            *(work.data_ptr(), codes.data_ptr(), distances.data_ptr()),
        )
        return codes, distances

    def kmeans_update(self, points, codes, n_clusters, exponent, weight_exponent, weights):
        """Codes out of range are left out."""
        n, d = points.shape
        sums = torch.empty(n_clusters, d, dtype=torch.int64, device=points.device)
        mass = torch.empty(n_clusters, dtype=torch.int64, device=points.device)
        self._launch(
            *("kmeans_update", points.device),
            *(points.data_ptr(), codes.data_ptr(), pointer(weights), n, d, n_clusters),
            *(exponent, weight_exponent, sums.data_ptr(), mass.data_ptr()),
        )
        return sums, mass

    def kmeans_step(self, points, centroids, exponent, weight_exponent, objective_exponent, weights):
        (n, d), k = points.shape, len(centroids)
        codes = torch.empty(n, dtype=torch.int32, device=points.device)
        sums = torch.empty(k, d, dtype=torch.int64, device=points.device)
        mass = torch.empty(k, dtype=torch.int64, device=points.device)
        objective = torch.empty((), dtype=torch.int64, device=points.device)
        work = self._work(centroids)
        self._launch(
            *("kmeans_step", points.device),
            *(points.data_ptr(), pointer(weights), n, d, centroids.data_ptr(), k),
            *(exponent, weight_exponent, objective_exponent),
            *(t.data_ptr() for t in (work, codes, sums, mass, objective)),
        )
        return codes, sums, mass, objective

    def _work(self, centroids):
        """Memory for the codebook as the kernels read it."""
        k, d = centroids.shape
        size = self._query("kmeans_work_bytes", centroids.device, d, k)
        return torch.empty(size, dtype=torch.uint8, device=centroids.device)
