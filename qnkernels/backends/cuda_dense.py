"""Products of many tokens over compressed weights: decoded slice by slice, multiplied by cuBLAS.

From some number of tokens on the tensor cores are the limit, and cuBLAS feeds them better than kernels that
decode as they go. A slice of the weight, in the dtype of x, is as large as the L2 cache holds beside the
rest: it is written there and read from there. Nothing waits; slices come from torch's allocator, which hands
out the memory of one again for the next.

What it does to numbers: the weight, (q - z) * s in fp32, and the bias are rounded to the dtype of x, as they
are where F.linear is given a decoded weight. fp32 products are those of cuBLAS, in tf32 where
torch.backends.cuda.matmul.allow_tf32 says so. cuBLAS may round partial sums of bf16 or f16 products to that
dtype where torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction (allow_fp16_...) is set.
"""

from collections.abc import Callable

import torch

from .native import DTYPES, aligned, pointer

# Tokens from which on this was the fastest on an H200, by op and bytes of an element of x.
FROM_TOKENS = {"pq_linear": {4: 9, 2: 256}, "int_linear": {4: 256, 2: 256}}
SLICE_BYTES = 32 << 20  # of 50 MB of L2 cache on an H100
# Elements of y in the product of a slice, so that it has a tile for most multiprocessors: 128 of 128 x 128.
# Where tokens are few a slice is larger than the cache for it, up to LARGEST times.
SLICE_PRODUCTS, LARGEST = 1 << 21, 4
TILE = 128  # columns of y in a tile of cuBLAS


class DenseKernels:
    """Part of CudaKernels, whose _launch it uses."""

    def is_dense(self, op, x) -> bool:
        return len(x) >= FROM_TOKENS[op][x.element_size()]

    def int_decode(self, weight, scale, zero_point, bits, dtype):
        """Rows of the weight, as reference.int_linear.dequantize_weight, rounded to dtype."""
        n, k = len(weight), weight.shape[1] * 8 // bits
        out = torch.empty(n, k, dtype=dtype, device=weight.device)
        self._launch(
            *("int_decode", weight.device, weight.data_ptr(), scale.data_ptr(), pointer(zero_point)),
            *(out.data_ptr(), DTYPES[dtype], n, k, scale.shape[1], bits),
        )
        return out

    def pq_decode_slice(self, by_block, codebook, first, count):
        """Rows first to first + count - 1 of reference.pq.pq_decode, of codes by_block [n_blocks, n].

        first is a multiple of 16.
        """
        (n_blocks, n), (k, d) = by_block.shape, codebook.shape
        codebook = aligned(codebook)
        out = codebook.new_empty(count, n_blocks * d)
        self._launch(
            *("pq_decode", codebook.device, by_block.data_ptr(), by_block.element_size()),
            *(codebook.data_ptr(), DTYPES[codebook.dtype], out.data_ptr(), n, n_blocks, k, d, first, count),
        )
        return out

    def int_linear_dense(self, x, weight, scale, zero_point, bias, bits, y):
        def rows(first, last):
            zeros = None if zero_point is None else zero_point[first:last]
            return self.int_decode(weight[first:last], scale[first:last], zeros, bits, x.dtype).t()

        return by_slices(x, rows, len(weight), 1, bias, y)

    def pq_linear_dense(self, x, by_block, codebook, bias, y):
        codebook = codebook.to(x.dtype)

        def rows(first, last):
            return self.pq_decode_slice(by_block, codebook, first, last - first).t()

        return by_slices(x, rows, by_block.shape[1], 1, bias, y)

    def pq_grad_x_dense(self, grad, by_block, codebook, grad_x):
        """Slices of columns: one of rows would add to all of grad_x. The codes of one are contiguous."""
        codebook = codebook.to(grad.dtype)

        def columns(first, last):
            return self.pq_decode_slice(by_block[first:last], codebook, 0, by_block.shape[1])

        return by_slices(grad, columns, len(by_block), codebook.shape[1], None, grad_x)


@torch.no_grad()  # results are written in place
def by_slices(
    x: torch.Tensor,
    decoded: Callable[[int, int], torch.Tensor],
    count: int,
    width: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> torch.Tensor:
    """y [m, count * width] <- x [m, k] @ W + bias, where decoded(i, j) [k, (j - i) * width] are columns of W.

    Columns of y have its row stride as leading dimension, which cuBLAS takes as it is: no copy is made. A
    bias costs a pass over y: addmm writes it there, and cuBLAS adds the products and rounds once.
    """
    step = slice_size(*x.shape, width, x.element_size())
    bias = None if bias is None else bias.to(x.dtype)
    for first in range(0, count, step):
        last = min(first + step, count)
        columns = slice(first * width, last * width)
        if bias is None:
            torch.mm(x, decoded(first, last), out=y[:, columns])
        else:
            torch.addmm(bias[columns], x, decoded(first, last), out=y[:, columns])
    return y


def slice_size(m: int, k: int, width: int, element_size: int) -> int:
    """How many times `width` columns [k] a slice has for m tokens, a multiple of TILE columns or more."""
    in_cache = SLICE_BYTES // (k * width * element_size)
    enough = min(SLICE_PRODUCTS // (m * width), LARGEST * in_cache)
    tile = -(-TILE // width)
    return max(in_cache, enough, tile) // tile * tile
