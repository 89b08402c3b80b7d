// The kernels behind pq_linear and its gradients, as pq_linear.cu chooses among them. A weight is
// W[o, b * d + j] = codebook[codes[b, o], j]; all launch on `stream` and nothing waits.
#pragma once

#include "cuda/device.h"

namespace qnk {

struct PqWeight {
    const void* codes;     // uint8 or uint16 [blocks, n]; those past the codebook read its last codeword
    const void* codebook;  // [k, d] in the dtype of x, 16-byte aligned
    int code_bytes;        // 1 or 2
    int n, blocks, k;
    int d;  // a multiple of 4

    __host__ __device__ int columns() const { return blocks * d; }
};

// What a product writes: y, or, where its depth is divided among `splits` programs, their sums.
struct PqOutput {
    void* y;            // [m, width], in the dtype of x
    float* parts;       // [splits, m, width], or null: y is written
    const float* bias;  // [width] or null; added to y, not to parts
    int splits;
};

// Programs that share the depth of pq_linear, so that few tiles still fill the GPU: of m tokens, by the kernel of
// that many tokens.
int pq_few_splits(int m, const PqWeight& w);
int pq_tile_splits(int m, const PqWeight& w);
int pq_wgmma_splits(int m, const PqWeight& w);
int pq_few_float_splits(int m, const PqWeight& w);
int pq_float_splits(int m, const PqWeight& w);

// Whether the current device and the size of the codebook allow the kernels with wgmma.
bool pq_wgmma_serves(const PqWeight& w);
int64_t pq_wgmma_tiles(int m, int width);  // blocks of theirs

constexpr int kFewTokens = 16, kFewFloatTokens = 8;

// y [m, n] = x [m, columns] @ W^T in bf16 or f16, and in fp32: of few tokens, and of any number.
template <typename T>
cudaError_t pq_linear_few(const T* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream);
template <typename T>
cudaError_t pq_linear_tiles(const T* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream);
template <typename T>
cudaError_t pq_linear_wgmma(const T* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream);
cudaError_t pq_linear_few_float(const float* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream);
cudaError_t pq_linear_float(const float* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream);

// grad_x [m, columns] = grad [m, n] @ W.
template <typename T>
cudaError_t pq_linear_grad_x(const T* grad, const PqWeight& w, T* grad_x, int m, cudaStream_t stream);
template <typename T>
cudaError_t pq_linear_grad_x_wgmma(const T* grad, const PqWeight& w, T* grad_x, int m, cudaStream_t stream);
cudaError_t pq_linear_grad_x_float(const float* grad, const PqWeight& w, float* grad_x, int m, cudaStream_t stream);

// Sums over the blocks of each codeword, in fixed point: they are the same in any order.
struct PqSums {
    int64_t* sums;            // [k, d] += round(gradient of W * 2^exponent)
    int64_t* counts;          // [k] += blocks of each codeword, or null
    const int64_t* exponent;  // 0-d
};

template <typename T>
cudaError_t pq_linear_grad_codebook(const T* grad, const T* x, const PqWeight& w, const PqSums& to, int m,
                                    cudaStream_t stream);
template <typename T>
cudaError_t pq_linear_grad_codebook_wgmma(const T* grad, const T* x, const PqWeight& w, const PqSums& to, int m,
                                          cudaStream_t stream);
cudaError_t pq_linear_grad_codebook_float(const float* grad, const float* x, const PqWeight& w, const PqSums& to, int m,
                                          cudaStream_t stream);

}  // namespace qnk
