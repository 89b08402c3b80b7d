// Philox4x32-10 (Salmon et al., SC 2011) and the draws of the noise, for host and device.
//
// Call c, with counter (lo32(c), hi32(c), 0, 0) and key (lo32(seed), hi32(seed)), is 128 bits: words in turn, low bits
// first. Element i takes the 16 bits from 16 (i % 8) on of call i / 8, and is noised when they are below the threshold.
// At a threshold of one half it takes one bit, i % 128 of call i / 128, and is noised when it is 0.
#pragma once

#include <stdint.h>

#include "common/isa_namespace.h"

#if defined(__CUDACC__)
#define QNK_HD __host__ __device__ __forceinline__
#else
#define QNK_HD inline
#endif

namespace qnk {
inline namespace QNK_ISA {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
constexpr int kDrawsPerCall = 8;  // 16-bit draws in one Philox call
constexpr uint32_t kHalf = 0x8000;  // the threshold of one half

struct Philox4 {
    uint32_t word[4];
};

QNK_HD Philox4 philox(uint64_t counter, uint64_t seed) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * c0;
        const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    return {{c0, c1, c2, c3}};
}

// Bit j of the result: whether element 8 * eight + j is noised.
QNK_HD uint32_t noise_bits(uint64_t eight, uint64_t seed, uint32_t threshold) {
    const Philox4 random = philox(threshold == kHalf ? eight / 16 : eight, seed);
    if (threshold == kHalf) {
        const uint32_t low = eight & 4 ? random.word[1] : random.word[0];
        const uint32_t high = eight & 4 ? random.word[3] : random.word[2];
        return ~((eight & 8 ? high : low) >> (8 * (eight & 3))) & 0xffu;
    }
    uint32_t bits = 0;
    for (int j = 0; j < kDrawsPerCall; ++j) {
        const uint32_t draw = (random.word[j / 2] >> (16 * (j % 2))) & 0xffffu;
        bits |= static_cast<uint32_t>(draw < threshold) << j;
    }
    return bits;
}

}  // namespace QNK_ISA
}  // namespace qnk
