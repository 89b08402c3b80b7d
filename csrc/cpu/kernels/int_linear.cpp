// Linear layers and embeddings over packed integer weights, decoded a row at a time to fp32.
//
// y = x @ ((q - z) * s)^T + bias: floor n * k * bits / 8 bytes of weight, 2 * m * n * k operations. Each row of
// the weight is decoded once, into cache, and multiplied with all m rows of x.
#include <stdlib.h>

#include <type_traits>

#include "common/packing.h"
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

struct Packed {
    const uint8_t* codes;  // [rows, k * bits / 8]
    const float* scale;    // [rows, groups]
    const uint8_t* zero;   // [rows, groups] or null
    int64_t k, groups;
    int bits;

    bool valid() const { return bits == 4 || bits == 8; }
    const uint8_t* row(int64_t r) const { return codes + r * (k * bits / 8); }
    float zero_point(int64_t r, int64_t g) const {
        return zero ? static_cast<float>(zero[r * groups + g]) : static_cast<float>(1 << (bits - 1));
    }
};

// out [end - begin] <- (q - z) * s of elements begin to end of a row; q - z is exact.
void decode(const Packed& w, int64_t r, int64_t begin, int64_t end, float* out) {
    const uint8_t* codes = w.row(r);
    const int64_t group_size = w.k / w.groups;
    for (int64_t i = begin; i < end;) {
        const int64_t g = i / group_size;
        const int64_t stop = (g + 1) * group_size < end ? (g + 1) * group_size : end;
        const float z = w.zero_point(r, g), s = w.scale[r * w.groups + g];
        if (w.bits == 8)
            for (; i + kLanes <= stop; i += kLanes) store(out + i - begin, (load(codes + i) - splat(z)) * splat(s));
        for (; i < stop; ++i)
            out[i - begin] = (static_cast<float>(unpack_code(codes, i, w.bits)) - z) * s;
    }
}

float dot(const float* a, const float* b, int64_t n) {
    Vec total[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int u = 0; u < 4; ++u)
            total[u] = fma(load(a + i + u * kLanes), load(b + i + u * kLanes), total[u]);
    for (; i + kLanes <= n; i += kLanes) total[0] = fma(load(a + i), load(b + i), total[0]);
    float result = sum((total[0] + total[1]) + (total[2] + total[3]));
    for (; i < n; ++i) result += a[i] * b[i];
    return result;
}

// out [n] += factor * a [n]
void add_scaled(float* out, const float* a, float factor, int64_t n) {
    const Vec times = splat(factor);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, fma(load(a + i), times, load(out + i)));
    for (; i < n; ++i) out[i] += a[i] * factor;
}

template <typename T>
void to_floats(const T* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

template <typename T>
int multiply(const T* x, const Packed& w, const float* bias, T* y, int64_t m, int64_t n) {
    float* rows = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(m * w.k + 1)));
    if (!rows) return QNK_NO_MEMORY;
    to_floats(x, rows, m * w.k);
    bool no_memory = false;
    parallel_for(n, 16, [&](int64_t begin, int64_t end) {
        float* decoded = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(w.k + 1)));
        if (!decoded) {
            no_memory = true;
            return;
        }
        for (int64_t r = begin; r < end; ++r) {
            decode(w, r, 0, w.k, decoded);
            for (int64_t t = 0; t < m; ++t)
                y[t * n + r] = from_float<T>(dot(rows + t * w.k, decoded, w.k) + (bias ? bias[r] : 0.0f));
        }
        free(decoded);
    });
    free(rows);
    return no_memory ? QNK_NO_MEMORY : QNK_OK;
}

template <typename T>
int multiply_transposed(const T* grad, const Packed& w, T* grad_x, int64_t m, int64_t n) {
    constexpr int64_t kColumns = 256;
    bool no_memory = false;
    parallel_for(w.k, kColumns, [&](int64_t first, int64_t last) {
        float* total = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(m * kColumns + 1)));
        if (!total) {
            no_memory = true;
            return;
        }
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
        free(total);
    });
    return no_memory ? QNK_NO_MEMORY : QNK_OK;
}

}  // namespace

int int_linear(const void* x, int dtype, const uint8_t* weight, const float* scale, const uint8_t* zero_point,
               const float* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t groups, int bits) {
    const Packed w{weight, scale, zero_point, k, groups, bits};
    if (!w.valid()) return QNK_BAD_BITS;
    return by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return multiply(static_cast<const T*>(x), w, bias, static_cast<T*>(y), m, n);
    });
}

int int_linear_backward(const void* grad, int dtype, const uint8_t* weight, const float* scale,
                        const uint8_t* zero_point, void* grad_x, int64_t m, int64_t n, int64_t k, int64_t groups,
                        int bits) {
    const Packed w{weight, scale, zero_point, k, groups, bits};
    if (!w.valid()) return QNK_BAD_BITS;
    return by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return multiply_transposed(static_cast<const T*>(grad), w, static_cast<T*>(grad_x), m, n);
    });
}

int int_embedding(const int64_t* indices, int64_t count, const uint8_t* weight, const float* scale,
                  const uint8_t* zero_point, void* out, int out_dtype, int64_t rows, int64_t k, int64_t groups,
                  int bits) {
    const Packed w{weight, scale, zero_point, k, groups, bits};
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
