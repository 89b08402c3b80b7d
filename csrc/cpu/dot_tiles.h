// Products of rows with rows, a few by a few, so that what is loaded serves several of them: fp32 with sums in fp32, or
// 16-bit integers with exact sums in 32 bits.
#pragma once

#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int kTileRows = 4, kTileTokens = 3;  // 12 sums and 4 values fit 16 registers

// What is multiplied a vector at a time. add(sum, a, b): sum + a b; of integers, lane by lane of 32 bits, each the sum of
// two neighbours' products. kHeld: tokens whose values registers hold beside the sums, others are read where they lie. add_totals(sum, totals): totals [kTileRows] += the lanes of each.
template <typename T>
struct Dot;

template <>
struct Dot<float> {
    using Value = Vec;
    using Sum = Vec;
    using Total = float;
    static constexpr int kCount = kLanes, kHeld = 3;
    static Value load(const float* p) { return qnk::load(p); }
    static Sum none() { return splat(0.0f); }
    static Sum add(Sum sum, Value a, Value b) { return fma(a, b, sum); }
    static Sum add(Sum sum, Value a, const float* b) { return fma(a, load(b), sum); }
    static void add_totals(const Sum (&sum)[kTileRows], Total* totals) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sum[0].v, sum[1].v), _mm256_hadd_ps(sum[2].v, sum[3].v));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
        _mm_storeu_ps(totals, _mm_add_ps(_mm_loadu_ps(totals), four));
#else
        for (int r = 0; r < kTileRows; ++r) totals[r] += qnk::sum(sum[r]);
#endif
    }
};

#if defined(__AVX2__)
template <>
struct Dot<int16_t> {
    using Value = __m256i;
    using Sum = __m256i;
    using Total = int32_t;
    static constexpr int kCount = 16, kHeld = 2;  // a product takes a register of its own
    static Value load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Sum none() { return _mm256_setzero_si256(); }
    // (As intrinsics GCC 12 makes all products first, and stores sums for want of registers.)
    static Sum add(Sum sum, Value a, Value b) {
        Value product;
        __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(b), "x"(a));
        return sum;
    }
    static Sum add(Sum sum, Value a, const int16_t* b) {
        Value product;
        __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0"
                : "+x"(sum), "=&x"(product)
                : "m"(*reinterpret_cast<const __m256i_u*>(b)), "x"(a));
        return sum;
    }
    static Total total(Sum sum) {
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
    static void add_totals(const Sum (&sum)[kTileRows], Total* totals) {
        const __m256i pairs =
            _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        __m128i* to = reinterpret_cast<__m128i*>(totals);
        _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), four));
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
    static constexpr int kCount = 8, kHeld = 3;
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
    static Sum add(Sum sum, Value a, const int16_t* b) { return add(sum, a, load(b)); }
    static void add_totals(const Sum (&sum)[kTileRows], Total* totals) {
        for (int r = 0; r < kTileRows; ++r) totals[r] += sum[r].v[0] + sum[r].v[1] + sum[r].v[2] + sum[r].v[3];
    }
};
#endif

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
        constexpr int kHeld = Tokens < D::kHeld ? Tokens : D::kHeld;
        typename D::Value token[kHeld];
#pragma GCC unroll 4
        for (int t = 0; t < kHeld; ++t) token[t] = D::load(x + t * stride + c);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) {
            const typename D::Value row = D::load(w + r * width + c);
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t)
                sum[t][r] = t < kHeld ? D::add(sum[t][r], row, token[t]) : D::add(sum[t][r], row, x + t * stride + c);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) D::add_totals(sum[t], sums + t * apart);
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
