// Philox calls side by side, one in each 64-bit lane, its values in the low halves (the high ones hold anything).
#pragma once

#include "common/philox.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

using Quads = __m512i;
constexpr int kQuads = 8;   // lanes
constexpr int kChains = 4;  // vectors of calls at once, to hide the latency of each

inline Quads all_quads(uint64_t value) { return _mm512_set1_epi64(static_cast<long long>(value)); }
inline Quads add(Quads a, Quads b) { return _mm512_add_epi64(a, b); }
inline Quads multiply_low(Quads a, Quads b) { return _mm512_mul_epu32(a, b); }
inline Quads shift_high(Quads a) { return _mm512_srli_epi64(a, 32); }
inline Quads shuffle_high(Quads a) { return _mm512_shuffle_epi32(a, _MM_PERM_DDBB); }
inline Quads exclusive_or(Quads a, Quads b) { return _mm512_xor_si512(a, b); }
inline Quads exclusive_or(Quads a, Quads b, Quads c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Quads low_halves(Quads a, Quads b) {
    constexpr __mmask16 kHighHalves = 0xAAAA;
    return _mm512_mask_shuffle_epi32(a, kHighHalves, b, _MM_PERM_CCAA);
}
inline Quads unpack_low(Quads a, Quads b) { return _mm512_unpacklo_epi64(a, b); }
inline Quads unpack_high(Quads a, Quads b) { return _mm512_unpackhi_epi64(a, b); }

// Lanes of calls 0, 1, ... such that the even ones, and the odd ones after them, have these in their order.
inline Quads element_order() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }

#else

using Quads = __m256i;
constexpr int kQuads = 4;
constexpr int kChains = 2;  // as many as 16 registers hold

inline Quads all_quads(uint64_t value) { return _mm256_set1_epi64x(static_cast<long long>(value)); }
inline Quads add(Quads a, Quads b) { return _mm256_add_epi64(a, b); }
inline Quads multiply_low(Quads a, Quads b) { return _mm256_mul_epu32(a, b); }
inline Quads shuffle_high(Quads a) { return _mm256_shuffle_epi32(a, 0xF5); }
inline Quads shift_high(Quads a) { return shuffle_high(a); }  // as fast or faster, on all processors without AVX-512
inline Quads exclusive_or(Quads a, Quads b) { return _mm256_xor_si256(a, b); }
inline Quads exclusive_or(Quads a, Quads b, Quads c) { return exclusive_or(exclusive_or(a, c), b); }
inline Quads low_halves(Quads a, Quads b) { return _mm256_blend_epi32(a, _mm256_shuffle_epi32(b, 0xA0), 0xAA); }
inline Quads unpack_low(Quads a, Quads b) { return _mm256_unpacklo_epi64(a, b); }
inline Quads unpack_high(Quads a, Quads b) { return _mm256_unpackhi_epi64(a, b); }
inline Quads element_order() { return _mm256_setr_epi64x(0, 2, 1, 3); }

#endif

constexpr int kCallsAtOnce = kChains * kQuads;

// The calls of one seed. A round is 2 multiplications, a shift and a shuffle (on different ports) and two xors of
// three operands.
class PhiloxLanes {
  public:
    explicit PhiloxLanes(uint64_t seed) {
        for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
            key0_[r] = all_quads(static_cast<uint32_t>(seed) + r * kPhiloxW0);
            key1_[r] = all_quads(static_cast<uint32_t>(seed >> 32) + r * kPhiloxW1);
        }
        first_key0_ = static_cast<uint32_t>(seed);
        second_key1_ = static_cast<uint32_t>(seed >> 32) + kPhiloxW1;
    }

    // take(v, even, odd) for the vectors v < kChains of kCallsAtOnce calls from `counter` on, a multiple of that:
    // the draws of the calls in even and in odd lanes. Lane i of a vector is its call order_i.
    template <typename Take>
    void calls(uint64_t counter, Quads order, const Take& take) const {
        const Quads m0 = all_quads(kPhiloxM0), m1 = all_quads(kPhiloxM1);
        // Half of the counter is zero and its third quarter the same for all: so is one product of the second round.
        const uint64_t second = uint64_t{kPhiloxM0} * (static_cast<uint32_t>(counter >> 32) ^ first_key0_);
        const Quads second_c2 = all_quads((second >> 32) ^ second_key1_), second_c3 = all_quads(second);
        Quads c0[kChains], c1[kChains], c2[kChains], c3[kChains];
#pragma GCC unroll 4
        for (int v = 0; v < kChains; ++v) {
            const Quads first = multiply_low(m0, add(all_quads(counter + static_cast<uint64_t>(v * kQuads)), order));
            c1[v] = multiply_low(m1, exclusive_or(shift_high(first), key1_[0]));
            c0[v] = exclusive_or(shuffle_high(c1[v]), key0_[1]);
            c2[v] = exclusive_or(first, second_c2);
            c3[v] = second_c3;
        }
#pragma GCC unroll 10
        for (int r = 2; r < kPhiloxRounds; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kChains; ++v) {
                const Quads product0 = multiply_low(m0, c0[v]), product1 = multiply_low(m1, c2[v]);
                c0[v] = exclusive_or(shuffle_high(product1), c1[v], key0_[r]);
                c2[v] = exclusive_or(shift_high(product0), c3[v], key1_[r]);
                c1[v] = product1;
                c3[v] = product0;
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < kChains; ++v) {
            const Quads low = low_halves(c0[v], c1[v]), high = low_halves(c2[v], c3[v]);
            take(v, unpack_low(low, high), unpack_high(low, high));
        }
    }

  private:
    Quads key0_[kPhiloxRounds], key1_[kPhiloxRounds];
    uint32_t first_key0_, second_key1_;
};

}  // namespace QNK_ISA
}  // namespace qnk

#endif
