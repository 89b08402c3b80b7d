"""k-means: nearest centroids by exact differences, and sums in fixed point by integer atomics."""

import torch
import triton
import triton.language as tl

from ...reference import kmeans as reference_kmeans
from . import launch
from .fixed_point import copies, fixed_point
from .launch import cdiv, power_of_two
from .numeric import to_fp32

THREADS = 128
# Elements of a tile [points, d] of an update.
TILE = 1024


@triton.jit
def coordinates(x_ptr, row, inside, D: tl.constexpr):
    """D tensors fp32: the columns of the rows `row` of x [.., D], 0 where not inside."""
    x = ()
    for j in tl.static_range(D):
        x = x + (to_fp32(tl.load(x_ptr + row * D + j, mask=inside, other=0.0)),)  # noqa: RUF005 (no unpacking here)
    return x


@triton.jit
def nearest(x, centroids_ptr, n_clusters, D: tl.constexpr):
    """(index int32, squared distance fp32) of the nearest of centroids fp32 [n_clusters, D] to the points
    with coordinates x, a tuple of D; the lowest index among equals.

    Each thread keeps its points in registers and reads the same centroid as all others. Differences keep the
    relative error of a distance at d * 2^-24 wherever the points lie; |c|^2 - 2 x c would lose it for tight
    clusters.
    """
    best = tl.full(x[0].shape, float("inf"), tl.float32)
    code = tl.zeros(x[0].shape, tl.int32)
    for k in range(n_clusters):
        distance = tl.zeros(x[0].shape, tl.float32)
        for j in tl.static_range(D):
            difference = x[j] - tl.load(centroids_ptr + k * D + j)
            distance = tl.fma(difference, difference, distance)
        closer = distance < best
        best = tl.where(closer, distance, best)
        code = tl.where(closer, k, code)
    return code, best


@triton.jit(do_not_specialize=["n", "n_clusters"])
def kmeans_assign_kernel(
    points_ptr,
    centroids_ptr,
    codes_ptr,
    distances_ptr,
    n,
    n_clusters,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """codes[i] = argmin_k |x_i - c_k|^2 (int32) and that minimum (fp32).

    points fp32 [n, D], centroids fp32 [n_clusters, D]. D is known when compiled: it indexes registers.
    Floor: 2 D + 3 instructions per point and centroid.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.arange(0, BLOCK)
    inside = row < n - first
    x = coordinates(points_ptr + first * D, row, inside, D)
    code, distance = nearest(x, centroids_ptr, n_clusters, D)
    tl.store(codes_ptr + first + row, code, mask=inside)
    tl.store(distances_ptr + first + row, distance, mask=inside)


@triton.jit(
    do_not_specialize=[
        *("n", "d", "n_clusters", "exponent", "weight_exponent", "objective_exponent", "copies"),
    ]
)
def kmeans_update_kernel(
    points_ptr,
    codes_ptr,
    distances_ptr,
    weights_ptr,
    sums_ptr,
    n,
    d,
    n_clusters,
    exponent,
    weight_exponent,
    objective_exponent,
    copies,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """sums[c] += fixed(w_i * x_i), mass[c] += fixed(w_i), c = codes[i]; objective += fixed(distance_i * w_i).

    points fp32 [n, d]; codes int32 [n], those outside [0, n_clusters) are left out; distances fp32 [n] or
    None; weights fp32 [n] or None, for masses of 1. sums int64 [copies, n_clusters * (d + 1) + 1], zeros at
    first: the sums [n_clusters, d], the masses [n_clusters] and the objective.
    Floor: bytes of points and codes; d + 1 atomics per point.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLS)[None, :]
    inside = row < n - first
    code = tl.load(codes_ptr + first + row, mask=inside, other=-1)
    inside = inside & (code >= 0) & (code < n_clusters)
    inside_tile = inside[:, None] & (column < d)
    terms = tl.load(points_ptr + first * d + row[:, None] * d + column, mask=inside_tile, other=0.0)
    mass_ptr = sums_ptr + n_clusters.to(tl.int64) * d
    copy = (tl.program_id(0) % copies).to(tl.int64) * (n_clusters * (d + 1) + 1)
    if weights_ptr is None:
        mass = tl.full([ROWS], 1, tl.int64)
    else:
        weight = tl.load(weights_ptr + first + row, mask=inside, other=0.0)
        terms = terms * weight[:, None]
        mass = fixed_point(weight, weight_exponent)
    slot = copy + code[:, None] * d + column
    tl.atomic_add(sums_ptr + slot, fixed_point(terms, exponent), mask=inside_tile, sem="relaxed")
    tl.atomic_add(mass_ptr + copy + code, mass, mask=inside, sem="relaxed")
    if distances_ptr is not None:
        squared = tl.load(distances_ptr + first + row, mask=inside, other=0.0)
        if weights_ptr is not None:
            squared = squared * weight
        total = tl.sum(fixed_point(squared, objective_exponent), axis=0)
        tl.atomic_add(mass_ptr + copy + n_clusters, total, sem="relaxed")


def points_of_program(n: int, d: int, device: torch.device) -> int:
    """Several points per thread, to use each centroid read more than once, unless that would leave
    multiprocessors idle.
    """
    per_thread = 4 if d <= 32 else 2
    while per_thread > 1 and cdiv(n, THREADS * per_thread) < 2 * launch.processors(device):
        per_thread //= 2
    return THREADS * per_thread


def kmeans_assign(points, centroids):
    """Signature of reference.kmeans.kmeans_assign; both contiguous."""
    n, d = points.shape
    codes = torch.empty(n, dtype=torch.int32, device=points.device)
    distances = torch.empty(n, dtype=torch.float32, device=points.device)
    size = points_of_program(n, d, points.device)
    launch.run(
        kmeans_assign_kernel,
        (cdiv(n, size),),
        *(points, centroids, codes, distances, n, len(centroids)),
        **dict(D=d, BLOCK=size, num_warps=THREADS // 32),
    )
    return codes, distances


def _update(points, codes, distances, weights, n_clusters, exponents):
    """Sums [n_clusters, d], masses [n_clusters] and objective []."""
    n, d = points.shape
    entries = n_clusters * (d + 1) + 1
    table = torch.zeros(copies(entries), entries, dtype=torch.int64, device=points.device)
    columns = power_of_two(d)
    rows = TILE // columns
    launch.run(
        kmeans_update_kernel,
        (cdiv(n, rows),),
        *(points, codes, distances, weights, table, n, d, n_clusters, *exponents, len(table)),
        **dict(ROWS=rows, COLS=columns, num_warps=8),
    )
    parts = table.split((n_clusters * d, n_clusters, 1), dim=1)
    sums, mass, objective = (part.sum(0) for part in parts)
    return sums.view(n_clusters, d), mass, objective[0]


def kmeans_update(points, codes, n_clusters, exponent, weight_exponent, weights):
    """Signature of reference.kmeans.kmeans_update; all contiguous. Codes out of range are left out."""
    return _update(points, codes, None, weights, n_clusters, (exponent, weight_exponent, 0))[:2]


def kmeans_step(points, centroids, exponent, weight_exponent, objective_exponent, weights):
    """Signature of reference.kmeans.kmeans_step; all contiguous."""
    codes, distances = kmeans_assign(points, centroids)
    exponents = (exponent, weight_exponent, objective_exponent)
    return codes, *_update(points, codes, distances, weights, len(centroids), exponents)


def kmeans_bounded_step_(*arguments):
    """Signature of reference.kmeans.kmeans_bounded_step_. A whole step, without bounds."""
    return reference_kmeans.kmeans_bounded_step_(*arguments, step=kmeans_step)
