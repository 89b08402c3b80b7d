// The draws of the noise, 64 elements at a time, and its mask: bit j of word(b) is element 64 * b + j.
#pragma once

#include <string.h>

#include "common/philox.h"
#include "cpu/philox_lanes.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int64_t kWord = 64;  // elements in a word of the mask
constexpr int kWords = 4;      // words drawn at once

#if defined(__AVX2__)

class NoiseWords {
  public:
    NoiseWords(int64_t seed, int32_t threshold)
        : philox_(static_cast<uint64_t>(seed)), threshold_(static_cast<uint16_t>(threshold)) {}

    // words [kWords] <- those of blocks first, first + 1, ...; first is a multiple of kWords
    void draw(int64_t first, uint64_t* words) const {
#if defined(__AVX512F__)
        const Quads limit = _mm512_set1_epi16(static_cast<short>(threshold_));
        generate(first, element_order(), [&](int v, Quads even, Quads odd) {
            uint32_t lower = _mm512_cmplt_epu16_mask(even, limit);
            uint32_t upper = _mm512_cmplt_epu16_mask(odd, limit);
            // GCC 12 may spill a mask register as 32 bits and widen it by reading 64: use a general register
            __asm__("" : "+r"(lower), "+r"(upper));
            words[v] = lower | (static_cast<uint64_t>(upper) << 32);
        });
#else
        // unsigned numbers compare like signed ones once 2^15 is taken from both; packing orders the calls
        const Quads half = _mm256_set1_epi16(-0x8000);
        const Quads limit = exclusive_or(_mm256_set1_epi16(static_cast<short>(threshold_)), half);
        generate(first, _mm256_setr_epi64x(0, 1, 2, 3), [&](int v, Quads even, Quads odd) {
            const Quads lower = _mm256_cmpgt_epi16(limit, exclusive_or(even, half));
            const Quads upper = _mm256_cmpgt_epi16(limit, exclusive_or(odd, half));
            const uint64_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(lower, upper)));
            words[v / 2] = v % 2 ? words[v / 2] | bits << 32 : bits;
        });
#endif
    }

    // values [kWords * kWord] <- the draws of the elements of blocks first, first + 1, ...
    void values(int64_t first, uint16_t* values) const {
        constexpr int kDraws = kQuads * kDrawsPerCall;
        generate(first, element_order(), [&](int v, Quads even, Quads odd) {
            memcpy(values + v * kDraws, &even, sizeof even);
            memcpy(values + v * kDraws + kDraws / 2, &odd, sizeof odd);
        });
    }

  private:
    // take(v, even, odd) for each vector of calls.
    template <typename Take>
    void generate(int64_t first, const Quads& order, const Take& take) const {
        constexpr int kCalls = kWord / kDrawsPerCall;
        for (int i = 0; i < kWords * kCalls; i += kCallsAtOnce)
            philox_.calls(static_cast<uint64_t>(first * kCalls + i), order,
                          [&](int v, Quads even, Quads odd) { take(i / kQuads + v, even, odd); });
    }

    PhiloxLanes philox_;
    uint16_t threshold_;
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
          half_(threshold == static_cast<int32_t>(kHalf)) {
        if (threshold <= 0 || threshold >= 65536) {  // one word for all
            shift_ = 63;
            group_ = 0;
            drawn_[0] = threshold <= 0 ? 0 : ~uint64_t{0};
        } else {
            shift_ = half_ ? kHalfShift : kShift;
            last_ = (1 << shift_) - 1;
        }
    }

    uint64_t word(int64_t block) {
        if (block >> shift_ != group_) draw(block >> shift_);
        return drawn_[block & last_];
    }

  private:
    static constexpr int kShift = 2, kHalfShift = kShift + 4;  // log2 of the words drawn at once
    static_assert(kWords == 1 << kShift && kWords * kWord == 4 << kHalfShift, "");

    __attribute__((noinline)) void draw(int64_t group) {
        group_ = group;
        if (!half_) return words_.draw(group * kWords, drawn_);
        static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word is four draws in a row");
        uint16_t values[kWords * kWord];  // whose bits are the draws of 16 times as many elements
        words_.values(group * kWords, values);
        memcpy(drawn_, values, sizeof values);
        for (uint64_t& word : drawn_) word = ~word;
    }

    NoiseWords words_;
    bool half_;
    int shift_;
    int64_t last_ = 0, group_ = -1;
    uint64_t drawn_[1 << kHalfShift];
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
