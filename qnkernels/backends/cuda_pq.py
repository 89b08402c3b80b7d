"""Bindings of the CUDA C++ kernels of product-quantized layers."""

import torch
import torch.nn.functional as F

from .fixed_point import exponent_below, unscaled
from .native import DTYPES, aligned, pointer

QUAD = 4  # the kernels read codewords in quads; others are padded with zeros


class PqKernels:
    """Part of CudaKernels, whose _launch and _query it uses."""

    def pq_decode(self, codes, codebook):
        return self.pq_decode_slice(_by_block(codes), codebook, 0, len(codes))

    def pq_linear(self, x, codes, codebook, bias):
        """The codebook is rounded to the dtype of x, and products are added in fp32; many: cuda_dense."""
        (m, _), (n, n_blocks), (k, d) = x.shape, codes.shape, codebook.shape
        y = x.new_empty(m, n)
        if y.numel() == 0:
            return y
        by_block = _by_block(codes)
        if self.is_dense("pq_linear", x) and n_blocks:
            return self.pq_linear_dense(x, by_block, codebook, bias, y)
        x, codebook = _in_quads(x, d), _codewords(codebook, x.dtype)
        bias = None if bias is None else bias.float().contiguous()
        dtype, code_bytes, sizes = (
            DTYPES[x.dtype],
            codes.element_size(),
            (m, n, n_blocks, k, codebook.shape[1]),
        )
        parts = self._query("pq_linear_parts", x.device, dtype, code_bytes, *sizes)
        workspace = x.new_empty(parts, m, n, dtype=torch.float32) if parts > 1 else None
        self._launch(
            *(
                "pq_linear",
                x.device,
                x.data_ptr(),
                dtype,
                by_block.data_ptr(),
                code_bytes,
                codebook.data_ptr(),
            ),
            *(pointer(bias), y.data_ptr(), *sizes, pointer(workspace)),
        )
        return y

    def pq_linear_backward(self, grad, x, codes, codebook, mean, needs_x, needs_codebook):
        """The gradient of the codebook is the same in every run: its terms are added in fixed point."""
        (m, n), n_blocks, (k, d) = grad.shape, codes.shape[1], codebook.shape
        width, empty = d + -d % QUAD, m * n * n_blocks == 0
        dense, by_block = self.is_dense("pq_linear", x) and not empty, _by_block(codes)
        grad_x = x.new_empty(m, n_blocks * width) if needs_x and not dense and not empty else None
        sums = counts = exponent = bound = None
        if needs_codebook and not empty:
            # |sum_i grad_ij x_il| <= |grad_j| |x_l|, by columns (Cauchy-Schwarz)
            largest = (torch.linalg.vector_norm(one, dim=0, dtype=torch.float64).amax() for one in (grad, x))
            bound = torch.mul(*largest) * codes.numel()
            exponent = exponent_below(bound)
            sums = torch.zeros(k, width, dtype=torch.int64, device=x.device)
            counts = torch.zeros(k, 1, dtype=torch.int64, device=x.device) if mean else None
        if grad_x is not None or sums is not None:
            grad, rows = aligned(grad), _in_quads(x, d)
            codewords = _codewords(codebook, x.dtype)
            self._launch(
                *("pq_linear_backward", x.device),
                *(grad.data_ptr(), rows.data_ptr(), DTYPES[x.dtype], by_block.data_ptr()),
                *(codes.element_size(), codewords.data_ptr()),
                *(pointer(one) for one in (grad_x, sums, counts, exponent)),
                *(m, n, n_blocks, k, width),
            )
        if needs_x and dense:
            grad_x = self.pq_grad_x_dense(grad, by_block, codebook, x.new_empty(x.shape))
        elif needs_x:
            grad_x = torch.zeros_like(x) if grad_x is None else _out_of_quads(grad_x, d)
        else:
            grad_x = x.new_empty(0)
        if not needs_codebook:
            return grad_x, x.new_empty(0, dtype=torch.float32)
        if sums is None:
            return grad_x, x.new_zeros(k, d, dtype=torch.float32)
        total = unscaled(sums, exponent, bound)[:, :d]
        return grad_x, (total / counts.clamp(min=1) if mean else total).float().contiguous()


def _by_block(codes: torch.Tensor) -> torch.Tensor:
    """codes [n, n_blocks] as [n_blocks, n]; no copy of those that PQLinear keeps."""
    return aligned(codes.t())


def _in_quads(x: torch.Tensor, d: int) -> torch.Tensor:
    """x [m, n_blocks * d] with every block padded to a multiple of QUAD."""
    return aligned(x if d % QUAD == 0 else F.pad(x.view(len(x), -1, d), (0, -d % QUAD)).flatten(1))


def _out_of_quads(x: torch.Tensor, d: int) -> torch.Tensor:
    return x if d % QUAD == 0 else x.view(len(x), -1, d + -d % QUAD)[..., :d].flatten(1)


def _codewords(codebook: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return aligned(F.pad(codebook.to(dtype), (0, -codebook.shape[1] % QUAD)))
