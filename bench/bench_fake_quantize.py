"""fake_quantize: scalar quantization noise on a weight, forward and backward.

Bytes (3072x768 fp32, n = 2.36 M): forward reads 4n and writes 4n, 18.9 MB; backward reads the gradient and
the weight and writes the gradient, 28.3 MB, or 18.9 where nothing lies outside the range. bf16 halves both.
Operations: an eighth of a Philox4x32-10 per element and bit twiddling (about 14 integer operations), at
p = 0.5 a sixteenth of that; a true division and seven more floating-point operations forward; two compares
and no division backward.
Floor: forward the copy of the weight (ratio 1), backward 1.5x that copy. On an AVX-512 core a division
instruction takes 16 cycles for 16 elements, as long as the copy; a corrected reciprocal takes its place.
Prediction, 2 cores: forward 1.3 to 1.7x the copy, backward 1.5 to 1.7x; autograd's Python adds some 50 us.
Measured, 2 cores: forward 1.55x; backward 2.29x through autograd, its kernel alone 1.5x, which is the floor.
With AVX2 alone (Zen, 2.5 GHz, 2 cores; its copy 1.16 ms): forward 11.1 -> 2.2 ms, 1.9x the copy; backward
1.8x. What gave it: Philox in vectors instead of loops that the compiler turned into some (11.1 -> 2.3),
clamping the value instead of quotient and code, one subtraction for the rounding constant and the zero
point, a comparison instead of a variable shift (4 cycles there) to spread the mask (quantizer 0.85 ->
0.58 ns an element and core). Four vectors step by step, or four chains of Philox instead of two, gave
nothing there. Its floor was Philox' multiplications, 36 of 2 cycles for 64 elements, 0.45 ns of the 0.8
that it takes (before p = 0.5 took one bit of them instead of 16).
With AVX-512 on Zen 4 (2 cores, 32 MB of cache shared with strangers), 3072x768 fp32, us, the kernel alone:
copy 129, p = 1 187 -> 162, p = 0.5 215 -> 180 (380 before one bit was drawn), with marks 242 -> 190. What
gave it: memory asked for 4 KiB ahead instead of 1 (215 -> 195); no clamp and no marks where integer units
find four vectors well inside the range (marks 225 -> 199); a word of the mask as four draws at once (199 ->
190). Looking through a tile first and then not clamping it took twice as long: loads and arithmetic no
longer overlap. Through Python 206 in a process of its own (copy 112) and 220 to 490 here in several runs,
where x and y may or may not get a share of the cache (clone, of the same bytes, 127 to 310): "from memory"
is what a training step sees, and does not depend on it: forward 1.18 to 1.23x the copy, backward 1.18 to
1.31x (torch.add of two such tensors 1.29 to 1.39x). 4096x4096 on one core 35.8 -> 10.9 ms forward and 39.6
-> 12.9 backward with large pages for the result, copy 5.4. Tried: large pages from 4 MiB on, no faster, and
now and then 13 ms for one call, in which the system looks for such pages.
bf16 in and out, the kernel alone: 16 cycles a vector where fp32 takes 8 (what widens, rounds and packs
shares two ports with the shifts of Philox); three instructions less to round 370 -> 342 us, 768x768 94 ->
86. Even and odd places as two vectors, so that no halves move between lanes, and no look for NaN well
inside the range: 303 -> 232 us (copy, in the cache, 53); test and addition under a mask, to round to even,
remain.
The forward that a gradient follows marks tiles of 2048 elements that hold any value outside the range, and
the backward reads the weight of those alone: 4n + 4n bytes elsewhere, nothing in place. With AVX2 on Zen 3 (2
cores), the kernel alone: backward 3072x768 695 -> 453 us, copy 396; through autograd 4096x4096 17.1 -> 7.3
ms, copy 6.6 to 7.1. With channels of their own nearly every tile has such a value. Marks cost the forward a
tenth there (a minimum and a maximum a vector); asking for memory 1 KiB ahead gives it back (635 -> 572 us
without marks).
H100 (3.0 TB/s measured elsewhere): 6.3 us forward, arithmetic of the same size, so 1.3x the copy.
On an H200 (bench/results/nvidia-h200), 8192x8192, us (copy_), with draws of 16 bits: forward fp32 134 (129),
bf16 90 (65; 103 with a division for each element: 25 instead of 39 instructions an element, and what holds
it up now is not known); backward fp32 189 and bf16 95, as fast as the copy by bytes.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from harness import Case, Contender, compiled, ours
from qnkernels import functional as F
from qnkernels.reference.range import minmax

BITS = 8


@dataclass
class Inputs:
    x: torch.Tensor
    grad: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    seed: torch.Tensor
    out: torch.Tensor


def make_inputs(shape, dtype, out_dtype, axis, device, index) -> Inputs:
    generator = torch.Generator(device).manual_seed(index)
    x = torch.randn(shape, device=device, generator=generator).to(dtype)
    grad = torch.randn(shape, device=device, generator=generator).to(dtype)
    low, high = minmax(x, axis)
    scale, zero_point = F.quantization_parameters(0.9 * low, 0.9 * high, BITS)  # some values lie outside
    seed = torch.full((), index, dtype=torch.int64, device=device)
    return Inputs(x, grad, scale, zero_point, seed, torch.empty(shape, dtype=out_dtype, device=device))


def eager(x, scale, zero_point, bits, axis, p, dtype, straight_through):
    """The formula in torch ops, with a mask of its own; arithmetic in fp32 as in ours."""
    s, z = (
        (scale, zero_point) if axis is None else (scale.unsqueeze(1 - axis), zero_point.unsqueeze(1 - axis))
    )
    w = x.float()
    quantized = (torch.round(w / s + z).clamp(0, 2**bits - 1) - z) * s
    if straight_through:
        inside = torch.minimum(torch.maximum(w, -z * s), (2**bits - 1 - z) * s)
        quantized = inside + (quantized - inside).detach()
    return torch.where(torch.rand(w.shape, device=w.device) < p, quantized, w).to(dtype)


def call_ours(p, axis, dtype, inputs):
    return partial(
        F.fake_quantize,
        inputs.x,
        inputs.scale,
        inputs.zero_point,
        BITS,
        axis,
        p=p,
        seed=inputs.seed,
        dtype=dtype,
    )


def call_formula(function, p, axis, dtype, straight_through, inputs):
    return partial(
        function, inputs.x, inputs.scale, inputs.zero_point, BITS, axis, p, dtype, straight_through
    )


def backward_of(call, inputs: Inputs):
    """The gradient of one recorded forward, as often as wanted."""
    x = inputs.x.detach().requires_grad_()
    y = call(replace(inputs, x=x))()
    grad = inputs.grad.to(y.dtype)
    return lambda: torch.autograd.grad(y, x, grad, retain_graph=True)


def copy(inputs: Inputs):
    return partial(inputs.out.copy_, inputs.x)


def torch_op(axis, inputs: Inputs):
    """torch's own fake quantization: p = 1 and no noise."""
    zero_point = inputs.zero_point.to(torch.int32)
    if axis is None:
        return lambda: torch.fake_quantize_per_tensor_affine(
            inputs.x, inputs.scale, zero_point, 0, 2**BITS - 1
        )
    return lambda: torch.fake_quantize_per_channel_affine(
        inputs.x, inputs.scale, zero_point, axis, 0, 2**BITS - 1
    )


def forward_contenders(p, axis, dtype, device_type) -> list[Contender]:
    contenders = [
        *ours("fake_quantize", device_type, partial(call_ours, p, axis, dtype)),
        Contender("eager", "peer", partial(call_formula, eager, p, axis, dtype, False)),
        Contender("torch.compile", "peer", partial(call_formula, compiled(eager), p, axis, dtype, False)),
        Contender("clone", "peer", lambda inputs: inputs.x.clone),
        Contender("copy_", "ceiling", copy),
    ]
    if p == 1.0:
        contenders.insert(-2, Contender("torch.fake_quantize", "peer", partial(torch_op, axis)))
    return contenders


def backward_contenders(p, axis, dtype, device_type) -> list[Contender]:
    call_eager = partial(call_formula, eager, p, axis, dtype, True)
    call_compiled = partial(call_formula, compiled(eager), p, axis, dtype, True)
    backward = partial(backward_of, partial(call_ours, p, axis, dtype))
    return [
        *ours("fake_quantize_backward", device_type, backward),
        Contender("eager", "peer", partial(backward_of, call_eager)),
        Contender("torch.compile", "peer", partial(backward_of, call_compiled)),
        Contender("add", "peer", lambda inputs: partial(torch.add, inputs.x, inputs.grad, out=inputs.out)),
        Contender("copy_", "ceiling", copy),
    ]


def without_chains(contenders, device_type) -> list[Contender]:
    """Those of one pass: what chains of ops keep for their gradients takes gigabytes on all input sets."""
    return [one for one in contenders(device_type) if one.role != "reference" and one.name not in CHAINS]


CHAINS = ("eager", "torch.compile")


def case(
    direction,
    shape,
    dtype=torch.float32,
    p=0.5,
    axis=None,
    out_dtype=None,
    target=None,
    quick=False,
    from_memory=False,
    devices=("cpu", "cuda"),
) -> Case:
    out_dtype = out_dtype or dtype
    rows, columns = shape
    n, forward = rows * columns, direction == "forward"
    types = str(dtype).removeprefix("torch.")
    if out_dtype != dtype:
        types += "->" + str(out_dtype).removeprefix("torch.")
    per = "tensor" if axis is None else "channel"
    contenders = partial(forward_contenders if forward else backward_contenders, p, axis, out_dtype)
    return Case(
        op="fake_quantize" if forward else "fake_quantize_backward",
        name=f"{direction} {rows}x{columns} {types} int{BITS} per {per} p={p}" + " from memory" * from_memory,
        shape=f"{rows}x{columns}",
        dtype=types,
        moved_bytes=n * (dtype.itemsize + out_dtype.itemsize),
        operations=0,
        inputs=partial(make_inputs, shape, dtype, out_dtype, axis),
        contenders=partial(without_chains, contenders) if from_memory else contenders,
        devices=devices,
        target=target,
        quick=quick,
        from_memory=from_memory,
        size=n,
    )


MAIN, LARGE = (3072, 768), (8192, 8192)
CASES = [
    case("forward", MAIN, target=2.0, quick=True),
    case("forward", MAIN, target=2.0, from_memory=True, devices=("cpu",)),
    case("forward", MAIN, axis=0),
    case("forward", MAIN, dtype=torch.bfloat16, quick=True),
    case("forward", MAIN, out_dtype=torch.bfloat16),
    case("forward", MAIN, p=0.1),
    case("forward", MAIN, p=1.0),
    case("forward", (768, 768)),
    case("forward", (4096, 4096)),
    case("forward", (1001, 777)),
    case("backward", MAIN, target=2.0, quick=True),
    case("backward", MAIN, target=2.0, from_memory=True, devices=("cpu",)),
    case("backward", MAIN, axis=0),
    case("backward", MAIN, dtype=torch.bfloat16),
    case("backward", MAIN, p=1.0),
    case("backward", (768, 768)),
    case("backward", (4096, 4096)),
    case("backward", (1001, 777)),
    *(
        case(direction, LARGE, dtype, quick=True, devices=("cuda",), target=target)
        for direction, target in (("forward", 1 / 0.9), ("backward", None))
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


def test_fake_quantize(timed):
    """One row: a contender on a case. The fixture measures and reports."""
