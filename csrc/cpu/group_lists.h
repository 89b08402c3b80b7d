// Which groups of centroids a point must look at, from its bounds (see nearest_bounds.h), and lists of points by group.
#pragma once

#include <stdint.h>

#include "cpu/rows.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int kBoundTile = 512;               // points whose groups are found before any is looked at
constexpr int kListSize = kBoundTile + kRow;  // and what is written past the end

// Bit g is set where group g, of the 16 whose bounds and ways are given, may hold a centroid as near as `own` units: its
// bound is at most own + travelled.
inline uint16_t within(const uint16_t* bounds, const uint16_t* travelled, uint16_t own) {
#if defined(__AVX2__)
    const __m256i way = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(travelled));
    const __m256i limit = _mm256_adds_epu16(_mm256_set1_epi16(static_cast<int16_t>(own)), way);
    const __m256i bound = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bounds));
    const __m256i in = _mm256_cmpeq_epi16(_mm256_max_epu16(bound, limit), limit);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(in), _mm256_extracti128_si256(in, 1));
    return static_cast<uint16_t>(_mm_movemask_epi8(bytes));
#else
    uint32_t bits = 0;
    for (int g = 0; g < kRow; ++g) {
        const int limit = own + travelled[g];
        bits |= static_cast<uint32_t>(bounds[g] <= (limit < 65535 ? limit : 65535)) << g;
    }
    return static_cast<uint16_t>(bits);
#endif
}

// The places of the bits set in a byte, in order.
struct Places {
    uint16_t of[256][8];

    constexpr Places() : of() {
        for (int byte = 0; byte < 256; ++byte) {
            int count = 0;
            for (int place = 0; place < 8; ++place)
                if (byte >> place & 1) of[byte][count++] = static_cast<uint16_t>(place);
        }
    }
};

// Points first to first + 15, of which `groups` has a bit for each of 16 groups, go to the lists [16][kListSize] of theirs.
// Without a branch: which groups a point needs is not to be foreseen.
inline void append(const uint16_t* groups, int first, uint16_t* lists, int32_t* counts) {
#if defined(__AVX2__)
    static constexpr Places kPlaces;
    const __m128i from = _mm_set1_epi16(static_cast<int16_t>(first)), eight = _mm_set1_epi16(8);
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(groups));
    for (int g = kRow - 1; g >= 0; --g, bits = _mm256_add_epi16(bits, bits)) {  // bit g is the sign
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        const auto points = static_cast<uint32_t>(_mm_movemask_epi8(bytes));
        const auto places = [&](uint32_t byte) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(kPlaces.of[byte])); };
        uint16_t* to = lists + g * kListSize + counts[g];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi16(places(points & 255u), from));
        to += __builtin_popcount(points & 255u);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi16(places(points >> 8), _mm_add_epi16(from, eight)));
        counts[g] += __builtin_popcount(points);
    }
#else
    for (int p = 0; p < kRow; ++p)
        for (uint32_t near = groups[p]; near; near &= near - 1) {
            const int g = __builtin_ctz(near);
            lists[g * kListSize + counts[g]++] = static_cast<uint16_t>(first + p);
        }
#endif
}

}  // namespace QNK_ISA
}  // namespace qnk
