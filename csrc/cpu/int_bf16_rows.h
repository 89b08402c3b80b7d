// Product for few bf16 tokens with 4-bit codes in groups of whole 64 bytes, rows of the weight read where they lie.
//
// A permutation looks codes up, less their zero point, as bf16: 32 of every 4th column. Per 64 bytes of codes, 7
// instructions to decode, 4 for each token, and one to scale its sum in groups of 128. Measured on Zen 4, one core, 768x768,
// us for 1, 4, 8 tokens: 12.6, 35, 69, where products, one a cycle, take 5, 20 and 40; by bytes (int_grouped_rows.h) 17, 53
// and 103. Two rows by 8 tokens gave 65, by 6 tokens as much as by 8: GCC 12 stores what would fit the registers.
#pragma once

#include "cpu/int_forms.h"
#include "cpu/isa.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

class Bf16RowProduct {
  public:
    Bf16RowProduct(const Packed& w, const bf16* x, int64_t tokens) : w_(w), tokens_(tokens), x_(tokens * w.k) {
        if (!x_) return;
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t column = 0; column < w.k; column += kUnit) deal(x + t * w.k + column, x_.get() + t * w.k + column);
    }

    static bool serves(const Packed& w, int64_t tokens) {
        return !kHasTiles && has_bf16_products() && w.bits == 4 && w.group_size() % kUnit == 0 && tokens <= kMostTokens;
    }

    explicit operator bool() const { return static_cast<bool>(x_); }

    // Rows [begin, end) of the weight, y [tokens, n].
    void multiply(const float* bias, bf16* y, int64_t begin, int64_t end) const {
        Vec total[kMostTokens][16];
        for (int64_t o = begin; o < end; o += 16) {
            const int64_t count = end - o < 16 ? end - o : 16, turns = (tokens_ + kAtOnce - 1) / kAtOnce;
            for (int64_t turn = 0, t = 0; turn < turns; ++turn) {
                const int64_t here = (tokens_ - t + turns - turn - 1) / (turns - turn);
                some(here, o, count, t, total + t);
                t += here;
            }
            const Mask rows = first_lanes(static_cast<int>(count));
            const Vec shift{bias ? _mm512_maskz_loadu_ps(rows, bias + o) : _mm512_setzero_ps()};
            for (int64_t t = 0; t < tokens_; ++t) {
                Vec value = sums_of(total[t]);
                if (bias) value = value + shift;
                if (count == 16)
                    store(y + t * w_.n + o, value);
                else
                    store_first(y + t * w_.n + o, value, static_cast<int>(count));
            }
        }
    }

  private:
    static constexpr int64_t kMostTokens = 14;  // more are as fast or faster in tiles of 16
    static constexpr int64_t kAtOnce = 4;       // tokens whose sums in a group fit the registers, for 4 rows
    static constexpr int64_t kUnit = 128;       // columns, in 64 bytes

    // Codes 0 to 15 less each zero point (those of 16 and more are allowed, and exact in bf16), twice over.
    struct Tables {
        alignas(64) uint16_t values[256][32];

        Tables() {
            for (int zero = 0; zero < 256; ++zero) _mm512_store_si512(values[zero], Bf16Form::values_of(zero));
        }
    };

    // to [4][32] <- columns 4 l + j of 128 in lane l of row j: lane l of codes holds these.
    static void deal(const bf16* x, bf16* to) {
        alignas(64) static const auto places = [] {
            struct { uint16_t of[4][32]; } all;
            for (int j = 0; j < 4; ++j)
                for (int l = 0; l < 32; ++l) all.of[j][l] = static_cast<uint16_t>((4 * l + j) % 64);
            return all;
        }();
        const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 32);
        const __m512i c = _mm512_loadu_si512(x + 64), d = _mm512_loadu_si512(x + 96);
        for (int j = 0; j < 4; ++j) {
            const __m512i at = _mm512_loadu_si512(places.of[j]);
            const __m512i low = _mm512_permutex2var_epi16(a, at, b), high = _mm512_permutex2var_epi16(c, at, d);
            _mm512_store_si512(to + 32 * j, _mm512_mask_blend_epi64(0xf0, low, high));
        }
    }

    void some(int64_t tokens, int64_t o, int64_t count, int64_t t, Vec (*total)[16]) const {
        switch (tokens) {
            case 1: return rows<1>(o, count, t, total);
            case 2: return rows<2>(o, count, t, total);
            case 3: return rows<3>(o, count, t, total);
            default: return rows<4>(o, count, t, total);
        }
    }

    // total [Tokens][16]: tokens from t on, rows o to o + 16 of the weight, of which `count` exist, in lanes.
    template <int Tokens>
    void rows(int64_t o, int64_t count, int64_t t, Vec (*total)[16]) const {
        int64_t r = 0;
        for (; r + 4 <= count; r += 4) whole_rows<4, Tokens>(o + r, t, total, r);
        for (; r < count; ++r) whole_rows<1, Tokens>(o + r, t, total, r);
        for (; r < 16; ++r)
            for (int i = 0; i < Tokens; ++i) total[i][r] = splat(0.0f);
    }

    // total [Tokens][to ...]: rows o to o + Rows of the weight. (What is read lies at strides, few addresses that fit the
    // registers; the sums of all groups do not.)
    template <int Rows, int Tokens>
    __attribute__((noinline)) void whole_rows(int64_t o, int64_t t, Vec (*total)[16], int64_t to) const {
        const int64_t groups = w_.groups, next = w_.k, units = w_.group_size() / kUnit, row_bytes = w_.row_bytes();
        const uint8_t *codes = w_.row(o), middle[Rows] = {}, *zero = w_.zero ? w_.zero + o * groups : middle;
        const int64_t zeros_apart = w_.zero ? groups : 0, next_zero = w_.zero ? 1 : 0;
        const float* scale = w_.scale + o * groups;
        static const Tables tables;
        const uint16_t(*values)[32] = tables.values + (w_.zero ? 0 : 8);
        const bf16* x = x_.get() + t * next;
        Vec sums[Rows][Tokens];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int i = 0; i < Tokens; ++i) sums[r][i] = splat(0.0f);
        for (int64_t g = 0; g < groups; ++g, ++scale, zero += next_zero) {
            __m512i of_group[Rows][Tokens];
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
                for (int i = 0; i < Tokens; ++i) of_group[r][i] = _mm512_setzero_si512();
            for (int64_t u = 0; u < units; ++u, codes += 64, x += kUnit) {
                __m512i bytes[Rows];
#pragma GCC unroll 4
                for (int r = 0; r < Rows; ++r) {
                    bytes[r] = _mm512_loadu_si512(codes + r * row_bytes);
                    _mm_prefetch(reinterpret_cast<const char*>(codes + (Rows + r) * row_bytes), _MM_HINT_T0);
                }
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    __m512i value[Rows];
#pragma GCC unroll 4
                    for (int r = 0; r < Rows; ++r) {  // (of each lane five bits count)
                        value[r] = _mm512_permutexvar_epi16(bytes[r], _mm512_load_si512(values[zero[r * zeros_apart]]));
                        bytes[r] = _mm512_srli_epi16(bytes[r], 4);
                    }
#pragma GCC unroll 8
                    for (int i = 0; i < Tokens; ++i) {
                        const __m512i here = _mm512_load_si512(x + i * next + 32 * j);
#pragma GCC unroll 4
                        for (int r = 0; r < Rows; ++r) of_group[r][i] = bf16_products(of_group[r][i], value[r], here);
                    }
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) {
                const Vec factor = splat(scale[r * groups]);
#pragma GCC unroll 8
                for (int i = 0; i < Tokens; ++i)
                    sums[r][i] = fma(Vec{_mm512_castsi512_ps(of_group[r][i])}, factor, sums[r][i]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int i = 0; i < Tokens; ++i) total[i][to + r] = sums[r][i];
    }

    const Packed& w_;
    int64_t tokens_;
    Buffer<bf16> x_;  // [tokens][k / 128][4][32], see deal()
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
