"""The ops, torch.ops.qnkernels.*: schema, argument checks, fake kernel, autograd, dispatch."""

from . import block_noise, fake_quantize, int_linear, noisy_linear, range

OPS = (
    "minmax",
    "histogram_range",
    "quantization_parameters",
    "update_range_",
    "fake_quantize",
    "fake_quantize_backward",
    "block_noise",
    "int_linear",
    "int_linear_backward",
    "int_embedding",
)

__all__ = ["OPS", "block_noise", "fake_quantize", "int_linear", "noisy_linear", "range"]
