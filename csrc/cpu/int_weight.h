// A weight in packed integer codes, and how its rows are cut for exact sums in 32-bit integers.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/packing.h"
#include "cpu/buffer.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

struct Packed {
    const uint8_t* codes;  // [n, k * bits / 8]
    const float* scale;    // [n, groups]
    const uint8_t* zero;   // [n, groups], or null: 2^(bits - 1)
    int64_t n, k, groups;
    int bits;

    bool valid() const { return bits == 4 || bits == 8; }
    int64_t group_size() const { return k / groups; }
    int64_t row_bytes() const { return k * bits / 8; }
    const uint8_t* row(int64_t r) const { return codes + r * row_bytes(); }
    int zero_point(int64_t r, int64_t g) const { return zero ? zero[r * groups + g] : 1 << (bits - 1); }
    // Whether all zero points (of rows [begin, end)) are codes themselves; others are allowed.
    bool zeros_are_codes() const { return zeros_are_codes(0, n); }
    bool zeros_are_codes(int64_t begin, int64_t end) const {
        if (!zero || bits == 8) return true;
        uint64_t any = 0;  // (eight at a time: there may be as many as a tenth of the weight's bytes)
        int64_t i = begin * groups;
        for (uint64_t eight; i + 8 <= end * groups; i += 8) {
            memcpy(&eight, zero + i, 8);
            any |= eight;
        }
        for (; i < end * groups; ++i) any |= zero[i];
        return !(any & 0xf0f0f0f0f0f0f0f0u);
    }
};

// Columns whose products of two 8-bit codes, each less its zero point, fit a 32-bit sum: 255 * 255 * 32768 < 2^31.
constexpr int64_t kExactColumns = 32768;

// Columns of one group that are summed as integers.
struct Segment {
    int64_t column, columns, group;
    int64_t step, steps;  // of 64 codes, see below
};

// The segments of a row. A segment takes whole steps of 64 codes, the last one filled up with zeros of the
// activations. In 8 bits a step is 64 columns. In 4 bits it holds what 64 bytes of a row unpack to without
// moving codes between lanes: 128 columns make a step of the even ones and one of the odd; a rest of up to 64
// makes one step, 32 even, then 32 odd.
class Segments {
  public:
    explicit Segments(const Packed& w)
        : per_group_((w.group_size() + kExactColumns - 1) / kExactColumns), list_(w.groups * per_group_) {
        if (!list_) return;
        for (int64_t g = 0; g < w.groups; ++g)
            for (int64_t column = 0; column < w.group_size(); column += kExactColumns) {
                const int64_t rest = w.group_size() - column, columns = rest < kExactColumns ? rest : kExactColumns;
                const int64_t steps = steps_of(columns, w.bits);
                list_.get()[count_++] = {g * w.group_size() + column, columns, g, steps_, steps};
                steps_ += steps;
            }
    }

    // Whether segments start at whole bytes.
    static bool serves(const Packed& w) { return w.bits == 8 || w.group_size() % 2 == 0; }

    explicit operator bool() const { return static_cast<bool>(list_); }
    int64_t count() const { return count_; }
    const Segment& operator[](int64_t i) const { return list_.get()[i]; }
    int64_t width() const { return steps_ * 64; }  // codes of a row of activations

  private:
    static int64_t steps_of(int64_t columns, int bits) {
        if (bits == 8) return (columns + 63) / 64;
        const int64_t rest = columns % 128;
        return columns / 128 * 2 + (rest == 0 ? 0 : rest <= 64 ? 1 : 2);
    }

    int64_t per_group_, count_ = 0, steps_ = 0;
    Buffer<Segment> list_;
};

#if defined(__AVX512F__)
// total + the sums of four products each, of unsigned bytes `codes` and signed bytes x. (Of the intrinsic's first argument
// GCC 12 makes a copy, for which it stores sums that would fit the registers.)
__attribute__((always_inline)) inline __m512i byte_products(__m512i total, __m512i codes, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(codes), "v"(x));
    return total;
}

// total + the sums of two products each, of signed words (as above).
__attribute__((always_inline)) inline __m512i word_products(__m512i total, __m512i a, __m512i b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
    return total;
}

// The upper four bits of each byte. (GFNI multiplies bytes by a matrix of bits.)
inline __m512i upper_nibbles(__m512i bytes) {
#if defined(__GFNI__)
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(0x1020408000000000), 0);
#else
    return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
#endif
}

// 64 bytes of a row: one step of codes in 8 bits, two in 4.
template <int Bits>
struct Unit {
    static constexpr int kSteps = 8 / Bits;

    __m512i codes[kSteps];

    explicit Unit(const uint8_t* from) : Unit(_mm512_loadu_si512(from)) {}
    // The last unit of a segment with `bytes` < 64 left, the other codes 0; it may have only one step, see steps().
    Unit(const uint8_t* from, int64_t bytes) : Unit(_mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, from)) {
        if (Bits == 4 && bytes <= 32)
            codes[0] = _mm512_inserti64x4(codes[0], _mm512_castsi512_si256(codes[kSteps - 1]), 1);
    }
    static int64_t whole(const Segment& s) { return s.columns * Bits / 512; }
    static int64_t rest(const Segment& s) { return s.columns * Bits / 8 % 64; }  // bytes
    static int steps(int64_t bytes) { return Bits == 4 && bytes > 32 ? 2 : 1; }

  private:
    explicit Unit(__m512i bytes) {
        if constexpr (Bits == 8) {
            codes[0] = bytes;
        } else {
            codes[0] = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
            codes[1] = upper_nibbles(bytes);
        }
    }
};
#endif

}  // namespace QNK_ISA
}  // namespace qnk
