"""The reference as a backend: any device, no compiler."""

from collections.abc import Callable

from ..reference import block_noise, dynamic, fake_quantize, int_linear, kmeans, low_precision, pq, range


def load() -> dict[str, Callable]:
    functions = (
        range.minmax,
        range.histogram_range,
        range.quantization_parameters,
        range.update_range_,
        fake_quantize.fake_quantize,
        fake_quantize.fake_quantize_backward,
        block_noise.block_noise,
        dynamic.dynamic_fake_quantize,
        dynamic.moving_fake_quantize_,
        low_precision.low_precision_operands_,
        low_precision.stop_gradient_,
        int_linear.int_linear,
        int_linear.int_linear_quantized,
        int_linear.int_linear_backward,
        int_linear.int_embedding,
        kmeans.kmeans_assign,
        kmeans.kmeans_update,
        kmeans.kmeans_step,
        kmeans.kmeans_bounded_step_,
        pq.pq_decode,
        pq.pq_decode_backward,
        pq.pq_linear,
        pq.pq_linear_backward,
        pq.pq_embedding,
        pq.pq_embedding_backward,
    )
    return {function.__name__: function for function in functions}
