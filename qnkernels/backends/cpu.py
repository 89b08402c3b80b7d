"""Bindings of the C++ kernels: tensors in, one C call, tensors out."""

import ctypes
import functools
import os
from collections.abc import Callable

import torch

from ..reference import pq as reference_pq
from ..reference import range as reference_range
from ..reference.philox import threshold
from . import BackendUnavailable
from .cpu_kmeans import KMeansKernels
from .cpu_pq import PqKernels
from .memory import empty
from .native import (
    CPU_ARGTYPES,
    DTYPES,
    NOISE_KINDS,
    declare,
    fp32_contiguous,
    layout,
    open_library,
    pointer,
    raise_for_status,
)

ISAS = ("portable", "avx2", "avx512", "amx")
# rows of a gradient from which on products with decoded columns, in this dtype, are faster than the kernel
PRODUCT_ROWS = {torch.float32: 32, torch.bfloat16: 16}
DECODED_VALUES = 2**21  # of a weight, in memory at a time


def load() -> dict[str, Callable]:
    wanted = os.environ.get("QNKERNELS_ISA", "amx")
    if wanted not in ISAS:
        raise BackendUnavailable(f"QNKERNELS_ISA: expected one of {', '.join(ISAS)}, got {wanted!r}")
    library = open_library("cpu")
    library.qnk_cpu_isa.restype = ctypes.c_char_p
    kernels = CpuKernels(declare(library, "cpu", CPU_ARGTYPES), library.qnk_cpu_isa().decode())
    in_place = (
        "moving_fake_quantize",
        "low_precision_operands",
        "stop_gradient",
        "kmeans_bounded_step",
    )
    # of block_noise, of int_linear_backward, and those that are named otherwise
    parts = ("block_noise_centroid", "int_decode", *in_place)
    names = [name for name in CPU_ARGTYPES if name not in parts]
    names += [
        "pq_decode",
        "pq_decode_backward",
        "pq_embedding_backward",
        "update_range_",
        *(f"{name}_" for name in in_place),
    ]
    return {name: getattr(kernels, name) for name in names}


class CpuKernels(KMeansKernels, PqKernels):
    """One method per op, with the signature of the reference; tensors are contiguous and checked."""

    def __init__(self, functions: dict, isa: str) -> None:
        self._c = functions
        self._isa = isa
        self._int_linear = functions["int_linear"]
        self._int_linear_quantized = functions["int_linear_quantized"]
        self._low_precision_operands = functions["low_precision_operands"]
        self.pq_decode_backward = reference_pq.pq_decode_backward
        self.pq_embedding_backward = reference_pq.pq_embedding_backward
        self.update_range_ = functools.partial(
            reference_range.update_range_, minmax=self.minmax, histogram_range=self.histogram_range
        )

    def minmax(self, x, axis=None, group_size=None):
        low, high = self._empty_range(x, axis, group_size)
        sizes = layout(x, axis, group_size)
        arguments = (x.data_ptr(), DTYPES[x.dtype], *sizes, low.data_ptr(), high.data_ptr())
        raise_for_status(self._c["minmax"](*arguments))
        return low, high

    def histogram_range(self, x, bits, axis=None, group_size=None):
        low, high = self._empty_range(x, axis, group_size)
        sizes = layout(x, axis, group_size)
        arguments = (x.data_ptr(), DTYPES[x.dtype], *sizes, bits.data_ptr(), low.data_ptr(), high.data_ptr())
        raise_for_status(self._c["histogram_range"](*arguments))
        return low, high

    def quantization_parameters(self, low, high, bits, symmetric=False):
        scale, zero_point = torch.empty_like(low), torch.empty_like(low)
        status = self._c["quantization_parameters"](
            *(low.data_ptr(), high.data_ptr(), low.numel(), bits.data_ptr(), symmetric),
            *(scale.data_ptr(), zero_point.data_ptr()),
        )
        raise_for_status(status)
        return scale, zero_point

    @staticmethod
    def _empty_range(x, axis, group_size):
        if group_size is not None:
            shape = (*x.shape[:-1], x.shape[-1] // group_size)
        else:
            shape = () if axis is None else (x.shape[axis],)
        return torch.empty(shape), torch.empty(shape)

    def fake_quantize(
        self, x, scale, zero_point, bits, p, seed, axis=None, group_size=None, dtype=None, outside=None
    ):
        y = empty(x.shape, dtype or x.dtype)
        _, channels, inner = layout(x, axis, group_size)
        status = self._c["fake_quantize"](
            *(x.data_ptr(), DTYPES[x.dtype], y.data_ptr(), DTYPES[y.dtype], x.numel()),
            *(scale.data_ptr(), zero_point.data_ptr(), channels, inner),
            *(bits.data_ptr(), threshold(p), seed.data_ptr(), pointer(outside)),
        )
        raise_for_status(status)
        return y

    def fake_quantize_backward(
        self, grad, x, scale, zero_point, bits, p, seed, axis=None, group_size=None, outside=None, out=None
    ):
        grad_x = empty(x.shape, x.dtype) if out is None else out
        _, channels, inner = layout(x, axis, group_size)
        status = self._c["fake_quantize_backward"](
            *(
                grad.data_ptr(),
                DTYPES[grad.dtype],
                x.data_ptr(),
                grad_x.data_ptr(),
                DTYPES[x.dtype],
                x.numel(),
            ),
            *(scale.data_ptr(), zero_point.data_ptr(), channels, inner),
            *(bits.data_ptr(), threshold(p), seed.data_ptr(), pointer(outside)),
        )
        raise_for_status(status)
        return grad_x

    def dynamic_fake_quantize(self, x, bits, seed, per_sample, stochastic, dtype=None):
        y = empty(x.shape, dtype or x.dtype)
        samples = len(x) if per_sample else 1
        status = self._c["dynamic_fake_quantize"](
            *(x.data_ptr(), DTYPES[x.dtype], y.data_ptr(), DTYPES[y.dtype], samples, x.numel() // samples),
            *(bits.data_ptr(), stochastic, seed.data_ptr()),
        )
        raise_for_status(status)
        return y

    def moving_fake_quantize_(
        self, x, low, high, step, bits, momentum, axis=None, group_size=None, dtype=None
    ):
        if not (low.is_contiguous() and high.is_contiguous()):
            packed = low.contiguous(), high.contiguous()
            result = self.moving_fake_quantize_(x, *packed, step, bits, momentum, axis, group_size, dtype)
            low.copy_(packed[0])
            high.copy_(packed[1])
            return result
        y, scale, zero_point = (
            empty(x.shape, dtype or x.dtype),
            *map(torch.empty_like, (low, high)),
        )
        status = self._c["moving_fake_quantize"](
            *(x.data_ptr(), DTYPES[x.dtype], y.data_ptr(), DTYPES[y.dtype], *layout(x, axis, group_size)),
            *(bits.data_ptr(), momentum, low.data_ptr(), high.data_ptr(), step.data_ptr()),
            *(scale.data_ptr(), zero_point.data_ptr()),
        )
        raise_for_status(status)
        return y, scale, zero_point

    def low_precision_operands_(self, x, weight, low, high, step, bits, momentum, moves, per_channel):
        y, n = empty(x.shape, x.dtype), x.numel()
        outside = torch.empty((n + 7) // 8, dtype=torch.uint8)
        weight_y = empty(weight.shape, x.dtype)
        rows = len(weight) if per_channel else 1
        status = self._low_precision_operands(
            x.data_ptr(),
            DTYPES[x.dtype],
            n,
            weight.data_ptr(),
            DTYPES[weight.dtype],
            rows,
            weight.numel() // rows,
            bits.data_ptr(),
            momentum,
            moves,
            low.data_ptr(),
            high.data_ptr(),
            step.data_ptr(),
            y.data_ptr(),
            outside.data_ptr(),
            weight_y.data_ptr(),
        )
        if status:
            raise_for_status(status)
        return y, outside, weight_y

    def stop_gradient_(self, grad, outside):
        status = self._c["stop_gradient"](
            grad.data_ptr(), DTYPES[grad.dtype], grad.numel(), outside.data_ptr()
        )
        raise_for_status(status)

    def block_noise(self, weight, block_size, p, seed, kind, rescale, dtype=None, codebook=None):
        out = empty(weight.shape, dtype or weight.dtype)
        if codebook is not None:
            status = self._c["block_noise_centroid"](
                *(weight.data_ptr(), DTYPES[weight.dtype], out.data_ptr(), DTYPES[out.dtype]),
                *(weight.numel() // block_size, block_size, codebook.data_ptr(), len(codebook)),
                *(threshold(p), seed.data_ptr()),
            )
            raise_for_status(status)
            return out
        factor = 1 / (1 - p) if kind == "zero" and rescale and p < 1 else 1.0
        status = self._c["block_noise"](
            *(weight.data_ptr(), DTYPES[weight.dtype], out.data_ptr(), DTYPES[out.dtype]),
            *(weight.numel() // block_size, block_size, NOISE_KINDS[kind], ctypes.c_float(factor)),
            *(threshold(p), seed.data_ptr()),
        )
        raise_for_status(status)
        return out

    def int_linear(self, x, weight, scale, zero_point, bias, bits):
        (m, k), (n, groups) = x.shape, scale.shape
        y = x.new_empty(m, n)
        if bias is not None:
            bias = fp32_contiguous(bias)
        # a call of a small layer is mostly this: arguments one by one, pointers without a helper
        status = self._int_linear(
            x.data_ptr(),
            DTYPES[x.dtype],
            weight.data_ptr(),
            scale.data_ptr(),
            None if zero_point is None else zero_point.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            m,
            n,
            k,
            groups,
            bits,
        )
        if status:
            raise_for_status(status)
        return y

    def int_linear_quantized(self, x, weight, scale, zero_point, bias, bits, x_scale, x_zero_point):
        (m, k), (n, groups) = x.shape, scale.shape
        y = x.new_empty(m, n)
        if bias is not None:
            bias = fp32_contiguous(bias)
        status = self._int_linear_quantized(
            x.data_ptr(),
            DTYPES[x.dtype],
            None if x_scale is None else x_scale.data_ptr(),
            None if x_zero_point is None else x_zero_point.data_ptr(),
            weight.data_ptr(),
            scale.data_ptr(),
            None if zero_point is None else zero_point.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            m,
            n,
            k,
            groups,
            bits,
        )
        if status:
            raise_for_status(status)
        return y

    def int_linear_backward(self, grad, weight, scale, zero_point, bits):
        """Few rows in one kernel; for more, torch's products with the weight decoded a few columns at a time.

        The decoded values are fp32, or bf16 for a gradient in bf16 where the processor has tiles of it: each
        is then rounded once, as the weight of a dense layer in bf16 is.
        """
        (m, n), k = grad.shape, weight.shape[1] * 8 // bits
        dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 and self._isa == "amx" else torch.float32
        if m >= PRODUCT_ROWS[dtype] and n and k:
            rows, product = grad.to(dtype), grad.new_empty(m, k, dtype=dtype)
            with torch.no_grad():  # products into a given tensor have no gradient of their own
                for columns, decoded in self._columns(weight, scale, zero_point, bits, dtype):
                    torch.mm(rows, decoded, out=product[:, columns])
            return product.to(grad.dtype)
        grad_x = grad.new_empty(m, k)
        status = self._c["int_linear_backward"](
            *(grad.data_ptr(), DTYPES[grad.dtype], weight.data_ptr(), scale.data_ptr(), pointer(zero_point)),
            *(grad_x.data_ptr(), m, n, k, scale.shape[1], bits),
        )
        raise_for_status(status)
        return grad_x

    def _columns(self, weight, scale, zero_point, bits, dtype):
        """The decoded weight [n, k] in slices of columns, each with its values [n, columns]."""
        n, k = weight.shape[0], weight.shape[1] * 8 // bits
        slices = -(-k // max(64, DECODED_VALUES // n))
        width = -(-k // (64 * slices)) * 64
        values = torch.empty(n * min(width, k), dtype=dtype)  # one for all: its pages come from the system
        for first in range(0, k, width):
            last = min(first + width, k)
            decoded = values[: n * (last - first)].view(n, last - first)
            status = self._c["int_decode"](
                *(weight.data_ptr(), scale.data_ptr(), pointer(zero_point)),
                *(decoded.data_ptr(), DTYPES[dtype], n, k, scale.shape[1], bits, first, last),
            )
            raise_for_status(status)
            yield slice(first, last), decoded

    def int_embedding(self, indices, weight, scale, zero_point, bits, dtype):
        rows, k = weight.shape[0], weight.shape[1] * 8 // bits
        out = empty((*indices.shape, k), dtype)
        status = self._c["int_embedding"](
            *(indices.data_ptr(), indices.numel(), weight.data_ptr(), scale.data_ptr(), pointer(zero_point)),
            *(out.data_ptr(), DTYPES[dtype], rows, k, scale.shape[1], bits),
        )
        raise_for_status(status)
        return out
