"""Bindings of the C++ kernels of product quantization."""

import torch

from .memory import empty
from .native import DTYPES, fp32_contiguous, pointer, raise_for_status


class PqKernels:
    """Part of CpuKernels, whose functions it calls."""

    def pq_linear(self, x, codes, codebook, bias):
        (m, _), (n, blocks), (k, d) = x.shape, codes.shape, codebook.shape
        by_block, codebook = codes.t().contiguous(), codebook.float()
        bias = None if bias is None else fp32_contiguous(bias)
        y = x.new_empty(m, n)
        status = self._c["pq_linear"](
            *(x.data_ptr(), DTYPES[x.dtype], by_block.data_ptr(), codes.element_size(), codebook.data_ptr()),
            *(pointer(bias), y.data_ptr(), m, n, blocks, k, d),
        )
        raise_for_status(status)
        return y

    def pq_linear_backward(self, grad, x, codes, codebook, mean, needs_x, needs_codebook):
        (m, _), (n, blocks), (k, d) = x.shape, codes.shape, codebook.shape
        by_block, codewords = codes.t().contiguous(), codebook.float()
        grad_x = torch.empty_like(x) if needs_x else None
        grad_codebook = torch.empty(k, d) if needs_codebook else None
        status = self._c["pq_linear_backward"](
            *(grad.data_ptr(), x.data_ptr(), DTYPES[x.dtype], by_block.data_ptr(), codes.element_size()),
            *(codewords.data_ptr(), mean, pointer(grad_x), pointer(grad_codebook), m, n, blocks, k, d),
        )
        raise_for_status(status)
        return (grad_x if needs_x else x.new_empty(0)), (grad_codebook if needs_codebook else torch.empty(0))

    def pq_embedding(self, indices, codes, codebook):
        return self._decode(indices, len(indices), codes, codebook)

    def pq_decode(self, codes, codebook):
        return self._decode(None, len(codes), codes, codebook)

    def _decode(self, indices, count, codes, codebook):
        (rows, blocks), (_, d) = codes.shape, codebook.shape
        out, codewords = empty((count, blocks * d), codebook.dtype), codebook.float()
        status = self._c["pq_embedding"](
            *(pointer(indices), count, codes.data_ptr(), codes.element_size(), *codes.stride()),
            *(codewords.data_ptr(), out.data_ptr(), DTYPES[out.dtype], rows, blocks, d),
        )
        raise_for_status(status)
        return out
