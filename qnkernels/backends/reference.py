"""The reference as a backend: any device, no compiler."""

from collections.abc import Callable

from ..reference import block_noise, fake_quantize, int_linear, range


def load() -> dict[str, Callable]:
    functions = (
        range.minmax,
        range.histogram_range,
        range.quantization_parameters,
        range.update_range_,
        fake_quantize.fake_quantize,
        fake_quantize.fake_quantize_backward,
        block_noise.block_noise,
        int_linear.int_linear,
        int_linear.int_linear_backward,
        int_linear.int_embedding,
    )
    return {function.__name__: function for function in functions}
