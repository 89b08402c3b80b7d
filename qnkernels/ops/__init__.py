"""The ops, torch.ops.qnkernels.*: schema, argument checks, fake kernel, autograd, dispatch."""

from . import block_noise, dynamic, fake_quantize, int_linear, kmeans, noisy_linear, pq, range, rounding

OPS = (
    "minmax",
    "histogram_range",
    "quantization_parameters",
    "update_range_",
    "fake_quantize",
    "fake_quantize_backward",
    "block_noise",
    "dynamic_fake_quantize",
    "moving_fake_quantize_",
    "int_linear",
    "int_linear_quantized",
    "int_linear_backward",
    "int_embedding",
    "kmeans_assign",
    "kmeans_update",
    "kmeans_step",
    "pq_decode",
    "pq_decode_backward",
    "pq_linear",
    "pq_linear_backward",
    "pq_embedding",
    "pq_embedding_backward",
)

__all__ = [
    "OPS",
    "block_noise",
    "dynamic",
    "fake_quantize",
    "int_linear",
    "kmeans",
    "noisy_linear",
    "pq",
    "range",
    "rounding",
]
