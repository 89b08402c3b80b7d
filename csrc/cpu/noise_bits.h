// The draws of the noise, 64 elements at a time, and its mask: bit j of word(b) is element 64 * b + j.
#pragma once

#include "common/philox.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace qnk {
inline namespace QNK_ISA {

constexpr int64_t kWord = 64;  // elements in a word of the mask
constexpr int kWords = 4;      // words drawn at once: as many chains of rounds, to hide the latency of each

#if defined(__AVX512F__)

// A word is 8 Philox calls in the 64-bit lanes (values in the low halves). A round is 2 multiplications, a shift and a
// shuffle (on different ports) and 2 three-way xors. Lane order 0 4 1 5 2 6 3 7 of the counters makes the
// unpacked words come out in element order.
class NoiseWords {
  public:
    NoiseWords(int64_t seed, int32_t threshold) : limit_(_mm512_set1_epi16(static_cast<short>(threshold))) {
        const uint64_t key = static_cast<uint64_t>(seed);
        for (int r = 0; r < kPhiloxRounds; ++r) {
            key0_[r] = _mm512_set1_epi64(static_cast<uint32_t>(key) + r * kPhiloxW0);
            key1_[r] = _mm512_set1_epi64(static_cast<uint32_t>(key >> 32) + r * kPhiloxW1);
        }
    }

    // words [kWords] <- those of blocks first, first + 1, ...
    void draw(int64_t first, uint64_t* words) const {
        generate(first, [&](int w, __m512i lower, __m512i upper) {
            uint32_t even = _mm512_cmplt_epu16_mask(lower, limit_);
            uint32_t odd = _mm512_cmplt_epu16_mask(upper, limit_);
            // GCC 12 may spill a mask register as 32 bits and widen it by reading 64: use a general register
            __asm__("" : "+r"(even), "+r"(odd));
            words[w] = even | (static_cast<uint64_t>(odd) << 32);
        });
    }

    // values [kWords * kWord] <- the draws of the elements of blocks first, first + 1, ...
    void values(int64_t first, uint16_t* values) const {
        generate(first, [&](int w, __m512i lower, __m512i upper) {
            _mm512_storeu_si512(values + w * kWord, lower);
            _mm512_storeu_si512(values + w * kWord + kWord / 2, upper);
        });
    }

  private:
    // take(w, lower, upper) for each word: the draws of its first and last 32 elements.
    template <typename Take>
    void generate(int64_t first, const Take& take) const {
        const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
        const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        __m512i c0[kWords], c1[kWords], c2[kWords], c3[kWords];
#pragma GCC unroll 4
        for (int w = 0; w < kWords; ++w) {
            c0[w] = _mm512_add_epi64(_mm512_set1_epi64((first + w) * (kWord / kDrawsPerCall)), order);
            c1[w] = _mm512_srli_epi64(c0[w], 32);
            c2[w] = c3[w] = _mm512_setzero_si512();
        }
#pragma GCC unroll 10
        for (int r = 0; r < kPhiloxRounds; ++r) {
#pragma GCC unroll 4
            for (int w = 0; w < kWords; ++w) {
                const __m512i product0 = _mm512_mul_epu32(m0, c0[w]), product1 = _mm512_mul_epu32(m1, c2[w]);
                const __m512i high0 = _mm512_srli_epi64(product0, 32);
                const __m512i high1 = _mm512_shuffle_epi32(product1, _MM_PERM_DDBB);
                c0[w] = _mm512_ternarylogic_epi64(high1, c1[w], key0_[r], 0x96);
                c2[w] = _mm512_ternarylogic_epi64(high0, c3[w], key1_[r], 0x96);
                c1[w] = product1;
                c3[w] = product0;
            }
        }
        constexpr __mmask16 kHighHalves = 0xAAAA;
#pragma GCC unroll 4
        for (int w = 0; w < kWords; ++w) {
            const __m512i low = _mm512_mask_shuffle_epi32(c0[w], kHighHalves, c1[w], _MM_PERM_CCAA);
            const __m512i high = _mm512_mask_shuffle_epi32(c2[w], kHighHalves, c3[w], _MM_PERM_CCAA);
            take(w, _mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
        }
    }

    __m512i key0_[kPhiloxRounds], key1_[kPhiloxRounds], limit_;
};

#else

// The same, 8 calls side by side in plain loops that a compiler turns into vector code.
class NoiseWords {
  public:
    NoiseWords(int64_t seed, int32_t threshold)
        : seed_(static_cast<uint64_t>(seed)), threshold_(static_cast<uint32_t>(threshold)) {}

    void draw(int64_t first, uint64_t* words) const {
        uint16_t draws[kWords * kWord];
        values(first, draws);
        for (int w = 0; w < kWords; ++w) {
            uint64_t bits = 0;
            for (int j = 0; j < kWord; ++j)
                bits |= static_cast<uint64_t>(draws[w * kWord + j] < threshold_) << j;
            words[w] = bits;
        }
    }

    void values(int64_t first, uint16_t* values) const {
        for (int w = 0; w < kWords; ++w) values_of_word(first + w, values + w * kWord);
    }

  private:
    void values_of_word(int64_t block, uint16_t* values) const {
        constexpr int kCalls = kWord / kDrawsPerCall;
        uint32_t c0[kCalls], c1[kCalls], c2[kCalls] = {}, c3[kCalls] = {};
        for (int j = 0; j < kCalls; ++j) {
            const uint64_t counter = static_cast<uint64_t>(block) * kCalls + static_cast<uint64_t>(j);
            c0[j] = static_cast<uint32_t>(counter);
            c1[j] = static_cast<uint32_t>(counter >> 32);
        }
        uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
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
            for (int d = 0; d < kDrawsPerCall; ++d)
                values[kDrawsPerCall * j + d] = static_cast<uint16_t>(words[d / 2] >> (16 * (d % 2)));
        }
    }

    uint64_t seed_;
    uint32_t threshold_;
};

#endif

// The words of the mask in turn: those last drawn are kept, and thresholds 0 and 65536 draw nothing.
class Noise {
  public:
    Noise(const int64_t* seed, int32_t threshold)
        : words_(threshold > 0 && threshold < 65536 ? *seed : 0, threshold),
          constant_(threshold <= 0 || threshold >= 65536) {
        for (uint64_t& word : drawn_) word = threshold <= 0 ? 0 : ~uint64_t{0};
    }

    uint64_t word(int64_t block) {
        if (!constant_ && block / kWords != group_) {
            group_ = block / kWords;
            words_.draw(group_ * kWords, drawn_);
        }
        return drawn_[block % kWords];
    }

  private:
    NoiseWords words_;
    bool constant_;
    uint64_t drawn_[kWords];
    int64_t group_ = -1;
};

constexpr int64_t kDrawn = kWords * kWord;  // elements whose draws are made at once

// The draws themselves in turn: those last made are kept.
class Draws {
  public:
    explicit Draws(int64_t seed) : words_(seed, 0) {}

    // Of element i and those after it up to the next multiple of kDrawn.
    const uint16_t* from(int64_t i) {
        if (i / kDrawn != group_) {
            group_ = i / kDrawn;
            words_.values(group_ * kWords, values_);
        }
        return values_ + i % kDrawn;
    }

  private:
    NoiseWords words_;
    uint16_t values_[kWords * kWord];
    int64_t group_ = -1;
};

}  // namespace QNK_ISA
}  // namespace qnk
