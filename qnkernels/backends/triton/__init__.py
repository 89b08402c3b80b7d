"""Triton kernels: every op on any NVIDIA GPU without a compiler, or on the CPU under Triton's interpreter."""

from collections.abc import Callable

import torch

from .. import BackendUnavailable


def load() -> dict[str, Callable]:
    """The callables by op name; raises BackendUnavailable where Triton or a GPU is missing."""
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailable(f"triton cannot be imported ({error}); run `pip install triton`") from error
    if triton.knobs.runtime.interpret:
        return kernels()
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "triton needs an NVIDIA GPU that torch can use; to run its kernels on the CPU, slowly, set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise BackendUnavailable(
            "the triton kernels need a GPU of compute capability 8.0 or newer, this one has "
            f"{major}.{minor}; use the reference backend"
        )
    return kernels()


def kernels() -> dict[str, Callable]:
    """The callables by op name, without asking whether they can run here."""
    from . import (
        block_noise,
        dynamic,
        fake_quantize,
        int_embedding,
        int_linear,
        int_linear_backward,
        int_linear_quantized,
        kmeans,
        low_precision,
        parameters,
        pq_embedding,
        pq_linear,
        pq_linear_backward,
        range,
    )

    functions = (
        range.minmax,
        range.histogram_range,
        parameters.quantization_parameters,
        range.update_range_,
        fake_quantize.fake_quantize,
        fake_quantize.fake_quantize_backward,
        block_noise.block_noise,
        dynamic.dynamic_fake_quantize,
        dynamic.moving_fake_quantize_,
        low_precision.low_precision_operands_,
        low_precision.stop_gradient_,
        int_linear.int_linear,
        int_linear_backward.int_linear_backward,
        int_embedding.int_embedding,
        int_linear_quantized.int_linear_quantized,
        kmeans.kmeans_assign,
        kmeans.kmeans_update,
        kmeans.kmeans_step,
        kmeans.kmeans_bounded_step_,
        pq_embedding.pq_decode,
        pq_embedding.pq_decode_backward,
        pq_embedding.pq_embedding,
        pq_embedding.pq_embedding_backward,
        pq_linear.pq_linear,
        pq_linear_backward.pq_linear_backward,
    )
    return {function.__name__: function for function in functions}
