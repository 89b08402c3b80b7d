// Products of rows with rows, a few by a few, so that what is loaded serves several of them: fp32 with sums in fp32, or
// 16-bit integers with exact sums in 32 bits.
#pragma once

#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

// What is multiplied a vector at a time. add(sum, a, b): sum + a b; of integers, lane by lane of 32 bits, each the sum of
// two neighbours' products.
template <typename T>
struct Dot;

template <>
struct Dot<float> {
    using Value = Vec;
    using Sum = Vec;
    using Total = float;
    static constexpr int kCount = kLanes;
    static Value load(const float* p) { return qnk::load(p); }
    static Sum none() { return splat(0.0f); }
    static Sum add(Sum sum, Value a, Value b) { return fma(a, b, sum); }
    static Total total(Sum sum) { return qnk::sum(sum); }
};

#if defined(__AVX2__)
template <>
struct Dot<int16_t> {
    using Value = __m256i;
    using Sum = __m256i;
    using Total = int32_t;
    static constexpr int kCount = 16;
    static Value load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Sum none() { return _mm256_setzero_si256(); }
    static Sum add(Sum sum, Value a, Value b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
    static Total total(Sum sum) {
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
};
#else
template <>
struct Dot<int16_t> {
    struct Value {
        int16_t v[8];
    };
    struct Sum {
        int32_t v[4];
    };
    using Total = int32_t;
    static constexpr int kCount = 8;
    static Value load(const int16_t* p) {
        Value value;
        for (int i = 0; i < 8; ++i) value.v[i] = p[i];
        return value;
    }
    static Sum none() { return {}; }
    static Sum add(Sum sum, Value a, Value b) {
        for (int i = 0; i < 4; ++i) sum.v[i] += a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
        return sum;
    }
    static Total total(Sum sum) { return sum.v[0] + sum.v[1] + sum.v[2] + sum.v[3]; }
};
#endif

constexpr int kTileRows = 4, kTileTokens = 3;  // 12 sums and 4 values fit 16 registers

// sums [Tokens][apart] += x [Tokens][stride] times w [kTileRows][width], over `columns`, a multiple of Dot<T>::kCount.
template <int Tokens, typename T>
void dot_tile(const T* x, int64_t stride, const T* w, int64_t width, int64_t columns, typename Dot<T>::Total* sums,
              int64_t apart) {
    using D = Dot<T>;
    typename D::Sum sum[Tokens][kTileRows];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) sum[t][r] = D::none();
    for (int64_t c = 0; c < columns; c += D::kCount) {
        typename D::Value token[Tokens];
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) token[t] = D::load(x + t * stride + c);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) {
            const typename D::Value row = D::load(w + r * width + c);
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) sum[t][r] = D::add(sum[t][r], token[t], row);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) sums[t * apart + r] += D::total(sum[t][r]);
}

// The same of `tokens` and `rows`, a multiple of kTileRows. (A few tokens stay in the first-level cache, meet all rows.)
template <typename T>
void dot_block(const T* x, int64_t stride, int64_t tokens, const T* w, int64_t width, int64_t rows, int64_t columns,
               typename Dot<T>::Total* sums, int64_t apart) {
    for (int64_t t = 0; t < tokens; t += kTileTokens)
        for (int64_t r = 0; r < rows; r += kTileRows) {
            const T *from = x + t * stride, *with = w + r * width;
            auto* to = sums + t * apart + r;
            switch (tokens - t) {
                case 1: dot_tile<1>(from, stride, with, width, columns, to, apart); break;
                case 2: dot_tile<2>(from, stride, with, width, columns, to, apart); break;
                default: dot_tile<kTileTokens>(from, stride, with, width, columns, to, apart);
            }
        }
}

}  // namespace QNK_ISA
}  // namespace qnk
