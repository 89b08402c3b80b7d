// Linear layers over packed integer weights, y = x @ ((q - z) * s)^T + bias, with activations as they are
// (int_linear) or in 8 bits, too (int_linear_quantized).
//
// Floor: n * k * bits / 8 bytes of weight, read once; n * k * m products of bytes, three times as many where x is not
// quantized. With AVX-512 activations become bytes, whose sums are exact integers (int_activations.h), or, from some
// tokens on and with 4-bit codes, stay bf16 where they are; the weight is multiplied where it lies for a few tokens
// (int_rows.h, int_grouped_rows.h, int_bf16_rows.h) and by tiles for more (int_tiles.h; int_group_tiles.h with AMX and
// codes of 4 bits in groups). With AVX2 a few tokens are multiplied where the weight lies, too (int_nibbles.h: codes of
// 4 bits, int_words.h), and more with a weight that is decoded into the cache, as on any instruction set (int_plain.h).
#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/extremes.h"
#include "cpu/int_bf16_rows.h"
#include "cpu/int_group_tiles.h"
#include "cpu/int_grouped_rows.h"
#include "cpu/int_nibbles.h"
#include "cpu/int_plain.h"
#include "cpu/int_tiles.h"
#include "cpu/int_words.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

#if defined(__AVX2__)

// Whether fixed point in two bytes, half a unit of which is at most 2^-15 of the largest magnitude, loses no more than
// a sum of k terms in fp32 may: 2^-24 of each term for each of k additions.
template <typename T>
bool even_rows(const T* x, int64_t m, int64_t k) {
    for (int64_t t = 0; t < m; ++t, x += k) {
        Vec total = splat(0.0f), most = splat(0.0f);
        for (int64_t i = 0; i < k; i += kLanes) {
            const Vec value = i + kLanes <= k ? load(x + i) : load_first(x + i, static_cast<int>(k - i));
            const Vec magnitude = max(value, splat(0.0f) - value);
            total = total + magnitude;
            most = max(most, magnitude);
        }
        if (!(max_of(most) * 516.0f <= sum(total))) return false;  // (half a unit may be 2^-14.99)
    }
    return true;
}

#endif

#if defined(__AVX512F__)

template <typename Product, typename T>
int multiply_rows(const Product& product, const Packed& w, const float* bias, T* y) {
    if (!product) return QNK_NO_MEMORY;
    parallel_for(w.n, 16, [&](int64_t begin, int64_t end) { product.multiply(bias, y, begin, end); });
    return QNK_OK;
}

// False in `served` where zero points are no codes; y is then not whole.
template <int Bytes, typename T>
int multiply_grouped(const GroupedRowProduct<Bytes>& product, const Packed& w, const float* bias, T* y, bool& served) {
    if (!product) return QNK_NO_MEMORY;
    int others = 0;
    parallel_for(w.n, 16, [&](int64_t begin, int64_t end) {
        if (!product.multiply(bias, y, begin, end)) __atomic_store_n(&others, 1, __ATOMIC_RELAXED);
    });
    served = !others;
    return QNK_OK;
}

// Tiles of bf16 where x is, unless bytes can be multiplied where the weight lies.
template <typename T>
int multiply_tiles(const T* x, const Packed& w, const Segments& segments, const Quantization& how, const float* bias, T* y,
                   int64_t m, bool& representable) {
    if constexpr (std::is_same_v<T, bf16>) {
        if (how.bytes > 1 && has_bf16_products() && !IntTileProduct<ByteForm>::direct(w, segments, how.bytes, m))
            return IntTileProduct<Bf16Form>(w, segments, how).multiply(x, bias, y, m, representable);
    }
    return IntTileProduct<ByteForm>(w, segments, how).multiply(x, bias, y, m, representable);
}

template <typename T>
int multiply(const T* x, const Packed& w, Quantization how, const float* bias, T* y, int64_t m, bool& representable) {
    if constexpr (std::is_same_v<T, bf16>) {
        if (how.bytes > 1 && Bf16RowProduct::serves(w, m) && Bf16Form::holds(x, m, w.k))
            return multiply_rows(Bf16RowProduct(w, x, m), w, bias, y);
    }
    const Segments segments(w);
    if (!segments) return QNK_NO_MEMORY;
#if defined(__AMX_BF16__)
    using Units = GroupedTileProduct<std::conditional_t<std::is_same_v<T, bf16>, Bf16Units, ByteUnits>>;
    if (how.bytes > 1 && Units::serves(w, m)) {
        const int status = Units(w, segments).multiply(x, bias, y, m, representable);
        if (status != QNK_OK || representable) return status;
    }
#endif
    // (more rows than three are faster in tiles, where tiles need no unpacking)
    const bool direct = IntTileProduct<ByteForm>::direct(w, segments, how.bytes, m);
    const bool rows = RowProduct::serves(segments, how.bytes, m) && (!direct || RowProduct::rows(how.bytes, m) <= 3);
    const bool grouped = GroupedRowProduct<3>::serves(w, segments, how.bytes, m);
    if (!rows && !grouped) return multiply_tiles(x, w, segments, how, bias, y, m, representable);
    if constexpr (std::is_same_v<T, bf16>) {
        if (grouped && even_rows(x, m, w.k)) how.bytes = 2;
    }
    Activations activations(w, segments, how, (m + 15) / 16 * 16);
    if (!activations) return QNK_NO_MEMORY;
    representable = activations.quantize(x, m);
    if (!representable) return QNK_OK;
    if (rows) return multiply_rows(RowProduct(w, segments, activations), w, bias, y);
    bool served;
    const int status =
        how.bytes == 2 ? multiply_grouped(GroupedRowProduct<2>(w, segments, activations), w, bias, y, served)
                       : multiply_grouped(GroupedRowProduct<3>(w, segments, activations), w, bias, y, served);
    if (status != QNK_OK || served) return status;
    return multiply_tiles(x, w, segments, {3, nullptr, nullptr}, bias, y, m, representable);
}

bool bytes_serve(const Packed& w) { return w.k > 0 && Segments::serves(w); }

#endif

template <typename T>
int linear(const T* x, const Packed& w, const float* bias, T* y, int64_t m) {
#if defined(__AVX512F__)
    if (bytes_serve(w)) {
        bool representable = true;
        const int status = multiply(x, w, {3, nullptr, nullptr}, bias, y, m, representable);
        if (status != QNK_OK || representable) return status;
    }
#elif defined(__AVX2__)
    bool representable = false;
    int status = QNK_OK;
    if (std::is_same_v<T, bf16> && NibbleProduct<2>::serves(w, m) && even_rows(x, m, w.k))
        status = NibbleProduct<2>(w, m).multiply(x, bias, y, representable);
    else if (NibbleProduct<3>::serves(w, m))
        status = NibbleProduct<3>(w, m).multiply(x, bias, y, representable);
    else if (WordProduct<2>::serves(w, m))
        status = WordProduct<2>(w, m).multiply(x, nullptr, nullptr, bias, y, representable);
    if (status != QNK_OK || representable) return status;
#endif
    return DecodedProduct(w).multiply(x, bias, y, m);
}

template <typename T>
int linear_quantized(const T* x, const Packed& w, const float* x_scale, const float* x_zero_point, const float* bias,
                     T* y, int64_t m) {
#if defined(__AVX512F__)
    if (bytes_serve(w)) {
        bool representable = true;
        return multiply(x, w, {1, x_scale, x_zero_point}, bias, y, m, representable);
    }
#elif defined(__AVX2__)
    if (WordProduct<1>::serves(w, m)) {
        bool representable = true;
        return WordProduct<1>(w, m).multiply(x, x_scale, x_zero_point, bias, y, representable);
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
