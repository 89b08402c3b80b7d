// Rows of a packed integer table, and the gradient of a packed linear layer in its input: decoded as they are used.
//
// int_embedding: bits / 8 bytes read and one value written per element. int_linear_backward for few rows: the codes
// are read once.
#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/extremes.h"
#include "cpu/int_plain.h"
#include "cpu/kernels.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

// out [n] += factor * a [n]
void add_scaled(float* out, const float* a, float factor, int64_t n) {
    const Vec times = splat(factor);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, fma(load(a + i), times, load(out + i)));
    for (; i < n; ++i) out[i] += a[i] * factor;
}

template <typename T>
int multiply_transposed(const T* grad, const Packed& w, T* grad_x, int64_t m, int64_t n) {
    constexpr int64_t kColumns = 256;
    const Buffer<float> totals(max_threads() * m * kColumns);
    if (!totals) return QNK_NO_MEMORY;
    parallel_for(w.k, kColumns, [&](int64_t first, int64_t last, int thread) {
        float* total = totals.get() + thread * m * kColumns;
        float decoded[kColumns];
        for (int64_t begin = first; begin < last; begin += kColumns) {
            const int64_t count = last - begin < kColumns ? last - begin : kColumns;
            for (int64_t i = 0; i < m * count; ++i) total[i] = 0.0f;
            for (int64_t r = 0; r < n; ++r) {
                decode(w, r, begin, begin + count, decoded);
                for (int64_t t = 0; t < m; ++t)
                    add_scaled(total + t * count, decoded, to_float(grad[t * n + r]), count);
            }
            for (int64_t t = 0; t < m; ++t)
                for (int64_t i = 0; i < count; ++i)
                    grad_x[t * w.k + begin + i] = from_float<T>(total[t * count + i]);
        }
    });
    return QNK_OK;
}

}  // namespace

int int_linear_backward(const void* grad, int dtype, const uint8_t* weight, const float* scale,
                        const uint8_t* zero_point, void* grad_x, int64_t m, int64_t n, int64_t k, int64_t groups,
                        int bits) {
    const Packed w{weight, scale, zero_point, n, k, groups, bits};
    if (!w.valid()) return QNK_BAD_BITS;
    return by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return multiply_transposed(static_cast<const T*>(grad), w, static_cast<T*>(grad_x), m, n);
    });
}

int int_embedding(const int64_t* indices, int64_t count, const uint8_t* weight, const float* scale,
                  const uint8_t* zero_point, void* out, int out_dtype, int64_t rows, int64_t k, int64_t groups,
                  int bits) {
    const Packed w{weight, scale, zero_point, rows, k, groups, bits};
    if (!w.valid()) return QNK_BAD_BITS;
    for (int64_t i = 0; i < count; ++i)
        if (indices[i] < 0 || indices[i] >= rows) return QNK_BAD_INDEX;
    return by_dtype(out_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* to = static_cast<T*>(out);
        constexpr int64_t kColumns = 256;
        parallel_for(count, 16, [&](int64_t begin, int64_t end) {
            float decoded[kColumns];
            for (int64_t i = begin; i < end; ++i)
                for (int64_t column = 0; column < k; column += kColumns) {
                    const int64_t last = column + kColumns < k ? column + kColumns : k;
                    decode(w, indices[i], column, last, decoded);
                    for (int64_t c = column; c < last; ++c) to[i * k + c] = from_float<T>(decoded[c - column]);
                }
        });
        return static_cast<int>(QNK_OK);
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
