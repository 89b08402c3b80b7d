// Rows of 16 values: least values of 16 of them at once, and which elements of one are at most a bound.
#pragma once

#include <stdint.h>

#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int kRow = 16;
constexpr int kRowVecs = kRow / kLanes;

// minima [16] <- least value of each of 16 rows of 16 (aligned to 64 bytes).
inline void row_minima(const float* rows, float* minima) {
#if defined(__AVX512F__)
    const auto fold = [](__m512 a, __m512 b) { return _mm512_min_ps(a, b); };
    __m512 quads[4];  // lane l holds, of four rows, the least of their elements 4 l to 4 l + 3
    for (int q = 0; q < 4; ++q) {
        const float* row = rows + q * 4 * kRow;
        const __m512 a = _mm512_load_ps(row), b = _mm512_load_ps(row + kRow);
        const __m512 c = _mm512_load_ps(row + 2 * kRow), d = _mm512_load_ps(row + 3 * kRow);
        const __m512d ab = _mm512_castps_pd(fold(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        const __m512d cd = _mm512_castps_pd(fold(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        quads[q] = fold(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    }
    const auto halves = [&](__m512 a, __m512 b) {
        return fold(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 low = halves(quads[0], quads[1]), high = halves(quads[2], quads[3]);
    _mm512_store_ps(minima, fold(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
#else
    for (int r = 0; r < kRow; ++r) {
        Vec least = load(rows + r * kRow);
        for (int v = 1; v < kRowVecs; ++v) least = min(load(rows + r * kRow + v * kLanes), least);
        minima[r] = min_of(least);
    }
#endif
}

// Bit l is set where element l of a row is at most `bound`.
inline uint32_t at_most(const float* row, float bound) {
    uint32_t bits = 0;
    for (int v = 0; v < kRowVecs; ++v) {
        const Mask greater = less(splat(bound), load(row + v * kLanes));
        bits |= static_cast<uint32_t>(first_lanes(kLanes) & static_cast<Mask>(~greater)) << (v * kLanes);
    }
    return bits;
}

}  // namespace QNK_ISA
}  // namespace qnk
