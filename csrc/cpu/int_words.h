// Integer product for a few tokens with AVX2: rows of the weight are read where they lie and multiplied as 16-bit words.
//
// A row of activations is either one of 8-bit codes, less their zero point, or fixed point of 23 bits and sign in two words
// of 12 bits, x = unit * (high * 2^12 + low): the unit is a power of two, an element is off by at most 2^-23 of the row's
// largest magnitude. Sums are exact. Per 16 codes one instruction to widen them (two more for 32 codes of 4 bits), and two
// a token and word; fp32 takes eight, and two a token. The zero point is taken from the codes of fixed point, one more
// instruction, and from the sums of 8-bit activations.
#pragma once

#include <string.h>

#include "cpu/dot_tiles.h"
#include "cpu/fixed_point.h"
#include "cpu/int_levels.h"
#include "cpu/int_weight.h"
#include "cpu/parallel.h"
#include "qnkernels.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)

// Parts: words of an activation, 1 (8-bit codes) or 2 (fixed point).
template <int Parts>
class WordProduct {
  public:
    static bool serves(const Packed& w, int64_t m) {
        return m <= kMostTokens && w.k > 0 && w.group_size() % step_columns(w.bits) == 0;
    }

    WordProduct(const Packed& w, int64_t m)
        : w_(w), m_(m), apart_(w.k + 32), per_group_((w.group_size() + kExactColumns - 1) / kExactColumns), words_(m * Parts * apart_),
          word_sums_(Parts == 1 ? m * w.groups * per_group_ : 1) {}

    // (Words of 8 bits: products with codes as they are fit the same sums as those with codes less their zero point.)
    // representable: false where a row has no fixed point.
    template <typename T>
    int multiply(const T* x, const float* x_scale, const float* x_zero_point, const float* bias, T* y,
                 bool& representable) {
        if (!words_ || !word_sums_) return QNK_NO_MEMORY;
        representable = true;
        for (int64_t t = 0; t < m_ && representable; ++t) {
            if (Parts == 1)
                to_levels(x + t * w_.k, x_scale, x_zero_point, t);
            else
                representable = to_fixed_point(x + t * w_.k, t);
        }
        if (!representable) return QNK_OK;
        parallel_for(w_.n, 16, [&](int64_t begin, int64_t end) {
            w_.bits == 8 ? rows<8>(bias, y, begin, end) : rows<4>(bias, y, begin, end);
        });
        return QNK_OK;
    }

  private:
    // Tokens whose words the second-level cache holds, or for which this takes fewer instructions than fp32 does.
    static constexpr int kMostTokens = Parts == 1 ? 16 : 4;
    static constexpr int kAtOnce = 6 / Parts;  // tokens whose sums with two rows fit the registers
    static constexpr int kShift = 12;
    // |word| <= 2^11: sums of 2^15 products with codes fit 8 lanes of 32 bits. (8-bit codes fit one lane.)
    static_assert(kExactColumns / 8 * 255 * (1 << (kShift - 1)) < int64_t{1} << 31);

    static constexpr int step_columns(int bits) { return bits == 8 ? 16 : 32; }
    static constexpr int at_4_bits(int i) { return i % 16 * 2 + i / 16; }  // the column of a step that word i is of

    // Words [k] of a token, the high ones first; in 4 bits, of 32 columns the even ones come first.
    int16_t* words(int64_t t, int part) const { return words_.get() + (t * Parts + part) * apart_; }

    // Of the words of the one part in group g, from its column c on, as many as are summed together.
    int32_t& word_sum(int64_t t, int64_t g, int64_t c) const {
        return word_sums_.get()[(t * w_.groups + g) * per_group_ + c / kExactColumns];
    }

    // Of `columns` words, a multiple of 16.
    static int32_t sum_words(const int16_t* words, int64_t columns) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t c = 0; c < columns; c += 16)
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(Words::load(words + c), _mm256_set1_epi16(1)));
        return Words::total(sum);
    }

    template <typename T>
    void to_levels(const T* x, const float* x_scale, const float* x_zero_point, int64_t t) {
        int16_t* to = words(t, 0);
        unit_[t] = quantize_levels(x, w_.k, x_scale, x_zero_point, to);
        const int64_t size = w_.group_size();
        for (int64_t g = 0; g < w_.groups; ++g)
            for (int64_t c = 0; c < size; c += kExactColumns)
                word_sum(t, g, c) = sum_words(to + g * size + c, size - c < kExactColumns ? size - c : kExactColumns);
        if (w_.bits == 8) return;
        for (int64_t c = 0; c < w_.k; c += 32) {
            int16_t natural[32];
            memcpy(natural, to + c, sizeof natural);
            for (int i = 0; i < 32; ++i) to[c + i] = natural[at_4_bits(i)];
        }
    }

    template <typename T>
    bool to_fixed_point(const T* x, int64_t t) {
        int unit;
        if (!fixed_point_unit(x, w_.k, 2 * kShift - 1, 0x1p23f, unit)) return false;
        unit_[t] = power_of_two(unit);
        const Vec up = splat(power_of_two(-unit));
        const int step = step_columns(w_.bits);
        for (int64_t c = 0; c < w_.k; c += step) {
            alignas(32) int32_t fixed[32];
            for (int i = 0; i < step; i += 8)
                _mm256_store_si256(reinterpret_cast<__m256i*>(fixed + i), _mm256_cvtps_epi32((load(x + c + i) * up).v));
            int16_t *high = words(t, 0) + c, *low = words(t, 1) + c;
            for (int i = 0; i < step; ++i) {
                const int32_t value = fixed[w_.bits == 8 ? i : at_4_bits(i)];
                high[i] = static_cast<int16_t>((value + (1 << (kShift - 1))) >> kShift);
                low[i] = static_cast<int16_t>(value - high[i] * (1 << kShift));
            }
        }
        return true;
    }

    // Rows begin to end of the weight. (Four, or two, stay in the first-level cache, meet all tokens.)
    template <int Bits, typename T>
    void rows(const float* bias, T* y, int64_t begin, int64_t end) const {
        const int64_t turns = (m_ + kAtOnce - 1) / kAtOnce, step = m_ * Parts <= 3 ? 4 : 2;
        for (int64_t o = begin; o < end; o += step)
            for (int64_t turn = 0, t = 0; turn < turns; ++turn) {
                const int64_t here = (m_ - t + turns - turn - 1) / (turns - turn), stop = end < o + step ? end : o + step;
                switch (here) {  // (at most kAtOnce)
                    case 1: tile<Bits, 1>(bias, y, t, o, stop); break;
                    case 2: tile<Bits, 2>(bias, y, t, o, stop); break;
                    case 3: tile<Bits, 3>(bias, y, t, o, stop); break;
                    case 4: tile<Bits, 4 / Parts>(bias, y, t, o, stop); break;
                    case 5: tile<Bits, 5 / Parts>(bias, y, t, o, stop); break;
                    default: tile<Bits, kAtOnce>(bias, y, t, o, stop);
                }
                t += here;
            }
    }

    // y of tokens t, t + 1, ... and rows o to end.
    template <int Bits, int Tokens, typename T>
    void tile(const float* bias, T* y, int64_t t, int64_t o, int64_t end) const {
        constexpr int kRows = Parts * Tokens <= 3 ? 4 : 2;
        for (; o < end; o += kRows) {
            float out[Tokens][kRows];
            some<Bits, Tokens, kRows>(t, o, end - o, out);
            for (int r = 0; r < kRows && o + r < end; ++r)
                for (int v = 0; v < Tokens; ++v) {
                    const float value = Parts == 1 ? out[v][r] * unit_[t + v] : out[v][r];
                    y[(t + v) * w_.n + o + r] = from_float<T>(bias ? value + bias[o + r] : value);
                }
        }
    }

    // out [Tokens][Rows] <- products of rows o, o + 1, ..., of which `count` exist.
    template <int Bits, int Tokens, int Rows>
    void some(int64_t t, int64_t o, int64_t count, float (&out)[Tokens][Rows]) const {
        Vec total[Tokens][Rows];
        each<Tokens>([&](int v) {
            for (int r = 0; r < Rows; ++r) total[v][r] = splat(out[v][r] = 0.0f);
        });
        int64_t row[Rows];
        for (int r = 0; r < Rows; ++r) row[r] = o + (r < count ? r : 0);
        const int64_t size = w_.group_size();
        for (int64_t g = 0; g < w_.groups; ++g)
            for (int64_t c = 0; c < size; c += kExactColumns) {
                __m256i sum[Tokens][Rows][Parts];
                const int64_t columns = size - c < kExactColumns ? size - c : kExactColumns;
                products<Bits, Tokens, Rows>(t, row, g, g * size + c, columns, sum);
                for (int r = 0; r < Rows; ++r) {
                    const float scale = w_.scale[row[r] * w_.groups + g];
                    for (int v = 0; v < Tokens; ++v) {
                        const __m256i *exact = sum[v][r], low = exact[Parts - 1];
                        if (Parts == 1) {
                            const int32_t zero = w_.zero_point(row[r], g) * word_sum(t + v, g, c);
                            out[v][r] = out[v][r] + static_cast<float>(Words::total(exact[0]) - zero) * scale;
                            continue;
                        }
                        // (the unit first: the scales of weight and activations may be far apart)
                        const Vec value = fma({_mm256_cvtepi32_ps(exact[0])}, splat(1 << kShift), {_mm256_cvtepi32_ps(low)});
                        total[v][r] = fma(value * splat(unit_[t + v]), splat(scale), total[v][r]);
                    }
                }
            }
        if (Parts == 1) return;
        for (int v = 0; v < Tokens; ++v)
            for (int r = 0; r < Rows; ++r) out[v][r] = qnk::sum(total[v][r]);
    }

    // out <- exact sums of the products of rows' codes, less their zero point unless there is one part, with words of
    // tokens. (Not inlined: else the compiler stores sums that fit the registers.)
    template <int Bits, int Tokens, int Rows>
    __attribute__((noinline)) void products(int64_t first_token, const int64_t (&row)[Rows], int64_t g, int64_t first,
                                            int64_t columns, __m256i (&out)[Tokens][Rows][Parts]) const {
        __m256i sum[Tokens][Rows][Parts], zero[Rows];
        const uint8_t* codes[Rows];
        for (int r = 0; r < Rows; ++r) {
            codes[r] = w_.row(row[r]) + first * Bits / 8;
            if (Parts > 1) zero[r] = _mm256_set1_epi16(static_cast<short>(w_.zero_point(row[r], g)));
        }
#pragma GCC unroll 6
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
                for (int b = 0; b < Parts; ++b) sum[t][r][b] = _mm256_setzero_si256();
        const int16_t* x = words(first_token, 0) + first;
        constexpr int64_t kLine = 64 * 8 / Bits;  // columns of 64 bytes
        const int64_t apart = apart_;
        const auto add = [&](int64_t c, int r, __m256i values) __attribute__((always_inline)) {
            const __m256i level = Parts == 1 ? values : _mm256_sub_epi16(values, zero[r]);
#pragma GCC unroll 6
            for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
                for (int b = 0; b < Parts; ++b)
                    sum[t][r][b] = Words::add(sum[t][r][b], level, x + (t * Parts + b) * apart + c);
        };
        const auto step = [&](int64_t c) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) {
                const uint8_t* from = codes[r] + c * Bits / 8;
                const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
                if (Bits == 8) {
                    add(c, r, bytes);
                } else {
                    add(c, r, _mm256_and_si256(bytes, _mm256_set1_epi16(15)));
                    add(c + 16, r, _mm256_srli_epi16(bytes, 4));
                }
            }
        };
        int64_t c = 0;
        for (; c + kLine <= columns; c += kLine) {
            if (first_token == 0)  // (the rows after these lie too far for the processor to guess)
#pragma GCC unroll 4
                for (int r = 0; r < Rows; ++r) __builtin_prefetch(codes[r] + c * Bits / 8 + Rows * w_.row_bytes());
#pragma GCC unroll 4
            for (int i = 0; i < kLine; i += step_columns(Bits)) step(c + i);
        }
        for (; c < columns; c += step_columns(Bits)) step(c);
#pragma GCC unroll 6
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
                for (int b = 0; b < Parts; ++b) out[t][r][b] = sum[t][r][b];
    }

    using Words = Dot<int16_t>;

    const Packed& w_;
    int64_t m_;
    int64_t apart_;  // of words of a token; multiples of 4 KiB would share few sets of the first-level cache
    int64_t per_group_;
    Buffer<int16_t> words_;
    Buffer<int32_t> word_sums_;  // [m][groups][per_group_]
    float unit_[kMostTokens];
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
