"""int_linear: a linear layer over a packed 8-bit or 4-bit weight, for serving.

Bytes (4096x4096, batch m, bf16 activations): the codes, 16.8 MB in 8 bits and 8.4 MB in 4, and 2m(in + out).
Operations: 2m per weight, 33.5 M m, and one decode (subtract, scale) per weight.
Floor: batch 1 and 16 the codes read once (the ceiling copies them: read and written, so a ratio below 1 is
possible); batch 256 the bf16 product, whose ceiling is F.linear in bf16.
Prediction, 2 cores with AMX: the plain kernels of today decode to fp32 and multiply there, so 1 to 2x the
copy at batch 1, and at batch 256 the ratio of the fp32 to the bf16 product, some 6x. The fast kernels
(VNNI to batch 8, AMX above) should reach 0.6x and 1.2x.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn

from harness import Case, Contender, ours
from qnkernels import functional as F
from qnkernels.reference.int_linear import pack, quantize_weight, unpack
from qnkernels.reference.range import minmax

GROUP = {8: None, 4: 128}


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


def call_ours(inputs: Inputs) -> Callable:
    return partial(F.int_linear, inputs.x, inputs.packed, inputs.scale, inputs.zero_point, bits=inputs.bits)


def dense(dtype, inputs: Inputs) -> Callable:
    return partial(torch.nn.functional.linear, inputs.x.to(dtype), inputs.weight.to(dtype))


def symmetric_codes(inputs: Inputs, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed codes [out, in] and fp32 scale [out] of a symmetric quantizer."""
    scale = inputs.weight.float().abs().amax(1) / levels
    return torch.round(inputs.weight.float() / scale[:, None]).to(torch.int8), scale


def int8pack(inputs: Inputs) -> Callable:
    codes, scale = symmetric_codes(inputs, 127)
    return partial(torch._weight_int8pack_mm, inputs.x, codes, scale.to(inputs.x.dtype))


def int4pack(inputs: Inputs) -> Callable:
    """torch's own 4-bit product on our codes: w = (q - 8) * scale + offset, bf16 scale and offset."""
    group = GROUP[4]
    codes = unpack(inputs.packed, 4).to(torch.int32)
    offset = (8 - inputs.zero_point.float()) * inputs.scale
    scales = torch.stack((inputs.scale, offset), -1).transpose(0, 1).contiguous().bfloat16()
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
    return inference(layer, inputs.x.float())


def inference(layer: nn.Module, x: torch.Tensor) -> Callable:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return layer(x)

    return run


def torchao(inputs: Inputs) -> Callable:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = plain_layer(inputs)
    quantize_(layer, Int8WeightOnlyConfig())
    return inference(layer, inputs.x)


def quanto(inputs: Inputs) -> Callable:
    from optimum.quanto import freeze, qint4, qint8, quantize

    layer = plain_layer(inputs)
    quantize(layer, weights=qint8 if inputs.bits == 8 else qint4)
    freeze(layer)
    return inference(layer, inputs.x)


def bitsandbytes(inputs: Inputs) -> Callable:
    """4 bits: NF4 with blocks of 64, its own format; 8 bits: LLM.int8."""
    import bitsandbytes

    layer_type = bitsandbytes.nn.Linear8bitLt if inputs.bits == 8 else bitsandbytes.nn.Linear4bit
    options = {"has_fp16_weights": False} if inputs.bits == 8 else {"compute_dtype": inputs.x.dtype}
    out, columns = inputs.weight.shape
    layer = layer_type(columns, out, bias=False, **options)
    layer.load_state_dict({"weight": inputs.weight.cpu()})
    return inference(layer.to(inputs.x.device), inputs.x)


# package -> (module that must import, bits it has, device types, call); bitsandbytes waits for the device
OPTIONAL = {
    "torchao": ("torchao", (8,), ("cpu", "cuda"), torchao),
    "optimum-quanto": ("optimum.quanto", (8, 4), ("cpu", "cuda"), quanto),
    "bitsandbytes": ("bitsandbytes", (8, 4), ("cuda",), bitsandbytes),
}


def imports(module: str) -> bool:
    return find_spec(module.split(".")[0]) is not None and find_spec(module) is not None


LEFT_OUT = [name for name, (module, *_) in OPTIONAL.items() if not imports(module)]


def contenders(batch, bits, dtype, device_type) -> list[Contender]:
    ceiling = "F.linear bf16" if batch >= 256 else "copy_ codes"
    found = [
        *ours("int_linear", device_type, call_ours),
        Contender("F.linear fp32", "peer", partial(dense, torch.float32)),
        Contender("F.linear bf16", "peer", partial(dense, torch.bfloat16)),
        Contender(
            "copy_ codes",
            "peer",
            lambda inputs: partial(torch.empty_like(inputs.packed).copy_, inputs.packed),
        ),
    ]
    found = [Contender(one.name, "ceiling", one.prepare) if one.name == ceiling else one for one in found]
    if bits == 8:
        found.append(Contender("_weight_int8pack_mm", "peer", int8pack))
    if bits == 8 and device_type == "cpu":
        found.append(Contender("quantize_dynamic", "peer", dynamic_int8))
    if bits == 4 and dtype == torch.bfloat16:
        found.append(Contender("_weight_int4pack_mm", "peer", int4pack))
    for name, (_, their_bits, devices, prepare) in OPTIONAL.items():
        if name not in LEFT_OUT and bits in their_bits and device_type in devices:
            capture = name != "bitsandbytes"
            found.append(Contender(f"{name} {version(name)}", "peer", prepare, capture=capture))
    return found


def case(shape, batch, bits, dtype, quick=False) -> Case:
    out, columns = shape
    types = str(dtype).removeprefix("torch.")
    codes, groups = out * columns * bits // 8, columns // (GROUP[bits] or columns)
    return Case(
        op="int_linear",
        name=f"{out}x{columns} batch {batch} int{bits} {types}",
        shape=f"{out}x{columns} batch {batch}",
        dtype=types,
        moved_bytes=codes + 5 * out * groups + batch * (out + columns) * dtype.itemsize,
        operations=2 * batch * out * columns,
        inputs=partial(make_inputs, shape, batch, bits, dtype),
        contenders=partial(contenders, batch, bits, dtype),
        quick=quick,
    )


CASES = [
    case(shape, batch, bits, dtype, quick=shape[0] == 4096 and batch < 256)
    for shape, dtype in (
        ((3072, 768), torch.float32),
        ((3072, 768), torch.bfloat16),
        ((4096, 4096), torch.bfloat16),
    )
    for bits in (8, 4)
    for batch in (1, 16, 256)
]


def test_int_linear(timed):
    """One row: a contender on a case. The fixture measures and reports."""
