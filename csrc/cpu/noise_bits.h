// The noise mask as a bitmap: bit i of the result is element first + i, first a multiple of 64.
#pragma once

#include <string.h>

#include "common/philox.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace qnk {
inline namespace QNK_ISA {

constexpr int64_t kChunk = 4096;                     // elements handled at once: their bitmap stays in cache
constexpr int64_t kBitmapBytes = kChunk / 8 + 64;  // room for whole vectors past the end

#if defined(__AVX512F__)

// 8 Philox calls in the 64-bit lanes (values in the low halves) give the bits of 64 consecutive elements.
// A round is 2 multiplications, 2 shuffles and 2 three-way xors. Lane order 0 4 1 5 2 6 3 7 of the counters
// makes the unpacked words come out in element order.
inline void noise_bitmap(uint8_t* bitmap, int64_t first, int64_t count, int64_t seed, int32_t threshold) {
    const uint64_t key = static_cast<uint64_t>(seed);
    __m512i key0[kPhiloxRounds], key1[kPhiloxRounds];
    for (int r = 0; r < kPhiloxRounds; ++r) {
        key0[r] = _mm512_set1_epi64(static_cast<uint32_t>(key) + r * kPhiloxW0);
        key1[r] = _mm512_set1_epi64(static_cast<uint32_t>(key >> 32) + r * kPhiloxW1);
    }
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i limit = _mm512_set1_epi16(static_cast<short>(threshold));
    constexpr __mmask16 kHighHalves = 0xAAAA;
    auto calls = [&](int64_t counter, uint64_t& bits) {
        __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(counter), order);
        __m512i c1 = _mm512_srli_epi64(c0, 32), c2 = _mm512_setzero_si512(), c3 = c2;
#pragma GCC unroll 10
        for (int r = 0; r < kPhiloxRounds; ++r) {
            const __m512i product0 = _mm512_mul_epu32(m0, c0), product1 = _mm512_mul_epu32(m1, c2);
            const __m512i high0 = _mm512_srli_epi64(product0, 32);
            const __m512i high1 = _mm512_shuffle_epi32(product1, _MM_PERM_DDBB);
            c0 = _mm512_ternarylogic_epi64(high1, c1, key0[r], 0x96);
            c2 = _mm512_ternarylogic_epi64(high0, c3, key1[r], 0x96);
            c1 = product1;
            c3 = product0;
        }
        const __m512i low = _mm512_mask_shuffle_epi32(c0, kHighHalves, c1, _MM_PERM_CCAA);
        const __m512i high = _mm512_mask_shuffle_epi32(c2, kHighHalves, c3, _MM_PERM_CCAA);
        const uint64_t first_half = _mm512_cmplt_epu16_mask(_mm512_unpacklo_epi64(low, high), limit);
        const uint64_t second_half = _mm512_cmplt_epu16_mask(_mm512_unpackhi_epi64(low, high), limit);
        bits = first_half | (second_half << 32);
    };
    for (int64_t i = 0; i < count; i += 128) {  // two independent chains hide the latency of a round
        uint64_t bits[2];
        calls((first + i) / kDrawsPerCall, bits[0]);
        calls((first + i) / kDrawsPerCall + 8, bits[1]);
        memcpy(bitmap + i / 8, bits, 16);
    }
}

#else

// The same, 8 calls side by side in plain loops that a compiler turns into vector code.
inline void noise_bitmap(uint8_t* bitmap, int64_t first, int64_t count, int64_t seed, int32_t threshold) {
    constexpr int kCalls = 8;
    for (int64_t i = 0; i < count; i += kCalls * kDrawsPerCall) {
        uint32_t c0[kCalls], c1[kCalls], c2[kCalls] = {}, c3[kCalls] = {};
        for (int j = 0; j < kCalls; ++j) {
            const uint64_t counter = static_cast<uint64_t>((first + i) / kDrawsPerCall + j);
            c0[j] = static_cast<uint32_t>(counter);
            c1[j] = static_cast<uint32_t>(counter >> 32);
        }
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
        for (int r = 0; r < kPhiloxRounds; ++r) {
            for (int j = 0; j < kCalls; ++j) {
                const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * c0[j];
                const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * c2[j];
                c0[j] = static_cast<uint32_t>(product1 >> 32) ^ c1[j] ^ k0;
                c1[j] = static_cast<uint32_t>(product1);
                c2[j] = static_cast<uint32_t>(product0 >> 32) ^ c3[j] ^ k1;
                c3[j] = static_cast<uint32_t>(product0);
            }
            k0 += kPhiloxW0;
            k1 += kPhiloxW1;
        }
        for (int j = 0; j < kCalls; ++j) {
            const uint32_t words[4] = {c0[j], c1[j], c2[j], c3[j]};
            uint32_t bits = 0;
            for (int d = 0; d < kDrawsPerCall; ++d) {
                const uint32_t draw = (words[d / 2] >> (16 * (d % 2))) & 0xffffu;
                bits |= static_cast<uint32_t>(draw < static_cast<uint32_t>(threshold)) << d;
            }
            bitmap[i / 8 + j] = static_cast<uint8_t>(bits);
        }
    }
}

#endif

// The bits of `count` elements from first on; thresholds 0 and 65536 need no draw.
inline void fill_noise(uint8_t* bitmap, int64_t first, int64_t count, const int64_t* seed, int32_t threshold) {
    if (threshold <= 0 || threshold >= 65536)
        memset(bitmap, threshold <= 0 ? 0 : 0xff, static_cast<size_t>(kBitmapBytes));
    else
        noise_bitmap(bitmap, first, count, *seed, threshold);
}

// Bits of the vector that starts at element `offset` of the chunk (up to 16).
inline uint32_t bits_at(const uint8_t* bitmap, int64_t offset) {
    uint32_t word;
    memcpy(&word, bitmap + (offset >> 3), 4);
    return word >> (offset & 7);
}

}  // namespace QNK_ISA
}  // namespace qnk
