// The C ABI of pq_linear and its gradients: which kernel serves which batch and dtype.
#include "cuda/pq_linear.h"

#include <type_traits>

#include "cuda/status.h"

namespace qnk {
namespace {

constexpr int kSumThreads = 256;

template <typename T>
__global__ void pq_linear_sum_kernel(PqOutput out, int64_t size, int width) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
    if (i >= size) return;
    float total = out.parts[i];
    for (int split = 1; split < out.splits; ++split) total += out.parts[split * size + i];
    if (out.bias) total += out.bias[i % width];
    static_cast<T*>(out.y)[i] = from_float<T>(total);
}

template <typename T>
cudaError_t pq_add_parts(const PqOutput& out, int m, int width, cudaStream_t stream) {
    const int64_t size = static_cast<int64_t>(m) * width;
    return launch(pq_linear_sum_kernel<T>, dim3(static_cast<unsigned>((size + kSumThreads - 1) / kSumThreads)),
                  dim3(kSumThreads), 0, stream, out, size, width);
}

// body(T*) with T the type of a dtype.
template <typename Body>
int by_dtype(int dtype, const Body& body) {
    switch (dtype) {
        case QNK_F32: return body(static_cast<float*>(nullptr));
        case QNK_BF16: return body(static_cast<bf16*>(nullptr));
        case QNK_F16: return body(static_cast<f16*>(nullptr));
        default: return QNK_BAD_DTYPE;
    }
}

// Whether wgmma multiplies m tokens: any but the few of pq_linear_few. (8192x8192, d = 8, bf16 on an H200: 64 tokens
// take 86 us by mma.sync, 128 take 50 us by wgmma.)
bool by_wgmma(int m, const PqWeight& w) { return (m > kFewTokens || wgmma_use() > 1) && pq_wgmma_serves(w); }

// The gradient of x has no parts: a grid is its tiles, which are twice as large as those of mma.sync and pay off where
// there is one for most multiprocessors.
bool grad_x_by_wgmma(int m, const PqWeight& w) {
    const bool full = 4 * pq_wgmma_tiles(m, w.columns()) >= 3 * static_cast<int64_t>(processors());
    return (full || wgmma_use() > 1) && by_wgmma(m, w);
}

template <typename T>
int splits(int m, const PqWeight& w) {
    if constexpr (std::is_same_v<T, float>)
        return m <= kFewFloatTokens ? pq_few_float_splits(m, w) : pq_float_splits(m, w);
    if (m <= kFewTokens) return pq_few_splits(m, w);
    return by_wgmma(m, w) ? pq_wgmma_splits(m, w) : pq_tile_splits(m, w);
}

template <typename T>
cudaError_t multiply(const T* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream) {
    if constexpr (std::is_same_v<T, float>) {
        if (m <= kFewFloatTokens) return pq_linear_few_float(x, w, out, m, stream);
        return pq_linear_float(x, w, out, m, stream);
    } else {
        if (m <= kFewTokens) return pq_linear_few(x, w, out, m, stream);
        if (by_wgmma(m, w)) return pq_linear_wgmma(x, w, out, m, stream);
        return pq_linear_tiles(x, w, out, m, stream);
    }
}

// The sizes that 32-bit indices inside the kernels allow.
bool serves(int code_bytes, int64_t m, int64_t n, int64_t blocks, int64_t k, int64_t d) {
    constexpr int64_t most = 1 << 30;
    const bool indices = m < most && n < most && blocks * d < most && k * d < most;
    return (code_bytes == 1 || code_bytes == 2) && d % 4 == 0 && indices;
}

}  // namespace
}  // namespace qnk

int qnk_cuda_pq_linear(const void* x, int dtype, const void* codes, int code_bytes, const void* codebook,
                       const float* bias, void* y, int64_t m, int64_t n, int64_t blocks, int64_t k, int64_t d,
                       float* workspace, void* stream) {
    using namespace qnk;
    if (!serves(code_bytes, m, n, blocks, k, d)) return QNK_BAD_DTYPE;
    const PqWeight w{codes, codebook, code_bytes, static_cast<int>(n), static_cast<int>(blocks), static_cast<int>(k),
                     static_cast<int>(d)};
    const int tokens = static_cast<int>(m);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    return by_dtype(dtype, [&](auto* type) -> int {
        using T = std::remove_pointer_t<decltype(type)>;
        const int parts = splits<T>(tokens, w);
        const PqOutput out{y, parts > 1 ? workspace : nullptr, bias, parts};
        const cudaError_t error = multiply(static_cast<const T*>(x), w, out, tokens, on);
        if (error != cudaSuccess || parts == 1) return cuda_status(error);
        return cuda_status(pq_add_parts<T>(out, tokens, w.n, on));
    });
}

int qnk_cuda_pq_linear_parts(int dtype, int code_bytes, int64_t m, int64_t n, int64_t blocks, int64_t k, int64_t d) {
    using namespace qnk;
    if (!serves(code_bytes, m, n, blocks, k, d)) return 1;
    const PqWeight w{nullptr, nullptr, code_bytes, static_cast<int>(n), static_cast<int>(blocks), static_cast<int>(k),
                     static_cast<int>(d)};
    const int tokens = static_cast<int>(m);
    switch (dtype) {
        case QNK_F32: return splits<float>(tokens, w);
        case QNK_BF16: return splits<bf16>(tokens, w);
        case QNK_F16: return splits<f16>(tokens, w);
        default: return 1;
    }
}

int qnk_cuda_pq_linear_backward(const void* grad, const void* x, int dtype, const void* codes, int code_bytes,
                                const void* codebook, void* grad_x, int64_t* sums, int64_t* counts,
                                const int64_t* exponent, int64_t m, int64_t n, int64_t blocks, int64_t k, int64_t d,
                                void* stream) {
    using namespace qnk;
    if (!serves(code_bytes, m, n, blocks, k, d)) return QNK_BAD_DTYPE;
    const PqWeight w{codes, codebook, code_bytes, static_cast<int>(n), static_cast<int>(blocks), static_cast<int>(k),
                     static_cast<int>(d)};
    const PqSums to{sums, counts, exponent};
    const int tokens = static_cast<int>(m);
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    return by_dtype(dtype, [&](auto* type) -> int {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *from = static_cast<const T*>(grad), *rows = static_cast<const T*>(x);
        cudaError_t error = cudaSuccess;
        if constexpr (std::is_same_v<T, float>) {
            if (grad_x) error = pq_linear_grad_x_float(from, w, static_cast<T*>(grad_x), tokens, on);
            if (sums && error == cudaSuccess) error = pq_linear_grad_codebook_float(from, rows, w, to, tokens, on);
        } else {
            T* const to_x = static_cast<T*>(grad_x);
            if (grad_x && grad_x_by_wgmma(tokens, w))
                error = pq_linear_grad_x_wgmma(from, w, to_x, tokens, on);
            else if (grad_x)
                error = pq_linear_grad_x(from, w, to_x, tokens, on);
            if (sums && error == cudaSuccess)
                error = has_wgmma() ? pq_linear_grad_codebook_wgmma(from, rows, w, to, tokens, on)
                                    : pq_linear_grad_codebook(from, rows, w, to, tokens, on);
        }
        return cuda_status(error);
    });
}
