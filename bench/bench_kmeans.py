"""k-means: one step of Lloyd's algorithm, and whole searches from given centroids.

Bytes of a step (n = 294,912 points, d = 8, K = 256): the points read, 9.4 MB, and the codes written, 1.2 MB;
the centroids (8 KiB) and sums stay in cache.
Operations: n K pairs, 75.5 M, of d multiply-adds and a compare: 1.21 G counted as 2 d a pair, and 3
instructions more per 16 pairs to keep the minimum and where it was.
Floor: the products points . centroids, which a matrix product computes too and leaves in cache, a chunk after
another: the ceiling. Its inner dimension is d, far from what such kernels are made for, so less than 1 is
possible. At 234 GFLOP/s the multiply-adds take 5.2 ms, the memory 0.6 ms.
Prediction, 2 cores: 5 to 6 ms a step with the minimum beside the multiply-adds, where faiss takes 26,
scikit-learn 77 and torch 340: 4 to 5x faiss. Past that lies only what needs fewer fp32 multiply-adds: tiles
of AMX, or bounds. A search of 15 steps costs 15 of them; other n and K as many per pair.

Measured with AVX-512 and no AMX (AMD Zen 5, 2 cores): a step 2.2 ms, 0.28x the matrix product, a search
38.1 ms where faiss takes 285, 7.5x; in a process of its own faiss takes 195 to 200, 5.1x to 5.6x ours
there. Others, beside faiss: d = 4 33 ms (270), d = 16 76 (343), K = 16 14 (267), 100,000 points 14 (94); in
5 steps K = 1024 37 (132), 1,000,000 points 42 (328); in 2 K = 4096 58 (120), 10,000,000 points 183 (1520).
The floor of the products of pairs of 16-bit integers is 1.2 ms a step; their loop reaches 84 % of the rate
of that instruction. What gave it, ns a point on one core, a step without its sums: scores with codewords
side by side and then those of the best 16 again 17.4; points side by side, codewords in couples whose
number is in the low bits of a score, 13.1; units that fit a sample of the points 12.7 (of d = 16, where
whole tiles were too far out for the integers, a step 4.9 to 7.2 -> 4.6 ms); both codewords of a couple in
one vector 11.6. Sums in whole cache lines 2.0 -> 1.3 beside that. Bounds (below) do not pay here: their
first step takes 8.3 ms, the fifteenth 2.5; from K = 1024 on they come close.
With AMX, before that: a step 4.3 ms, 0.85x the matrix product, and a search 4.8 ms a step where faiss takes
19.1 to 22.1 and scikit-learn 57: 3.7 to 4.7x faiss over several runs. Tried there on the scores, per point
on one core: fp32 multiply-adds 47 ns in all, tiles of AMX (bf16 halves) 33 ns, pairs of 16-bit integers 23
ns. A tile that is zeroed and not loaded costs AMX three times as much per product.

A search keeps bounds on the distances from step to step (csrc/cpu/nearest_bounds.h), where a sample of its
points says that they pay. With AVX2 alone (Zen, 2.5 GHz, 2 cores): 15 steps 227 ms, 2.7x and 3.1x faiss in
two runs (605 and 710) and short of 5x; 25 steps 300, 3.3x; without bounds 15 steps 501; scikit-learn 1570,
the product 498. Of 16 groups of 16 centroids a point looks at all in the first step, at a third in each of
the next three and at a tenth in the last: 256, 180, 155, 119, 100, 78 ... 52 ns on one core, where a step
without bounds takes 209. Half of that is the scores of the groups, at 10.8 ns a look near the rate of
multiply-adds, a fifth their points brought together, an eighth distances where the nearest changes. Tried:
lists of points made without a branch 10.2 -> 8.6 ms a late step of 147,456 points; groups of 8 the same
time; a first step that finds its own codes instead of a plain one before it 1660 -> 1420 ns in all. Groups
by their principal axis or by k-means 3 to 8 % fewer looks, in simulation. With one bound for all centroids
39 % of the points could skip the scores, but no other could skip any. Others, beside faiss: d = 4 144 ms
(421), d = 16 411 (858), 100,000 points 93 (205), K = 16 without bounds 86 (280); in 5 steps K = 1024 318
(567), 1,000,000 points 419 (691). The sample, 4096 points, costs 2 % of 15 steps.

Measured on an H200 (a step, us, by ours in CUDA C++ / in Triton / torch / the matrix product; 12 rounds):
2,097,152 points of d = 8 in K = 256 326 / 598 / 2530 / 960, K = 1024 556 / 1920 / 6560 / 3170, K = 4096
1850 / 7200 / 23100 / 13600; d = 16, K = 256 490 / 1070 / 2890 / 1180. flash-kmeans was not there.

faiss: all points, one start, no checks but its own for NaN. On a CPU torch's search is left to the single
step, where its time is that of every step; on a GPU its steps, with sums by index_add_ or by a product with
one-hot codes, run plainly and compiled, beside flash-kmeans. The objectives are compared
in tests/bench/test_bench_kmeans.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch

import qnkernels as qnk
from harness import Case, Contender, compiled, ours

EXPONENT = 32  # of sums of standard normal points: up to 2^29 of them in an int64
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # products that the ceiling keeps at once: 1 MiB, a core's cache
PAIRS = 5e8  # point-centroid pairs up to which the slow ones take part
SCORES = {"cpu": 1 << 24, "cuda": 1 << 28}  # that torch's step keeps at once


@dataclass
class Inputs:
    points: torch.Tensor  # fp32 [n, d]
    start: torch.Tensor  # fp32 [K, d], some of the points


def make_inputs(n, d, n_clusters, device, index) -> Inputs:
    generator = torch.Generator(device).manual_seed(index)
    points = torch.randn(n, d, device=device, generator=generator)
    return Inputs(points, points[:n_clusters].clone())


def our_step(inputs: Inputs) -> Callable:
    step = torch.ops.qnkernels.kmeans_step
    return partial(step, inputs.points, inputs.start, EXPONENT, 0, EXPONENT)


def scattered(rows: torch.Tensor, codes: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """Sums [K, d + 1] of the rows [n, d + 1] of each cluster."""
    return rows.new_zeros(n_clusters, rows.shape[1]).index_add_(0, codes, rows)


def multiplied(rows: torch.Tensor, codes: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """The same by a product with the one-hot codes, chunk by chunk."""
    clusters = torch.arange(n_clusters, device=rows.device)[:, None]
    pieces = max(1, SCORES[rows.device.type] // n_clusters)
    total = rows.new_zeros(n_clusters, rows.shape[1])
    for some, theirs in zip(rows.split(pieces), codes.split(pieces), strict=True):
        total += (clusters == theirs).to(rows.dtype) @ some
    return total


def torch_step(points: torch.Tensor, centroids: torch.Tensor, add: Callable = scattered) -> torch.Tensor:
    """The next centroids, in torch ops: a matrix product and its least, no distances."""
    half = centroids.square().sum(1) / 2
    chunks = points.split(max(1, SCORES[points.device.type] // len(centroids)))
    codes = torch.cat([torch.addmm(half, rows, centroids.t(), alpha=-1).argmin(1) for rows in chunks])
    total = add(torch.nn.functional.pad(points, (0, 1), value=1.0), codes, len(centroids))
    sums, counts = total[:, :-1], total[:, -1:]
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)


def torch_search(inputs: Inputs, iterations: int, step: Callable = torch_step) -> torch.Tensor:
    centroids = inputs.start
    for _ in range(iterations):
        centroids = step(inputs.points, centroids)
    return centroids


def one_hot_step(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return torch_step(points, centroids, multiplied)


def torch_steps() -> dict[str, Callable]:
    """torch's ways to take a step on a GPU, each fresh, since a compiled one is for one shape."""
    steps = {"torch": torch_step, "torch one-hot": one_hot_step}
    return steps | {name.replace("torch", "torch.compile"): compiled(step) for name, step in steps.items()}


def products(iterations: int, inputs: Inputs) -> Callable:
    """The dot products of points and centroids, without a use for them."""
    table = inputs.start.t().contiguous()
    rows = max(1, CHUNK[table.device.type] // table.shape[1])
    chunks = inputs.points.split(rows)
    outputs = [
        inputs.points.new_empty(rows, table.shape[1])[: len(chunk)] for chunk in (chunks[0], chunks[-1])
    ]

    def run() -> None:
        for _ in range(iterations):
            for chunk in chunks[:-1]:
                torch.mm(chunk, table, out=outputs[0])
            torch.mm(chunks[-1], table, out=outputs[1])

    return run


def our_search(inputs: Inputs, iterations: int) -> torch.Tensor:
    return qnk.kmeans(inputs.points, len(inputs.start), iterations, inputs.start).centroids


def faiss_search(inputs: Inputs, iterations: int) -> torch.Tensor:
    import faiss

    points, start = inputs.points.numpy(), inputs.start.numpy()
    options = dict(nredo=1, seed=1, verbose=False, min_points_per_centroid=1)
    search = faiss.Kmeans(
        points.shape[1], len(start), niter=iterations, max_points_per_centroid=len(points), **options
    )
    search.train(points, init_centroids=start)
    return torch.from_numpy(search.centroids)


def sklearn_search(inputs: Inputs, iterations: int) -> torch.Tensor:
    from sklearn.cluster import KMeans

    start = inputs.start.numpy()
    search = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    return torch.from_numpy(search.fit(inputs.points.numpy()).cluster_centers_)


def flash_search(inputs: Inputs, iterations: int) -> torch.Tensor:
    """From its Triton module, as its top level falls back to torch without a word. It waits at each step."""
    from flash_kmeans.kmeans_triton_impl import batch_kmeans_Euclid

    points, start = inputs.points[None], inputs.start[None]
    _, centroids, _ = batch_kmeans_Euclid(points, len(inputs.start), iterations, init_centroids=start)
    return centroids[0]


def flash_step(inputs: Inputs) -> Callable:
    """Its two kernels; the squared norms of the points, which no step changes, are there before."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    from flash_kmeans.centroid_update_triton import triton_centroid_update_sorted_euclid

    points, start = inputs.points[None], inputs.start[None]
    norms = points.square().sum(-1)

    def step() -> torch.Tensor:
        codes = euclid_assign_triton(points, start, norms)
        return triton_centroid_update_sorted_euclid(points, codes, start)[0]

    return step


# package -> (module that must import, device type, search); all searches return centroids [K, d]
OPTIONAL = {
    "faiss-cpu": ("faiss", "cpu", faiss_search),
    "scikit-learn": ("sklearn", "cpu", sklearn_search),
    "flash-kmeans": ("flash_kmeans", "cuda", flash_search),
}
LEFT_OUT = [name for name, (module, *_) in OPTIONAL.items() if find_spec(module) is None]


def searches(device_type: str) -> dict[str, Callable]:
    """By name of the contender, what is installed for the device."""
    return {
        f"{name} {version(name)}": search
        for name, (_, device, search) in OPTIONAL.items()
        if device == device_type and name not in LEFT_OUT
    }


def timed_search(search: Callable, iterations: int, inputs: Inputs) -> Callable:
    return partial(search, inputs, iterations)


def timed_step(step: Callable, inputs: Inputs) -> Callable:
    return partial(step, inputs.points, inputs.start)


def step_contenders(pairs, device_type) -> list[Contender]:
    found = ours("kmeans_step", device_type, our_step)
    if pairs > PAIRS:
        found = [one for one in found if one.role == "ours"]
    elif device_type == "cpu":
        found.append(Contender("torch", "peer", partial(timed_step, torch_step)))
    if device_type == "cuda":
        found += [Contender(name, "peer", partial(timed_step, step)) for name, step in torch_steps().items()]
        if "flash-kmeans" not in LEFT_OUT:
            found.append(Contender(f"flash-kmeans {version('flash-kmeans')}", "peer", flash_step))
    return [*found, Contender("matmul", "ceiling", partial(products, 1))]


def search_contenders(iterations, device_type) -> list[Contender]:
    prepare = partial(timed_search, our_search, iterations)
    found = [
        Contender(one.name, one.role, prepare, one.backend, capture=False)
        for one in ours("kmeans_step", device_type, our_step)
        if one.role == "ours"
    ]
    peers = searches(device_type)
    if device_type == "cuda":
        peers |= {name: partial(torch_search, step=step) for name, step in torch_steps().items()}
    for name, search in peers.items():
        prepare = partial(timed_search, search, iterations)
        found.append(Contender(name, "peer", prepare, capture=device_type == "cpu"))
    return [*found, Contender("matmul", "ceiling", partial(products, iterations))]


def case(op, n, d, n_clusters, iterations=1, quick=False, devices=("cpu", "cuda"), peer_target=None) -> Case:
    contenders = (
        partial(step_contenders, n * n_clusters)
        if op == "kmeans_step"
        else partial(search_contenders, iterations)
    )
    shape = f"{n}x{d} in {n_clusters}"
    return Case(
        op=op,
        name=f"{'step' if op == 'kmeans_step' else f'{iterations} steps'} {shape}",
        shape=shape,
        dtype="float32",
        moved_bytes=iterations * 4 * n * (d + 1),
        operations=iterations * 2 * n * n_clusters * d,
        inputs=partial(make_inputs, n, d, n_clusters),
        contenders=contenders,
        devices=devices,
        peer_target=peer_target,
        quick=quick,
        size=n_clusters,
    )


N = 294_912  # a 3072x768 weight in blocks of 8
M = 2_097_152  # a 4096x4096 weight in blocks of 8
# (n, d, K, steps of a search); the slowest peer sets the number of steps
SHAPES = {
    "cpu": (
        (N, 8, 256, 15),
        (N, 4, 256, 15),
        (N, 16, 256, 15),
        (N, 8, 16, 15),
        (N, 8, 1024, 5),
        (N, 8, 4096, 2),
        (100_000, 8, 256, 15),
        (1_000_000, 8, 256, 5),
        (10_000_000, 8, 256, 2),
    ),
    "cuda": (
        (M, 8, 256, 5),
        (N, 8, 256, 15),
        (M, 4, 256, 5),
        (M, 16, 256, 5),
        (M, 8, 1024, 5),
        (M, 8, 4096, 2),
    ),
}
FIVE_TIMES = (5.0, "")  # the fastest peer: flash-kmeans, or torch's best
QUICK = {"cpu": (N, 8, 256), "cuda": (M, 8, 256)}
CASES = [
    case(
        *(op, n, d, n_clusters, steps if op == "kmeans" else 1),
        quick=(n, d, n_clusters) == QUICK[device],
        devices=(device,),
        peer_target=FIVE_TIMES if (device, n, d, n_clusters) == ("cuda", *QUICK["cuda"]) else None,
    )
    for device, shapes in SHAPES.items()
    for op in ("kmeans_step", "kmeans")
    for n, d, n_clusters, steps in shapes
]


def test_kmeans(timed):
    """One row: a contender on a case. The fixture measures and reports."""
