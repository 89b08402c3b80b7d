// Linear layers over product-quantized weights: y = x . W^T + bias with block b of row o of W codebook[code(b, o)].
//
// Floor: n * blocks code bytes read; 2 * m * n * columns operations of the dense product, of which the tables save
// all but a d-th. How each number of tokens is served is chosen in pq_linear below.
#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/pq_bytes.h"
#include "cpu/pq_entries.h"
#include "cpu/pq_gradient.h"
#include "cpu/pq_table.h"
#include "cpu/pq_tiles.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int64_t kByteTokens = 6;     // up to so many tokens one by one cost less than a vector of them
constexpr int64_t kByteOutputs = 256;  // fewer do not pay for the tables of bytes

// Nanoseconds on one core, of which only the ratio matters: by tables each code costs an addition per vector of tokens,
// by their entries one per token, in tiles a decoding once and its d weights a product (three for fp32) per 16 tokens.
double cost_by_tables(const ProductQuantized& w, int64_t m) {
    const double codes = static_cast<double>(w.n * w.blocks), entries = static_cast<double>(w.k * w.columns());
    const bool wide = kLanes == 16;
    const double addition = !wide ? 1.0 : w.k * kLanes * 4 <= 32768 ? 0.85 : 1.5;
    return static_cast<double>((m + kLanes - 1) / kLanes) * (codes * addition + entries * (wide ? 0.04 : 0.6));
}

double cost_by_entries(const ProductQuantized& w, int64_t m) {
    const double codes = static_cast<double>(w.n * w.blocks), entries = static_cast<double>(w.k * w.columns());
    return static_cast<double>(m) * (codes * 0.5 + entries * 0.04);
}

double cost_in_tiles(const ProductQuantized& w, int64_t m, bool bf16_tokens) {
    const double codes = static_cast<double>(w.n * w.blocks), per_weight = bf16_tokens ? 0.026 : 0.078;
    return codes * (bf16_tokens ? 0.65 : 1.4) + static_cast<double>((m + 31) / 32 * 2) * codes * w.d * per_weight;
}

template <typename T>
int multiply(const T* x, const ProductQuantized& w, const float* bias, T* y, int64_t m) {
    if (m > kByteTokens && tiles_serve(w) && cost_in_tiles(w, m, std::is_same_v<T, bf16>) < cost_by_tables(w, m))
        return multiply_by_tiles(x, w, bias, y, m);
    if (!kHasByteTables || m > kByteTokens || w.n < kByteOutputs || w.k > 256 || w.code_bytes != 1) {
        if (cost_by_entries(w, m) < cost_by_tables(w, m)) return EntryProduct(w).multiply(x, bias, y, m);
        return multiply_by_tables(x, w, bias, y, m);
    }
    const Buffer<float> token(w.columns()), result(w.n);
    if (!token || !result) return QNK_NO_MEMORY;
    for (int64_t t = 0; t < m; ++t) {
        for (int64_t c = 0; c < w.columns(); ++c) token.get()[c] = to_float(x[t * w.columns() + c]);
        if (!multiply_by_bytes(token.get(), w, bias, result.get()))
            return multiply_by_tables(x + t * w.columns(), w, bias, y + t * w.n, m - t);
        for (int64_t o = 0; o < w.n; ++o) y[t * w.n + o] = from_float<T>(result.get()[o]);
    }
    return QNK_OK;
}

}  // namespace

int pq_linear(const void* x, int dtype, const void* codes, int code_bytes, const float* codebook, const float* bias,
              void* y, int64_t m, int64_t n, int64_t blocks, int64_t k, int64_t d) {
    const ProductQuantized w{codes, code_bytes, codebook, n, blocks, k, static_cast<int>(d)};
    if (!w.valid()) return QNK_BAD_DTYPE;
    return by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return multiply(static_cast<const T*>(x), w, bias, static_cast<T*>(y), m);
    });
}

int pq_linear_backward(const void* grad, const void* x, int dtype, const void* codes, int code_bytes,
                       const float* codebook, int mean, void* grad_x, float* grad_codebook, int64_t m, int64_t n, int64_t blocks,
                       int64_t k, int64_t d) {
    const ProductQuantized w{codes, code_bytes, codebook, n, blocks, k, static_cast<int>(d)};
    if (!w.valid()) return QNK_BAD_DTYPE;
    return by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return Gradients(w, grad_x != nullptr, grad_codebook != nullptr, mean != 0)
            .compute(static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(grad_x), grad_codebook, m);
    });
}

int pq_embedding(const int64_t* indices, int64_t count, const void* codes, int code_bytes, int64_t row_stride,
                 int64_t block_stride, const float* codebook, void* out, int out_dtype, int64_t rows, int64_t blocks,
                 int64_t d) {
    if (code_bytes != 1 && code_bytes != 2) return QNK_BAD_DTYPE;
    if (indices)
        for (int64_t i = 0; i < count; ++i)
            if (indices[i] < 0 || indices[i] >= rows) return QNK_BAD_INDEX;
    return by_dtype(out_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        parallel_for(count, 8, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                T* to = static_cast<T*>(out) + i * blocks * d;
                const int64_t start = (indices ? indices[i] : i) * row_stride;
                for (int64_t b = 0; b < blocks; ++b) {
                    const int64_t at = start + b * block_stride;
                    const int64_t code = code_bytes == 1 ? static_cast<const uint8_t*>(codes)[at]
                                                         : static_cast<const uint16_t*>(codes)[at];
                    const float* codeword = codebook + code * d;
                    for (int64_t j = 0; j < d; ++j) to[b * d + j] = from_float<T>(codeword[j]);
                }
            }
        });
        return static_cast<int>(QNK_OK);
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
