"""The typed face of the ops. Plain integers and floats are accepted where the ops take 0-d tensors."""

import torch

from . import ops

__all__ = [
    "block_noise",
    "dynamic_fake_quantize",
    "fake_quantize",
    "histogram_range",
    "int_embedding",
    "int_linear",
    "int_linear_quantized",
    "kmeans_assign",
    "kmeans_update",
    "low_precision_linear",
    "low_precision_operands_",
    "minmax",
    "moving_fake_quantize",
    "moving_fake_quantize_",
    "moving_low_precision_linear",
    "noisy_linear",
    "pq_decode",
    "pq_embedding",
    "pq_linear",
    "quantization_parameters",
    "quantize_gradient",
    "round_to",
    "update_range_",
]

MIN_BITS, MAX_BITS = 2, 16


def _integer(
    argument: str, value: int | torch.Tensor, low: int, high: int, device: torch.device
) -> torch.Tensor:
    """A 0-d int64 tensor on `device`; a plain integer must lie in [low, high]."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an integer or a 0-d int64 tensor, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{argument}: expected an integer in [{low}, {high}], got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)


def _bits(bits: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    return _integer("bits", bits, MIN_BITS, MAX_BITS, device)


def _seed(seed: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    return _integer("seed", seed, 0, 2**63 - 1, device)


def _parameter(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value if value.dtype is torch.float32 else value.float()
    return torch.full((), value, dtype=torch.float32, device=device)


def minmax(
    x: torch.Tensor, axis: int | None = None, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of x, fp32: 0-d, [channels] along `axis`, or [.., groups] of a row."""
    return ops.range.minmax(x, axis, group_size)


def histogram_range(
    x: torch.Tensor, bits: int | torch.Tensor = 8, axis: int | None = None, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipping range of least squared error for a 2^bits quantizer, from a 2048-bin histogram of x.

    Shapes as for `minmax`.
    """
    return ops.range.histogram_range(x, _bits(bits, x.device), axis, group_size)


def quantization_parameters(
    low: torch.Tensor, high: torch.Tensor, bits: int | torch.Tensor = 8, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (fp32, integer valued) of the 2^bits quantizer over each range [low, high].

    low, high: fp32 of any one shape, which the results have. The range is widened to hold 0, so that 0 is
    a level: s = (high - low) / (2^bits - 1), z = round(-low / s). symmetric: z = 2^(bits - 1), and -high
    and high fit. A range of width 0 gives s = 1.
    """
    return ops.range.quantization_parameters(low, high, _bits(bits, low.device), symmetric)


def update_range_(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    observer: str = "minmax",
    every: int = 1,
    momentum: float = 0.1,
    axis: int | None = None,
    group_size: int | None = None,
) -> None:
    """Count a forward in `step` (0-d int64) and refresh the range (low, high) in place where it is due.

    Due: the first forward and, for every > 0, each forward whose number is a multiple of `every`. The
    decision is taken on the device, without a host sync. Observers: "minmax" and "histogram" replace
    the range, "ema_minmax" moves it by `momentum`.
    """
    bits = _bits(bits, x.device)
    ops.range.update_range_(x, low, high, step, bits, observer, every, momentum, axis, group_size)


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float,
    bits: int | torch.Tensor = 8,
    axis: int | None = None,
    group_size: int | None = None,
    p: float = 1.0,
    seed: int | torch.Tensor = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Quantization noise at rate p: y = (clamp(round(x / s + z), 0, 2^bits - 1) - z) * s where noised.

    x: fp32, bf16 or fp16, any shape. scale, zero_point: 0-d, [channels] along `axis`, or [.., groups]
    with `group_size` elements of a row each. bits: 2 to 16. The same seed noises the same elements on
    every backend. Returns the shape of x, in `dtype` (that of x by default).
    Gradient: straight-through; stopped where x is noised and outside [-z s, (2^bits - 1 - z) s].
    Source: Quant-Noise, arXiv 2004.07320, sections 3.1 and 4.2.
    Raises ValueError (shapes, p, bits, device) and TypeError (dtypes).
    """
    return ops.fake_quantize.fake_quantize(
        x,
        _parameter(scale, x.device),
        _parameter(zero_point, x.device),
        _bits(bits, x.device),
        p,
        _seed(seed, x.device),
        axis,
        group_size,
        dtype,
    )


def noisy_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float,
    bits: int | torch.Tensor = 8,
    axis: int | None = None,
    group_size: int | None = None,
    p: float = 1.0,
    seed: int | torch.Tensor = 0,
) -> torch.Tensor:
    """F.linear(x, fake_quantize(weight, ...), bias), with one pass over the weight's gradient less.

    x [..., in], weight [out, in] and bias [out] or None, all of one dtype; the rest as for fake_quantize.
    Returns [..., out]. Raises ValueError (shapes, p, bits, device) and TypeError (dtypes).
    """
    if x.dtype != weight.dtype:
        raise TypeError(f"x: expected the dtype of weight, {weight.dtype}, got {x.dtype}")
    device = weight.device
    scale, zero_point = _parameter(scale, device), _parameter(zero_point, device)
    quantizer = (scale, zero_point, _bits(bits, device), p, _seed(seed, device), axis, group_size)
    return ops.noisy_linear.noisy_linear(x, weight, bias, *quantizer)


def dynamic_fake_quantize(
    x: torch.Tensor,
    bits: int | torch.Tensor = 8,
    per_sample: bool = False,
    stochastic: bool = False,
    seed: int | torch.Tensor = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Fake quantization of x over its own range, or with `per_sample` of each x[i] over its own.

    x: fp32, bf16 or fp16. The range runs from the smallest to the largest value, widened to hold 0, which is
    a level; bits: 2 to 16. stochastic: values are rounded up or down at random, so that the mean is right;
    the same seed gives the same result on every backend. Returns the shape of x, in `dtype` (that of x by
    default). Gradient: straight-through (identity, since the range holds every value).
    Raises ValueError (shapes, bits, device) and TypeError (dtypes).
    """
    seed = _seed(seed, x.device)
    return ops.dynamic.dynamic_fake_quantize(x, _bits(bits, x.device), seed, per_sample, stochastic, dtype)


def moving_fake_quantize(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    momentum: float = 0.1,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Fake quantization of x over a moving average of its range, which x itself moves first, in one op.

    low, high (fp32) and step (0-d int64) are updated in place, as by `update_range_` with "ema_minmax".
    Returns the shape of x, in `dtype` (that of x by default). Gradient: straight-through, stopped where x
    lies outside the range. Raises ValueError (shapes, bits, momentum, device) and TypeError (dtypes).
    """
    arguments = x, low, high, step, _bits(bits, x.device), momentum, axis, group_size, dtype
    return ops.dynamic.moving_fake_quantize(*arguments)


def moving_fake_quantize_(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    momentum: float = 0.1,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same without a gradient; returns the quantized x with its scale and zero point."""
    arguments = x.detach(), low, high, step, _bits(bits, x.device), momentum, axis, group_size, dtype
    return ops.dynamic.moving_fake_quantize_(*arguments)


def quantize_gradient(
    x: torch.Tensor, bits: int | torch.Tensor = 8, seed: int | torch.Tensor = 0
) -> torch.Tensor:
    """A copy of x whose gradient is quantized: over the range of each sample, with stochastic rounding.

    Raises ValueError (bits) and TypeError (dtypes).
    """
    return ops.dynamic.quantize_gradient(x, _bits(bits, x.device), _seed(seed, x.device))


def low_precision_operands_(
    x: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    momentum: float = 0.1,
    moves: bool = True,
    per_channel: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first three arguments of low_precision_linear's forward: quantized x, `outside`, quantized weight.

    x as by `moving_fake_quantize`; unless `moves`, over the range as it stands (that of x where step is 0),
    and nothing is changed. weight [out, in] as by `dynamic_fake_quantize`, with per_sample=per_channel, in
    the dtype of x. outside: which elements of x lie outside the levels, a bit for each, uint8 [(n + 7) // 8].
    Neither has a gradient. Raises ValueError (shapes, bits, momentum, device) and TypeError (dtypes).
    """
    state = low, high, step, _bits(bits, x.device)
    return ops.low_precision.low_precision_operands_(
        x.detach(), weight.detach(), *state, momentum, moves, per_channel
    )


def low_precision_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    quantized_x: torch.Tensor,
    quantized_weight: torch.Tensor,
    outside: torch.Tensor | None = None,
    grad_bits: int | torch.Tensor | None = 8,
    seed: int | torch.Tensor = 0,
) -> torch.Tensor:
    """F.linear(quantized_x, quantized_weight, bias) with straight-through gradients to x and weight.

    x [..., in]; the quantized x, weight [out, in] and bias [out] have one dtype, which the result has.
    outside: the elements of x that get no gradient, as from `low_precision_operands_`. grad_bits: the
    gradient of the result is quantized as by `quantize_gradient`, first of all; None leaves it as it is, and
    no seed is needed. Raises ValueError (bits) and TypeError (dtypes).
    """
    if not x.dtype == quantized_x.dtype == quantized_weight.dtype:
        expected = f"that of quantized_weight, {quantized_weight.dtype}"
        raise TypeError(f"x and quantized_x: expected {expected}, got {x.dtype} and {quantized_x.dtype}")
    width, drawn = None, None
    if grad_bits is not None:
        width, drawn = _bits(grad_bits, x.device), _seed(seed, x.device)
    quantized = quantized_x, quantized_weight, outside
    return ops.low_precision.low_precision_linear(x, weight, bias, *quantized, width, drawn)


def moving_low_precision_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    high: torch.Tensor,
    step: torch.Tensor,
    bits: int | torch.Tensor = 8,
    momentum: float = 0.1,
    moves: bool = True,
    per_channel: bool = True,
    grad_bits: int | torch.Tensor | None = 8,
    seed: int | torch.Tensor = 0,
) -> torch.Tensor:
    """low_precision_linear of x, weight and bias, all in one dtype, over what low_precision_operands_ gives.

    Where nothing looks at ops it is one call, with the same bits as the two.
    """
    if grad_bits is None:
        seed = None
    else:
        grad_bits, seed = _bits(grad_bits, x.device), _seed(seed, x.device)
    quantizer = low, high, step, _bits(bits, x.device), momentum, moves, per_channel
    return ops.low_precision.moving_low_precision_linear(x, weight, bias, *quantizer, grad_bits, seed)


def block_noise(
    weight: torch.Tensor,
    block_size: int,
    p: float,
    seed: int | torch.Tensor = 0,
    kind: str = "zero",
    rescale: bool = True,
    dtype: torch.dtype | None = None,
    codebook: torch.Tensor | None = None,
) -> torch.Tensor:
    """Noise blocks of `block_size` consecutive weights of weight [out, in] at rate p.

    kind "zero": noised blocks become 0 and, with `rescale`, the others are multiplied by 1 / (1 - p);
    "mean": noised blocks become their mean; "centroid": noised blocks become the nearest row (the lowest
    among equals) of codebook fp32 [K, block_size], K up to 65,536 and block_size up to 64.
    Returns [out, in] in `dtype` (that of weight by default).
    Gradient: straight-through (identity). Source: Quant-Noise, arXiv 2004.07320, section 4.2.
    Raises ValueError (shapes, p, block_size, kind, device) and TypeError (dtypes).
    """
    seed = _seed(seed, weight.device)
    return ops.block_noise.block_noise(weight, block_size, p, seed, kind, rescale, dtype, codebook)


def int_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    group_size: int | None = None,
) -> torch.Tensor:
    """y = x @ ((q - z) * s)^T + bias over a packed integer weight.

    x [..., in] fp32, bf16 or fp16; weight uint8 [out, in * bits / 8], unsigned codes, low bits first;
    scale fp32 and zero_point uint8 [out] or [out, in / group_size]; without a zero point
    z = 2^(bits - 1); bits 4 or 8. Returns [..., out] in the dtype of x, accumulated in fp32.
    Gradients flow to x and bias. Raises ValueError (shapes, bits, device) and TypeError (dtypes).
    """
    scale, zero_point = _by_group(weight, scale, zero_point, bits, group_size)
    return ops.int_linear.int_linear(x, weight, scale, zero_point, bias, bits)


def int_linear_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    group_size: int | None = None,
    x_scale: torch.Tensor | float | None = None,
    x_zero_point: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """int_linear in integer arithmetic: activations are quantized to 8 bits, too; the rest as int_linear.

    Without x_scale and x_zero_point each row of x has a range of its own, from its smallest to its largest
    value, widened to hold 0 ("dynamic"). With them, 0-d fp32 or plain numbers as from
    `quantization_parameters`, that quantizer serves all of x, and values outside its range are clamped
    ("static"). Products and sums over a group (or over up to 32,768 columns of it) are exact integers;
    y = sum * scale * x_scale + bias in fp32. A row with NaN, or (dynamic) infinity, gives NaN. Gradients
    flow to x, straight through the rounding but not from outside a given range, and to bias.
    """
    scale, zero_point = _by_group(weight, scale, zero_point, bits, group_size)
    if x_scale is not None:
        x_scale = _parameter(x_scale, x.device)
    if x_zero_point is not None:
        x_zero_point = _parameter(x_zero_point, x.device)
    arguments = (x, weight, scale, zero_point, bias, bits, x_scale, x_zero_point)
    return ops.int_linear.int_linear_quantized(*arguments)


def int_embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bits: int = 8,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of a packed integer table: indices [...] int64 -> [..., in] in `dtype`, else as int_linear."""
    scale, zero_point = _by_group(weight, scale, zero_point, bits, group_size)
    return ops.int_linear.int_embedding(indices, weight, scale, zero_point, bits, dtype)


def kmeans_assign(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of each point: index int32 [n], lowest among equals, and squared distance fp32 [n].

    points fp32 [n, d], d up to 64; centroids fp32 [K, d], K up to 65,536. The choice is that of fp32
    arithmetic: where two centroids are equally near within its rounding, backends may differ.
    Raises ValueError (shapes, device) and TypeError (dtypes).
    """
    return ops.kmeans.kmeans_assign(points, centroids)


def kmeans_update(
    points: torch.Tensor,
    codes: torch.Tensor,
    n_clusters: int,
    exponent: int,
    weight_exponent: int = 0,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the points (int64 [K, d], unit 2^-exponent) and masses (int64 [K]) by cluster, in any order.

    points fp32 [n, d], codes int32 [n]. weights fp32 [n]: masses are in the unit 2^-weight_exponent; without
    weights they are counts. Raises ValueError, TypeError, and IndexError for codes outside [0, K) on the CPU.
    """
    arguments = (points, codes, n_clusters, exponent, weight_exponent, weights)
    return ops.kmeans.kmeans_update(*arguments)


def pq_decode(codes: torch.Tensor, codebook: torch.Tensor, codebook_grad: str = "mean") -> torch.Tensor:
    """Weight [rows, n_blocks * d] whose block b of row o is codebook[codes[o, b]]; arguments as pq_linear."""
    return ops.pq.pq_decode(codes, codebook, codebook_grad)


def pq_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None = None,
    codebook_grad: str = "mean",
) -> torch.Tensor:
    """y = x @ pq_decode(codes, codebook)^T + bias, without the dense weight.

    x [..., in] fp32, bf16 or fp16; codes uint8 or uint16 [out, in / d], below K (not checked); codebook
    [K, d], K up to 256 or 65,536, d up to 64. Returns [..., out] in the dtype of x, accumulated in fp32.
    Gradients flow to x, codebook and bias; that of a codeword is the mean of the dense weight's gradient
    over the codeword's blocks (arXiv 1907.05686), or with codebook_grad="sum" the sum, the true derivative.
    Raises ValueError (shapes, device) and TypeError (dtypes).
    """
    return ops.pq.pq_linear(x, codes, codebook, bias, codebook_grad)


def pq_embedding(
    indices: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, codebook_grad: str = "mean"
) -> torch.Tensor:
    """Rows of a product-quantized table: indices [...] int64 -> [..., n_blocks * d], as the codebook."""
    return ops.pq.pq_embedding(indices, codes, codebook, codebook_grad)


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to the values of a narrower `dtype`, in its own dtype; the gradient is straight-through."""
    return ops.rounding.round_to(x, dtype)


def _by_group(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    group_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """scale and zero_point as [out, groups]."""
    if scale.dim() == 1:
        scale = scale[:, None]
    if zero_point is not None and zero_point.dim() == 1:
        zero_point = zero_point[:, None]
    if group_size is not None and weight.dim() == 2 and scale.dim() == 2:
        in_features, groups = weight.shape[1] * 8 // bits, scale.shape[1]
        if group_size < 1 or groups * group_size != in_features:
            raise ValueError(
                f"group_size: expected {in_features} inputs / {groups} groups of scale, got {group_size}"
            )
    return scale, zero_point
