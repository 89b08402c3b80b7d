"""pq_linear: a linear layer over a product-quantized weight, for serving and for training its codebook.

Bytes (4096x4096, d = 8, K = 256, batch m, fp32): the codes, 2.1 MB, where the dense weight has 67 MB; the
codebook, 8 KiB; 4 m (in + out). Codes of two bytes (K = 1024) double the first.
Operations: through a table of codebook . x products 2 K in m to build it, 2.1 M m, and a look-up and an
addition per code and token, 2.1 M m; through decoded weights 33.5 M m, as the dense layer.
Floor: batch 1 and 16 the codes read once (the ceiling copies them, read and written); they fit the caches of
the second level, so look-ups are the bound. Batch 256 the bf16 product, whose ceiling is F.linear in bf16.
The training step: the three products of the dense step; the weight's gradient goes into the codebook and is
never written.
Prediction, 2 cores: batch 1: 0.17 to 0.2 ms with two byte planes, 64 codes a permutation, that is 7x F.linear
in fp32 and 2x quantize_dynamic; batch 16: 1.0 to 1.3 ms, 4 to 5x fp32; batch 256: bf16 1.2x the ceiling, fp32
with its three bf16 products 3 to 3.5x. Step of 512 in fp32: 1x the dense step.
Measured, 2 cores: batch 1: 0.17 ms, 9.2x F.linear in fp32 and 2.7x quantize_dynamic; batch 16: 1.11 ms,
5.4x fp32; batch 256: bf16 1.08x the ceiling, fp32 12.7 ms, 2.1x F.linear in fp32 and not 4x. The step of
512: 79 ms, 0.49x the dense one. Tried on batch 256 in fp32: additions of table rows 14.9 ms, three bf16
products in tiles 12.7 ms (their loads ordered to hide behind products, tokens packed in the order of use,
prefetched, larger groups of outputs: 5 % together); alone, in cache, the same products take 8.5 ms. Batch
1: a prefetch of the codes, which lie n bytes apart, gave 0.145 -> 0.120 ms with warm caches.
Without AMX (AMD Zen 5, 2 cores), beside F.linear in fp32 and in bf16 and quantize_dynamic: batch 1 73 us
(2750, 1030, 151), 38x fp32 and 2.1x the fastest in int8, whose weight the 32 MB cache holds from call to
call; 16 512 us (6250, 1390, 434), 12x fp32; 256 7.5 ms (42.4, 9.4, 5.5) in fp32, 5.7x fp32 and 0.80x bf16,
by table rows, and as much in bf16; step of 512 65 ms, dense 252. Batch 1 before: 106 us; the tables of a
segment kept in the first-level cache while all outputs meet them (they were read from the second again for
each 256 outputs), sums widened by vectors and products of a block from registers gave 73. By count of
instructions look-ups take 25 us and tables 10. By table rows, on Zen 4: tables of four blocks at once (64
KiB) instead of two 17.9 -> 14.8 ms at batch 256, rows of 8 tokens instead of 16 18.5 ms, tokens and outputs
transposed in runs of 16 a further tenth. There, too, what threads write lies 64 KiB apart (see
bench_int_linear; 2 cores, interleaved): d = 8, K = 256, batch 16 0.95 -> 0.86 ms, 256 13.6 -> 12.2, gradients
of 512 tokens 92 -> 68; K = 1024 2.3 -> 1.9, 35 -> 30, 136 -> 127.
With AVX2 alone (Zen, 2.5 GHz, 2 cores), fp32, medians of a plain loop, beside F.linear in fp32 and
quantize_dynamic: batch 1 0.65 ms (0.86 with the codes out of the caches), 4.1, 1.19: 6.3x and not 8x, 1.8x
and not 2x; 16 2.64, 32, 7.6; 64 9.7, 57, 30; 256 40.5, 157, 124: 3.9x and not 4x; step of 512, before the
changes below, 476, dense 798. Batch 1 by table rows of 8 tokens took 1.82; entries one by one 1.04, eight
outputs whose codes are one load 0.86, sums kept out of vectors 0.69, one register for the table 0.58 to
0.65. Tried after that: 4 to 8 blocks together, words of codes shifted in place, the next codes prefetched:
the same. On one core a code takes 0.48 ns, 1.2 cycles where its loads take 0.7. K = 1024: 3.27 -> 0.68 to
0.76. Batch 256 57 -> 41, in ns an addition for 8 tokens on one core, 0.35 of them for the tables: 1.57;
tables of four blocks (32 KiB) instead of eight and of four codewords at once 1.40, codes of eight outputs
in one load 1.27, where loads and stores take 0.65. Tried there: two tables, three, sums in pairs: slower or
the same.
On an H200 (bench/results/nvidia-h200), 8192x8192, d = 8, K = 256, bf16, us, ours in CUDA C++ (F.linear):
batch 1 11.9 (34.4), 16 16.2 (34.0), 256 91.6 (50.8), 4096 736 (702); the targets 5x, 3x, 1x and 0.85x are
met by the last alone. Floor of batch 1: 2 of memory, 4.5 of shared memory; instructions 144 -> 44 a step
gave 15.3 -> 11.9, prefetching in registers alone nothing. 256: by wgmma 86, whose warpgroups wait for
their own products before they decode; taking turns made it 97. 4096: 1106 by wgmma, 736 through slices
for cuBLAS. Step of 512 951 (293), of 4096 3800 (2100): the sums of the codebook's gradient, 595 of the
951, are atomics in shared memory. Triton: 78, 357, 753.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench_int_linear import INT8PACK_ON_GPU, dense, dynamic_int8, int8pack
from harness import Case, Contender, compiled, has_kernel, ours
from qnkernels import functional as F
from qnkernels.backends.cuda import use_wgmma


@dataclass
class Inputs:
    x: torch.Tensor  # [batch, in]
    grad: torch.Tensor  # [batch, out]
    codes: torch.Tensor  # [out, in / d], those of a block adjacent in memory, as PQLinear keeps them
    codebook: torch.Tensor  # [K, d], in the dtype of x
    weight: torch.Tensor  # [out, in], what they stand for, in the dtype of x


def make_inputs(shape, batch, d, n_centroids, dtype, device, index) -> Inputs:
    generator = torch.Generator(device).manual_seed(index)
    out, columns = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, generator=generator).to(dtype)

    codes = torch.randint(0, n_centroids, (columns // d, out), device=device, generator=generator)
    codes = codes.to(torch.uint8 if n_centroids <= 256 else torch.uint16).t()
    codebook = normal(n_centroids, d) / columns**0.5
    return Inputs(normal(batch, columns), normal(batch, out), codes, codebook, F.pq_decode(codes, codebook))


def call_ours(inputs: Inputs) -> Callable:
    return partial(F.pq_linear, inputs.x, inputs.codes, inputs.codebook)


def eager(x, codes, codebook) -> torch.Tensor:
    """The formula, the product in the dtype of x."""
    return torch.nn.functional.linear(x, codebook[codes.long()].flatten(1))


def formula(call: Callable, inputs: Inputs) -> Callable:
    return partial(call, inputs.x, inputs.codes, inputs.codebook)


def formula_step(call: Callable, inputs: Inputs) -> Callable:
    return step(lambda x, codebook: call(x, inputs.codes, codebook), inputs.x, inputs.codebook, inputs.grad)


def copy_codes(inputs: Inputs) -> Callable:
    return partial(torch.empty_like(inputs.codes).copy_, inputs.codes)


def int8pack_bf16(inputs: Inputs) -> Callable:
    return int8pack(replace(inputs, x=inputs.x.bfloat16()))


def step(layer: Callable, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Callable:
    """Forward, and backward to x and to the weight or codebook, gradients in fresh memory."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight)]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(*leaves).backward(grad)

    return run


def our_step(inputs: Inputs) -> Callable:
    def layer(x, codebook):
        return F.pq_linear(x, inputs.codes, codebook)

    return step(layer, inputs.x, inputs.codebook, inputs.grad)


def dense_step(dtype, inputs: Inputs) -> Callable:
    linear = torch.nn.functional.linear
    return step(linear, inputs.x.to(dtype), inputs.weight.to(dtype), inputs.grad.to(dtype))


def on_any_gpu(prepare: Callable, inputs: Inputs) -> Callable:
    """Ours without wgmma."""
    call = prepare(inputs)

    def run() -> object:
        with use_wgmma("never"):
            return call()

    return run


def ours_by_mma(prepare: Callable, dtype, device_type) -> list[Contender]:
    """What a GPU with wgmma would run without it."""
    if device_type != "cuda" or dtype == torch.float32 or not has_kernel("cuda", "pq_linear"):
        return []
    if torch.cuda.get_device_capability() != (9, 0):
        return []
    return [Contender("cuda without wgmma", "ours", partial(on_any_gpu, prepare), backend="cuda")]


def contenders(batch, dtype, device_type) -> list[Contender]:
    product_bound = batch >= 256
    found = [
        *ours("pq_linear", device_type, call_ours),
        *(ours_by_mma(call_ours, dtype, device_type) if batch > 64 else []),
        Contender("F.linear fp32", "peer", partial(dense, torch.float32)),
        Contender("F.linear bf16", "ceiling" if product_bound else "peer", partial(dense, torch.bfloat16)),
    ]
    if not product_bound:
        found.append(Contender("copy_ codes", "ceiling", copy_codes))
    if device_type == "cpu" or batch <= INT8PACK_ON_GPU:
        found.append(Contender("_weight_int8pack_mm bf16", "peer", int8pack_bf16))
    if device_type == "cpu":
        found.append(Contender("quantize_dynamic", "peer", dynamic_int8))
    else:
        found.append(Contender("torch.compile", "peer", partial(formula, compiled(eager))))
    return found


def step_contenders(dtype, device_type) -> list[Contender]:
    types = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    found = [Contender(f"F.linear {types[one]}", "peer", partial(dense_step, one)) for one in types]
    ceiling = f"F.linear {types[dtype]}"
    found = [replace(one, role="ceiling") if one.name == ceiling else one for one in found]
    if device_type == "cuda":
        found.append(Contender("torch.compile", "peer", partial(formula_step, compiled(eager))))
    mma = ours_by_mma(our_step, dtype, device_type)
    return [*ours("pq_linear_backward", device_type, our_step), *mma, *found]


def case(
    shape,
    batch,
    d,
    n_centroids,
    dtype,
    training=False,
    target=None,
    peer_target=None,
    quick=False,
    devices=("cpu", "cuda"),
) -> Case:
    out, columns = shape
    types = str(dtype).removeprefix("torch.")
    codes = out * columns // d * (1 if n_centroids <= 256 else 2)
    passes = 3 if training else 1
    return Case(
        op="pq_linear_backward" if training else "pq_linear",
        name=f"{'step of' if training else 'batch'} {batch} {out}x{columns} d={d} K={n_centroids} {types}",
        shape=f"{out}x{columns} batch {batch} d={d} K={n_centroids}",
        dtype=types,
        moved_bytes=passes * (codes + batch * (out + columns) * dtype.itemsize),
        operations=passes * 2 * batch * out * columns,
        inputs=partial(make_inputs, shape, batch, d, n_centroids, dtype),
        contenders=partial(step_contenders, dtype) if training else partial(contenders, batch, dtype),
        devices=devices,
        target=target,
        peer_target=peer_target,
        quick=quick,
        size=batch,
    )


SQUARE, WIDE, LARGE = (4096, 4096), (3072, 768), (8192, 8192)
TYPES = (torch.float32, torch.bfloat16)
BATCHES = (1, 16, 256)
CPU, GPU = dict(devices=("cpu",)), dict(devices=("cuda",))
CUBLAS = "F.linear bf16"  # the ceiling, too, from 256 tokens on
GPU_TARGETS = {
    1: dict(peer_target=(5.0, CUBLAS)),
    16: dict(peer_target=(3.0, CUBLAS)),
    256: dict(target=1.0),
    4096: dict(target=1 / 0.85),
}
CASES = [
    *(
        case(SQUARE, batch, 8, 256, dtype, target=1.2 if batch == 256 else None, quick=True, **CPU)
        for dtype in TYPES
        for batch in BATCHES
    ),
    *(case(SQUARE, batch, d, 256, torch.float32, **CPU) for d in (4, 16) for batch in BATCHES),
    *(case(SQUARE, batch, 8, K, torch.float32, **CPU) for K in (16, 1024) for batch in BATCHES),
    *(case(WIDE, batch, 8, 256, dtype, **CPU) for dtype in TYPES for batch in BATCHES),
    case(SQUARE, 512, 8, 256, torch.float32, training=True, target=1.0, quick=True, **CPU),
    case(SQUARE, 512, 8, 256, torch.bfloat16, training=True, **CPU),
    case(WIDE, 512, 8, 256, torch.float32, training=True, **CPU),
    *(
        case(LARGE, batch, 8, 256, torch.bfloat16, quick=True, **GPU, **targets)
        for batch, targets in GPU_TARGETS.items()
    ),
    *(case(LARGE, batch, d, 256, torch.bfloat16, **GPU) for d in (4, 16) for batch in BATCHES),
    *(case(LARGE, batch, 8, 1024, torch.bfloat16, **GPU) for batch in BATCHES),
    *(case(SQUARE, batch, 8, 256, dtype, **GPU) for dtype in TYPES for batch in BATCHES),
    *(case(LARGE, batch, 8, 256, torch.bfloat16, training=True, quick=True, **GPU) for batch in (512, 4096)),
    case(SQUARE, 512, 8, 256, torch.float32, training=True, **GPU),
]


def test_pq_linear(timed):
    """One row: a contender on a case. The fixture measures and reports."""
