"""int_linear and int_linear_quantized: linear layers over a packed 8-bit or 4-bit weight, for serving.

Classes: weight-only int8 and int4 (groups of 128), and dynamic int8 (activations in 8 bits, too, a range for
each row); each with activations in fp32 and in bf16. A peer is compared within its class: F.linear in the
dtype of the activations belongs to all; everything is prepared once and runs under no_grad.
`python bench/int_linear_ratios.py` sums the CSV up by class.
Bytes (4096x4096, batch m): the codes, 16.8 MB in 8 bits and 8.4 MB in 4 (and 0.5 MB of scales), and
m (in + out) activations.
Operations: 2m per weight, 33.5 M m, and one decode (subtract, scale) per weight or group.
Floor: to batch 16 the codes read once (the ceiling copies them: read and written, so a ratio below 1 is
possible); from batch 64 on the bf16 product, whose ceiling is F.linear in bf16. Products of integers could
take half of its time.
Measured, 2 cores with AMX, 4096x4096, while nobody else used the processor: int8 batch 1 0.39 to 0.41 ms;
the codes alone can be read in 0.29 (58 GB/s), which the kernel takes too where nothing ran in between. int4
batch 1 0.25 (bf16) and 0.30 ms (fp32), floor 0.15. Batch 256: dynamic 2.6 ms, the tile instructions alone
0.63; bf16 5.4 ms, instructions 1.3, F.linear 5.2; fp32, three products of bytes, 6.4 ms against 28. What is
missing there: operands and sums come from the second-level cache (10 to 14 ns a product instead of 4.8),
codes are unpacked, outputs are written.
On a later one (3.9 GHz, 480 MB of cache, of which a core reads 25 GB/s; the CSV of model 167): means 5.3 and
1.79 (weight-only int8, fp32 and bf16), 2.2 and 2.8 (dynamic), 4.2 and 1.80 (int4), 2.76 in all, none of 120
points below 0.9; 2.50 and one (int4 with bf16, 768x768, batch 1, 0.83) before what follows. A call whose
weight streams through the caches finds the interpreter outside them: it added 65 us to 4096x4096, batch 1,
where it takes 6 otherwise; now 24 and 3, as one function in C++ (of which 11 are that function), and 20 were
inference_mode around each call, now no_grad around all. int4, batch 1, fp32 / bf16 252 / 222 -> 224 / 203
us, 15 instructions for 128 products of three bytes -> 13: bytes joined on the way, what zero points take off
as a product of pairs of words instead of a table of 32 KB, upper nibbles by one instruction of GFNI, rows at
strides. With all but the loads left out it takes 208. Without gain there: lines asked for into the second
level, further ahead, or in the order of memory; past the caches (NTA) 600.
The CSV without a model is of a processor shared with strangers: a tile instruction took 7 to 17 ns,
with a load 9 to 32, changing within minutes, and F.linear in bf16 5.7 to 16 ms at batch 256. Pairs below are
interleaved loops on it (ms, 2 cores, 4096x4096 unless said). int4 in groups of 128 in units
(int_group_tiles.h) instead of chunks: bf16 batch 16 1.90 -> 0.89, 64 3.68 -> 2.64, 256 21.8 -> 10.7 (F.linear
11.3); fp32 batch 4 1.70 -> 0.74, 16 3.86 -> 1.62, 64 12.4 -> 9.2, 256 41 -> 31. What gave it: one
permutation for 32 codes instead of three, with columns in the order that comes of it; no division in the
loop that decodes (batch 16, one core, 2.7 -> 1.8); sums scaled between the tile instructions of later ones,
and not of the very next, since loads wait for stores of tiles (batch 256 7.8 -> 6.0 with others scaled in
their place); tokens as a stream past the first-level cache (128 tokens, one core, 6.5 -> 5.6).
Tried without gain: vdpbf16ps on rows where they lie, as on Zen 4 (batch 4 0.65 -> 1.1); fp32 as three
parts in bf16, twice the instructions of three bytes (batch 64 11.0 -> 13.7); blocks of half as many tokens
(256 7.1 -> 9.1); two units a pair of tokens (the same at 256, slower at 16); asking for the lines that
decoding stores to (the same). int8 with bf16: codes as last bits of fp32 numbers, 13 instructions for 64,
batch 64 2.37 -> 1.82, 256 14.2 -> 11.2 (F.linear 3.0, 11.4). What is missing at batch 256: 3072x768 takes
1.1 where leaving out decoding, scaling or writing y takes 0.9, 0.74 and 0.74 each, F.linear 0.9; totals are
read from and written to the second-level cache as often as tokens are read from it.
Without tile instructions, on AMD Zen 5 (AVX-512 with VNNI and bf16, 2 cores, 32 MB of cache; the CSV):
fastest peer over ours, in the geometric mean 4.7 and 1.07 (weight-only int8, fp32 and bf16), 1.04 and 2.35
(dynamic), 4.0 and 0.91 (int4); 20 of 120 points below 0.9. int4 with bf16 came last, when the processor had
slowed down, F.linear by a tenth and ours by 4 tenths; by itself 1.05, below 0.9 at 768x768, batch 1 and 4
(0.80, 0.73), and at batch 256 (0.88 to 0.92). One core multiplies 530 G pairs of bytes and 265 G of bf16 a
second at most. What ideas gave, us, ours (fastest peer): bytes of up to 33 rows of activations, not 13,
multiplied where the weight lies: int8 with bf16, 3072x768, batch 5 149 -> 72 (120), 8 232 -> 84 (120),
dynamic at 16 103 -> 71 (70); 65 rows gained nothing more. int4, 4096x4096: two tokens at once, addresses at
strides, sums that start at what zero points take off, batch 1 141 -> 120 (225), 4 418 -> 333 (388); rows up
to 12 tokens, 12 1750 -> 873 (1179). int4 with bf16 in tiles, batch 256: sums scaled as they leave the
registers and one permutation to decode 22.8 -> 20.0 ms on one core, where products alone take 16.4; twice
as many tokens at once 10.7 -> 10.4 on two. Tried on dynamic int8 from the cache, batch 1: prefetches 8 and
16 rows ahead, or into the first level, the same; none, slower.
On Zen 4 (2 cores, 32 MB of cache shared with strangers; the CSV): means 3.6 and 1.19 (weight-only int8), 1.18
and 2.7 (dynamic), 3.1 and 1.17 (int4), 1.92 in all, none of 120 points below 0.9 (13 before what follows, 5
in a run half-way); one core multiplies 236 G pairs of bytes and 118 G of bf16 a second. What gave it, ours
before and after (F.linear of the dtype), interleaved on 2 cores: what threads write 64 KiB apart, since
prefetchers run on past the end of one thread's totals and take lines away from the next one's core (32 KiB
do nearly as well, 8 do not; by process it cost from nothing to all): int4 with fp32, 4096x4096, batch 16 / 64
/ 256 4.7 / 21.0 / 82 -> 2.9 / 10.2 / 43 ms (10.1 / 20.5 / 60), with bf16, batch 256, 768x768 1033 -> 769 us
(754), 11008x4096 85 -> 58 ms (55); int8 with fp32, 4096x4096, 64 10.4 -> 7.9 ms; with AVX2 forced, 16 5.6 ->
4.0. Sums of four groups joined in registers by quotients of their scales, and chunks of 512 columns instead
of 256: int4 with bf16, batch 256, 768x768 808 -> 768 us (760), 4096x4096 23.1 -> 21.8 ms (20.9), 11008x4096
65 -> 59 (56). Tensors handed over whole: a call 9.5 -> 6.2 us (F.linear 3.1). Tried on these: rows in pieces
that threads take as they come to them, large pages for work memory, codes asked for into the first level
right before they are decoded, 64 tokens at once, chunks of 768 columns: all the same within the noise.
int4 with bf16, few tokens, as bf16 and not as bytes, 768x768 on one core, us: 1 token 17 -> 12.6, 4 53 -> 35,
8 103 -> 69, 16 in tiles 127; calls of 1, 4 and 16 21, 44 and 141, torch's 4-bit product 32, 57 and 218.
Decoding to bf16 for oneDNN was no faster there from batch 16 on; codes as the last byte of 2^23 in fp32, less
a subtraction and a conversion, the same as before.
On Zen 4, one core, before that: vpdpbusd in assembly and sums in locals (of the intrinsic GCC 12 stores the
sums each time) 1.4 to 0.62 ms for dynamic int8 at batch 4; asking for the next four rows, batch 1 0.45 to
0.33, 4 0.62 to 0.46; sums of codes by vpsadbw, batch 1 0.33 to 0.29; asking for the next chunk between
products rather than at once, batch 16 2.7 to 2.0, 64 7.3 to 6.2; products of bf16 instead of three of
bytes, int8 with bf16 batch 64 17.9 to 11.9.
With AVX2 alone (Zen, 2.5 GHz, 2 cores; F.linear in fp32 4.0 ms at batch 1, 28 at 16, 146 at 256),
4096x4096, fp32, ms: int8 batch 1 1.6, 4 4.6, 16 11.1, 64 34, 256 138; int4 2.2, 6.4, 13.6, 35, 127;
dynamic int8 1.4, 2.5, 8.2, 32, 123 (quantize_dynamic 1.2 to 1.5, 2.1, 7.5, 30, 118). Before: a row
decoded, then a dot product for each token: int8 3.5 and 18.7 at batch 1 and 16, dynamic 49 and 58. What
gave it, int8 batch 1: decoding in registers 2.46, 16-bit words of fixed point 1.47; dynamic: rows of
levels in cache 2.3, words where the weight lies 1.3; batch 16: tiles of 4 rows by 3 tokens 18.7 -> 11.
Floor: the codes alone 0.6 ms; of products, pmaddwd takes 1.9 cycles for 16 there, 0.8 ms for two words at
batch 1 and 6.4 for one at 16; fp32 6.7 at 16. What is missing: int4 in groups of 128 at batch 1, sums of
each group leave the words, 2.0 to 2.2 against 1.5 per channel.
On a later AVX2 core (Zen 3, 2 cores, 32 MB of cache shared with strangers; interleaved loops, medians, us):
asking for the rows after these (batch 1 and 4, 4096x4096: dynamic 770 -> 438 and 1497 -> 915, int8 1072 ->
589; quantize_dynamic 884 and 1153); zero points of dynamic int8 taken from sums, one instruction of four
less at batch 1. Levels in cache: GCC stored the sums of a tile for want of registers, 33 of 71 products a ns
and core; a product and its addition as one piece of assembly 48, rows of 2 KiB 52: batch 256 71.7 -> 48 ms,
64 18.7 -> 13.3 (quantize_dynamic, with activations of 7 bits, 36 and 9.2: of 8 bits, pairs of byte products
do not fit the 16 bits that its instruction adds them in, and words take four instructions for 32 products
instead of three). int4 in groups of 128: bytes of codes times bytes of fixed point, sums in 16 bits, batch
1 / 4 / 8 1245 / 3223 / 6629 -> 738 / 2434 / 4429, bf16 in two bytes 1008 / 3049 -> 508 / 1663; all bytes of
64 columns side by side (with an array for each byte, addresses took as many instructions as products did,
and it was slower than words).
On an H200, bf16, 8192x8192, us (12 rounds; F.linear 34 to 16 rows, 50 for 256, 685 for 4096): 4096 rows,
decoded in slices for cuBLAS, int8 734, int4 718; 256 rows so 98, and by wgmma 92 (int8) and 106 (int4).
One row, before its steps came in a ring, int8 24, int4 19, 16 rows 32 and 25; in a ring it has not been
timed. Triton: int8 28, int4 38 for 1 and 16 rows. int_linear_quantized (Triton alone): 30 for 1 and 16
rows, 111 for 256, 1660 for 4096.
Left out: the reference above 3072x768, where it takes up to a second a call; torch's packed products in fp32
above batch 4, since they are plain loops there (3072x768, batch 16, one core: _weight_int8pack_mm 20 ms,
_weight_int4pack_mm_for_cpu 58 ms, F.linear 1.6 ms). quantize_dynamic takes fp32 only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn

from harness import Case, Contender, compiled, ours
from qnkernels import functional as F
from qnkernels.reference.int_linear import dequantize_weight, pack, quantize_weight, unpack
from qnkernels.reference.range import minmax

GROUP = {8: None, 4: 128}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
REFERENCE_WEIGHTS = 3072 * 768  # the largest layer that the reference is timed on
PLAIN_LOOP_BATCH = 4  # the largest batch for peers that are plain loops in fp32
INT8PACK_ON_GPU = (
    16  # the largest batch there: a thread an output, 0.6 s for 4096 tokens of 8192x8192 on an H200
)
PRODUCT_BATCH = 64  # from here on the ceiling is a product, not a copy


@dataclass(frozen=True)
class Kind:
    """What is quantized; with the dtype of the activations, a class of layers that compare."""

    name: str
    bits: int
    dynamic: bool = False  # activations, too, a range for each row

    @property
    def op(self) -> str:
        return "int_linear_quantized" if self.dynamic else "int_linear"


INT8, DYNAMIC, INT4 = KINDS = (
    Kind("weight-only int8", 8),
    Kind("dynamic int8", 8, dynamic=True),
    Kind("weight-only int4", 4),
)


@dataclass
class Inputs:
    x: torch.Tensor  # [batch, in]
    weight: torch.Tensor  # [out, in], unquantized, in the dtype of x
    bits: int
    packed: torch.Tensor
    scale: torch.Tensor  # [out, groups]
    zero_point: torch.Tensor


def make_inputs(shape, batch, bits, dtype, device, index) -> Inputs:
    generator = torch.Generator(device).manual_seed(index)
    weight = torch.randn(shape, device=device, generator=generator) / shape[1] ** 0.5
    x = torch.randn(batch, shape[1], device=device, generator=generator).to(dtype)
    low, high = minmax(weight, group_size=GROUP[bits] or shape[1])
    scale, zero_point = F.quantization_parameters(low, high, bits)
    packed = pack(quantize_weight(weight, scale, zero_point, bits), bits)
    return Inputs(x, weight.to(dtype), bits, packed, scale, zero_point.to(torch.uint8))


def call_ours(kind: Kind, inputs: Inputs) -> Callable:
    packed = inputs.packed, inputs.scale, inputs.zero_point
    return partial(getattr(F, kind.op), inputs.x, *packed, bits=inputs.bits)


def dense(dtype, inputs: Inputs) -> Callable:
    return partial(torch.nn.functional.linear, inputs.x.to(dtype), inputs.weight.to(dtype))


def decode_and_multiply(x, packed, scale, zero_point, bits: int) -> torch.Tensor:
    """The formula of weight-only layers, the product in the dtype of x."""
    return torch.nn.functional.linear(x, dequantize_weight(packed, scale, zero_point, bits).to(x.dtype))


def formula(call: Callable, inputs: Inputs) -> Callable:
    packed = inputs.packed, inputs.scale, inputs.zero_point
    return partial(call, inputs.x, *packed, inputs.bits)


def copy_codes(inputs: Inputs) -> Callable:
    return partial(torch.empty_like(inputs.packed).copy_, inputs.packed)


def symmetric_codes(inputs: Inputs, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed codes [out, in] and fp32 scale [out] of a symmetric quantizer."""
    scale = inputs.weight.float().abs().amax(1) / levels
    return torch.round(inputs.weight.float() / scale[:, None]).to(torch.int8), scale


def int8pack(inputs: Inputs) -> Callable:
    codes, scale = symmetric_codes(inputs, 127)
    return partial(torch._weight_int8pack_mm, inputs.x, codes, scale.to(inputs.x.dtype))


def int4pack(inputs: Inputs) -> Callable:
    """torch's own 4-bit product on our codes: w = (q - 8) * scale + offset, both in the dtype of x."""
    group = GROUP[4]
    codes = unpack(inputs.packed, 4).to(torch.int32)
    offset = (8 - inputs.zero_point.float()) * inputs.scale
    scales = torch.stack((inputs.scale, offset), -1).transpose(0, 1).contiguous().to(inputs.x.dtype)
    if inputs.x.device.type == "cpu":
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        return partial(torch._weight_int4pack_mm_for_cpu, inputs.x, packed, group, scales)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(pairs, 8)
    return partial(torch._weight_int4pack_mm, inputs.x, packed, group, scales)


def plain_layer(inputs: Inputs, dtype: torch.dtype | None = None) -> nn.Sequential:
    out, columns = inputs.weight.shape
    layer = nn.Linear(columns, out, bias=False, device=inputs.x.device, dtype=dtype or inputs.x.dtype)
    layer.weight.data.copy_(inputs.weight)
    return nn.Sequential(layer).eval().requires_grad_(False)


def dynamic_int8(inputs: Inputs) -> Callable:
    """torch.ao's dynamic quantization: 8-bit weights and activations, fp32 in and out."""
    layer = torch.ao.quantization.quantize_dynamic(
        plain_layer(inputs, torch.float32), {nn.Linear}, dtype=torch.qint8
    )
    return partial(layer, inputs.x.float())


def torchao(kind: Kind, inputs: Inputs) -> Callable:
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    layer = plain_layer(inputs)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig() if kind.dynamic else Int8WeightOnlyConfig())
    return partial(layer, inputs.x)


def quanto(kind: Kind, inputs: Inputs) -> Callable:
    from optimum.quanto import freeze, qint4, qint8, quantize

    layer = plain_layer(inputs)
    quantize(layer, weights=qint8 if kind.bits == 8 else qint4)
    freeze(layer)
    return partial(layer, inputs.x)


def bitsandbytes(kind: Kind, inputs: Inputs) -> Callable:
    """4 bits: NF4 with blocks of 64, its own format; 8 bits: LLM.int8."""
    import bitsandbytes

    layer_type = bitsandbytes.nn.Linear8bitLt if kind.bits == 8 else bitsandbytes.nn.Linear4bit
    options = {"has_fp16_weights": False} if kind.bits == 8 else {"compute_dtype": inputs.x.dtype}
    out, columns = inputs.weight.shape
    layer = layer_type(columns, out, bias=False, **options)
    layer.load_state_dict({"weight": inputs.weight.cpu()})
    return partial(layer.to(inputs.x.device), inputs.x)


def gemlite(kind: Kind, inputs: Inputs) -> Callable:
    """4 bits: our codes in its layout; 8 bits: its own symmetric quantizer of the channel. For 16-bit x."""
    from gemlite import helper

    options = {"device": inputs.x.device, "dtype": inputs.x.dtype}
    if kind.bits == 4:
        codes = unpack(inputs.packed, 4)
        layer = helper.A16W4_HQQ_INT(**options).from_weights(codes, inputs.scale, inputs.zero_point)
    else:
        maker = helper.A8W8_int8_dynamic if kind.dynamic else helper.A16W8_INT8
        layer = maker(**options).from_weights(inputs.weight.clone())
    return partial(layer, inputs.x)


# package -> (module that must import, kinds it has, device types, dtypes, call)
OPTIONAL = {
    "torchao": ("torchao", (INT8, DYNAMIC), ("cpu", "cuda"), tuple(SHORT), torchao),
    "optimum-quanto": ("optimum.quanto", (INT8, INT4), ("cpu", "cuda"), tuple(SHORT), quanto),
    "bitsandbytes": ("bitsandbytes", (INT8, INT4), ("cuda",), tuple(SHORT), bitsandbytes),
    "gemlite": ("gemlite", KINDS, ("cuda",), (torch.bfloat16,), gemlite),
}
WAIT = ("bitsandbytes",)  # for the device: no graph holds them


def imports(module: str) -> bool:
    return find_spec(module.split(".")[0]) is not None and find_spec(module) is not None


LEFT_OUT = [name for name, (module, *_) in OPTIONAL.items() if not imports(module)]


def contenders(kind: Kind, dtype, shape, batch, device_type) -> list[Contender]:
    ceiling = Contender("copy_ codes", "ceiling", copy_codes)
    if batch >= PRODUCT_BATCH:
        ceiling = Contender("F.linear bf16", "ceiling", partial(dense, torch.bfloat16))
    plain = Contender(f"F.linear {SHORT[dtype]}", "peer", partial(dense, dtype))
    small = shape[0] * shape[1] <= REFERENCE_WEIGHTS
    candidates = ours(kind.op, device_type, partial(call_ours, kind))
    found = [one for one in candidates if one.role == "ours" or small]
    found += [ceiling] if plain.name == ceiling.name else [plain, ceiling]
    if device_type == "cuda" and not kind.dynamic:
        call = compiled(decode_and_multiply)
        found.append(Contender("torch.compile", "peer", partial(formula, call)))
    if device_type == "cuda" or dtype == torch.bfloat16 or batch <= PLAIN_LOOP_BATCH:
        if kind is INT8 and (device_type == "cpu" or batch <= INT8PACK_ON_GPU):
            found.append(Contender("_weight_int8pack_mm", "peer", int8pack))
        if kind is INT4 and (device_type == "cpu" or dtype == torch.bfloat16):
            found.append(Contender("_weight_int4pack_mm", "peer", int4pack))
    if kind is DYNAMIC and dtype == torch.float32 and device_type == "cpu":
        found.append(Contender("quantize_dynamic", "peer", dynamic_int8))
    for name, (_, kinds, devices, dtypes, prepare) in OPTIONAL.items():
        if name not in LEFT_OUT and kind in kinds and device_type in devices and dtype in dtypes:
            label = f"{name} {version(name)}"
            found.append(Contender(label, "peer", partial(prepare, kind), capture=name not in WAIT))
    return found


def case(kind: Kind, dtype, shape, batch, device) -> Case:
    out, columns = shape
    codes, groups = out * columns * kind.bits // 8, columns // (GROUP[kind.bits] or columns)
    size = f"{out}x{columns} batch {batch}"
    return Case(
        op=kind.op,
        name=f"{kind.name} {SHORT[dtype]}, {size}",
        shape=size,
        dtype=str(dtype).removeprefix("torch."),
        moved_bytes=codes + 5 * out * groups + batch * (out + columns) * dtype.itemsize,
        operations=2 * batch * out * columns,
        inputs=partial(make_inputs, shape, batch, kind.bits, dtype),
        contenders=partial(contenders, kind, dtype, shape, batch),
        devices=(device,),
        gradients=False,
        **(TARGETS.get((kind, dtype, shape, batch), {}) if device == "cuda" else {}),
        quick=shape == QUICK[device] and batch in (1, 16) and dtype == torch.bfloat16,
        size=batch,
    )


SHAPES = ((768, 768), (3072, 768), (4096, 4096), (11008, 4096))  # out x in
BATCHES = (1, 4, 16, 64, 256)
GPU_SHAPES = ((4096, 4096), (8192, 8192))
GPU_BATCHES = {torch.float32: (1, 256), torch.bfloat16: (1, 16, 256, 4096)}
QUICK = {"cpu": (4096, 4096), "cuda": (8192, 8192)}
CUBLAS = "F.linear bf16"  # the ceiling, too, from PRODUCT_BATCH tokens on
TARGETS = {
    (kind, torch.bfloat16, QUICK["cuda"], batch): reached
    for kind, batch, reached in (
        *((INT8, batch, dict(peer_target=(1.8, CUBLAS))) for batch in (1, 16)),
        (INT8, 4096, dict(target=1 / 0.95)),
        *((INT4, batch, dict(peer_target=(3.0, CUBLAS))) for batch in (1, 16)),
        (INT4, 256, dict(target=1.0)),
    )
}
CASES = [
    *(
        case(kind, dtype, shape, batch, "cpu")
        for kind in KINDS
        for dtype in SHORT
        for shape in SHAPES
        for batch in BATCHES
    ),
    *(
        case(kind, dtype, shape, batch, "cuda")
        for kind in KINDS
        for dtype in SHORT
        for shape in GPU_SHAPES
        for batch in GPU_BATCHES[dtype]
    ),
]


def test_int_linear(timed):
    """One row: a contender on a case. The fixture measures and reports."""
