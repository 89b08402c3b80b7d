"""The typed face of the ops. Plain integers and floats are accepted where the ops take 0-d tensors."""

from .arguments import MAX_BITS, MIN_BITS
from .integer import (
    int_embedding,
    int_linear,
    int_linear_quantized,
)
from .low_precision import (
    dynamic_fake_quantize,
    low_precision_linear,
    low_precision_operands_,
    moving_fake_quantize,
    moving_fake_quantize_,
    moving_low_precision_linear,
    quantize_gradient,
)
from .noise import (
    block_noise,
    fake_quantize,
    noisy_linear,
    round_to,
)
from .product import (
    kmeans_assign,
    kmeans_update,
    pq_decode,
    pq_embedding,
    pq_linear,
)
from .ranges import (
    histogram_range,
    minmax,
    quantization_parameters,
    update_range_,
)

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
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
