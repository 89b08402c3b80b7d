// Linear layers over packed integer weights, y = x @ ((q - z) * s)^T + bias, with activations as they are
// (int_linear) or in 8 bits, too (int_linear_quantized).
//
// Floor: n * k * bits / 8 bytes of weight, read once; n * k * m products of bytes, two or three times as many where x
// is not quantized. With AVX-512 all sums are of integers: activations become bytes (int_activations.h), the weight
// is multiplied where it lies for a few tokens (int_rows.h) and by tiles for more (int_tiles.h).
#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/extremes.h"
#include "cpu/int_plain.h"
#include "cpu/int_tiles.h"
#include "cpu/kernels.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

#if defined(__AVX512F__)

// Whether fixed point in two bytes loses less than bf16 did: no value is far above the others of its row.
bool even_rows(const bf16* x, int64_t m, int64_t k) {
    const Buffer<uint8_t> uneven(m);
    if (!uneven) return false;
    parallel_for(m, (16384 + k - 1) / k, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            Vec squares = splat(0.0f), most = splat(0.0f);
            for (int64_t i = 0; i < k; i += kLanes) {
                const Vec value = i + kLanes <= k ? load(x + t * k + i) : load_first(x + t * k + i, static_cast<int>(k - i));
                squares = fma(value, value, squares);
                most = max(most, max(value, splat(0.0f) - value));
            }
            const float largest = max_of(most);
            uneven.get()[t] = !(largest * largest * static_cast<float>(k) <= 256.0f * sum(squares));  // 16 times the mean
        }
    });
    for (int64_t t = 0; t < m; ++t)
        if (uneven.get()[t]) return false;
    return true;
}

template <typename T>
int bytes_for(const T*, int64_t, int64_t) {
    return 3;
}
int bytes_for(const bf16* x, int64_t m, int64_t k) { return m > 16 && even_rows(x, m, k) ? 2 : 3; }

template <typename T>
int multiply(const T* x, const Packed& w, const Quantization& how, const float* bias, T* y, int64_t m,
             bool& representable) {
    const Segments segments(w);
    if (!segments) return QNK_NO_MEMORY;
    const bool rows = RowProduct::serves(segments, how.bytes, m);
    if (!rows && !GroupedRowProduct::serves(w, segments, how.bytes, m))
        return IntTileProduct(w, segments, how).multiply(x, bias, y, m, representable);
    Activations activations(w, segments, how, 16);
    if (!activations) return QNK_NO_MEMORY;
    representable = activations.quantize(x, m);
    if (!representable) return QNK_OK;
    if (rows) {
        const RowProduct product(w, segments, activations);
        parallel_for(w.n, 16, [&](int64_t begin, int64_t end) { product.multiply(bias, y, begin, end); });
        return QNK_OK;
    }
    const GroupedRowProduct product(w, segments, activations);
    if (!product) return QNK_NO_MEMORY;
    parallel_for(w.n, 16, [&](int64_t begin, int64_t end) { product.multiply(bias, y, begin, end); });
    return QNK_OK;
}

bool bytes_serve(const Packed& w) { return w.k > 0 && Segments::serves(w); }

#endif

template <typename T>
int linear(const T* x, const Packed& w, const float* bias, T* y, int64_t m) {
#if defined(__AVX512F__)
    if (bytes_serve(w)) {
        bool representable = true;
        const int status = multiply(x, w, {bytes_for(x, m, w.k), nullptr, nullptr}, bias, y, m, representable);
        if (status != QNK_OK || representable) return status;
    }
#endif
    return multiply_decoded(x, w, bias, y, m);
}

template <typename T>
int linear_quantized(const T* x, const Packed& w, const float* x_scale, const float* x_zero_point, const float* bias,
                     T* y, int64_t m) {
#if defined(__AVX512F__)
    if (bytes_serve(w)) {
        bool representable = true;
        return multiply(x, w, {1, x_scale, x_zero_point}, bias, y, m, representable);
    }
#endif
    return LevelProduct(w).multiply(x, x_scale, x_zero_point, bias, y, m);
}

}  // namespace

int int_linear(const void* x, int dtype, const uint8_t* weight, const float* scale, const uint8_t* zero_point,
               const float* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t groups, int bits) {
    const Packed w{weight, scale, zero_point, n, k, groups, bits};
    if (!w.valid()) return QNK_BAD_BITS;
    if (m == 0 || n == 0) return QNK_OK;
    return by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return linear(static_cast<const T*>(x), w, bias, static_cast<T*>(y), m);
    });
}

int int_linear_quantized(const void* x, int dtype, const float* x_scale, const float* x_zero_point,
                         const uint8_t* weight, const float* scale, const uint8_t* zero_point, const float* bias,
                         void* y, int64_t m, int64_t n, int64_t k, int64_t groups, int bits) {
    const Packed w{weight, scale, zero_point, n, k, groups, bits};
    if (!w.valid()) return QNK_BAD_BITS;
    if (m == 0 || n == 0) return QNK_OK;
    return by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return linear_quantized(static_cast<const T*>(x), w, x_scale, x_zero_point, bias, static_cast<T*>(y), m);
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
