// Product for few tokens with 4-bit codes in short groups, rows of the weight read where they lie as in int_rows.h.
//
// Floor: the codes read once; 8.4 MB of 4096x4096 from a third-level cache at 120 GB/s take 70 us. Measured on Zen 5,
// 2 cores: 108 to 133 us for one bf16 token; on an Intel Xeon with AMX (3.9 GHz), whose cores read 25 GB/s each from a
// third-level cache of 480 MB, that is 185 us, 203 in bf16 and 224 in fp32 (222 and 252 while zero points were looked up in
// a table of 32 KB, sums joined at the end, and rows addressed one by one).
#pragma once

#include "cpu/int_rows.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

// Few tokens and 4-bit codes in short groups: the sums of a group stay in 16 lanes, as integers, and are scaled there.
//
// Per 64 bytes of codes: 2 or 3 instructions to unpack, and for each token one for each step and byte of fixed point and up
// to 5 to join, shift and scale. What a zero point takes off a lane is its product with the lane's sum of activations, which
// 16 bits do not hold: in two parts, of which the upper one meets 2^11 times the zero point.
template <int Bytes>
class GroupedRowProduct {
  public:
    GroupedRowProduct(const Packed& w, const Segments& segments, const Activations& x)
        : w_(w), segments_(segments), x_(x), shifts_(x.tokens() * segments.count() * kShift) {
        if (!shifts_) return;
        for (int64_t t = 0; t < x.tokens(); ++t)
            for (int64_t i = 0; i < segments.count(); ++i) {
                Parts sums = Parts::zero();
                for (int64_t step = 0; step < segments[i].steps; ++step)
                    sums.add(_mm512_set1_epi8(1), Parts::of(x.row(t) + (segments[i].step + step) * 64, apart()));
                __m512i left = sums.whole();
                for (int64_t part = 0; part < kShift; part += 16) {
                    const __m512i pair = pair_of(left);
                    _mm512_store_si512(shifts(t) + i * kShift + part, pair);
                    left = word_products(left, pair, _mm512_set1_epi32(times_zero(1)));
                }
            }
    }

    // A lane holds sums of up to 32 products of 15 by 2^22, which fit 31 bits.
    static bool serves(const Packed& w, const Segments& segments, int bytes, int64_t tokens) {
        return w.bits == 4 && tokens <= kMostTokens && bytes > 1 && segments.count() > 1 && w.group_size() <= 512;
    }

    explicit operator bool() const { return static_cast<bool>(shifts_); }

    // Rows [begin, end) of the weight, y [tokens, n]. False, and nothing done, where zero points are no codes.
    template <typename T>
    bool multiply(const float* bias, T* y, int64_t begin, int64_t end) const {
        if (!w_.zeros_are_codes(begin, end)) return false;
        for (int64_t o = begin; o < end; o += 16) {
            const int64_t count = end - o < 16 ? end - o : 16;
            const Mask rows = first_lanes(static_cast<int>(count));
            const Vec shift{bias ? _mm512_maskz_loadu_ps(rows, bias + o) : _mm512_setzero_ps()};
            Vec total[2 * 16] = {};
            for (int64_t t = 0; t < x_.tokens(); t += 2) {
                const int64_t tokens = x_.tokens() - t < 2 ? 1 : 2;
                for (int64_t r = 0; r < count; r += 4) {
                    if (w_.group_size() != 128 || count - r < 4)
                        for (int64_t i = 0; i < tokens; ++i) four(o + r, count - r, t + i, total + i * 16 + r);
                    else if (tokens == 1)
                        four_of_128<1>(o + r, t, total + r);
                    else
                        four_of_128<2>(o + r, t, total + r);
                }
                for (int64_t i = 0; i < tokens; ++i) {
                    Vec value = sums_of(total + i * 16) * splat(x_.scale()[t + i]);
                    if (bias) value = value + shift;
                    T* to = y + (t + i) * w_.n + o;
                    if (count == 16)
                        store(to, value);
                    else
                        store_first(to, value, static_cast<int>(count));
                }
            }
        }
        return true;
    }

  private:
    static constexpr int64_t kMostTokens = kHasTiles ? 6 : 12;

    // Values of a group in shifts_: of groups of 256 columns and fewer the second 16 are 0.
    static constexpr int64_t kShift = 32;

    int64_t apart() const { return x_.tokens() * x_.apart(); }  // of the bytes of a token
    int32_t* shifts(int64_t t) const { return shifts_.get() + t * segments_.count() * kShift; }

    // Two signed words each, first + 2^11 second = minus a sum of up to 2^26, or as much of it as there fits.
    static __m512i pair_of(__m512i sum) {
        const auto clamp = [](__m512i value) {
            return _mm512_max_epi32(_mm512_min_epi32(value, _mm512_set1_epi32(32767)), _mm512_set1_epi32(-32767));
        };
        const __m512i minus = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
        const __m512i second = clamp(_mm512_srai_epi32(_mm512_add_epi32(minus, _mm512_set1_epi32(1024)), 11));
        const __m512i first = clamp(_mm512_sub_epi32(minus, _mm512_slli_epi32(second, 11)));
        return _mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(second, 16));
    }

    // What a pair meets: a zero point, and 2^11 times as much.
    static constexpr int32_t times_zero(int zero) { return zero | zero << 27; }
    static const int32_t* zeros() {
        static const int32_t all[16] = {
            times_zero(0), times_zero(1), times_zero(2),  times_zero(3),  times_zero(4),  times_zero(5),  times_zero(6),  times_zero(7),
            times_zero(8), times_zero(9), times_zero(10), times_zero(11), times_zero(12), times_zero(13), times_zero(14), times_zero(15)};
        return all;
    }

    // Lanes shifted left by bytes, on the port that has less to do.
    static __m512i shift_bytes(__m512i value, int bytes) {
        const __m128i one = _mm_setr_epi8(-1, 0, 1, 2, -1, 4, 5, 6, -1, 8, 9, 10, -1, 12, 13, 14);
        const __m128i two = _mm_setr_epi8(-1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13);
        return _mm512_shuffle_epi8(value, _mm512_broadcast_i32x4(bytes == 1 ? one : two));
    }

    // The bytes of fixed point of 64 activations, or the sums of one row in them (in named members: arrays would go
    // through memory).
    struct Parts {
        __m512i last, second, first;  // `first` with three bytes only

        static Parts zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()}; }

        static Parts of(const int8_t* x, int64_t apart) {
            const int8_t* to = x + (Bytes - 1) * apart;
            return {_mm512_load_si512(to), _mm512_load_si512(to - apart), _mm512_load_si512(x)};
        }

        void add(__m512i codes, const Parts& x) {
            last = byte_products(last, codes, x.last);
            second = byte_products(second, codes, x.second);
            if (Bytes > 2) first = byte_products(first, codes, x.first);
        }

        // Of a group of two steps, joined on the way.
        static __m512i sum(__m512i low, const Parts& even, __m512i high, const Parts& odd) {
            __m512i value = _mm512_setzero_si512();
            if (Bytes > 2) value = shift_bytes(byte_products(byte_products(value, low, even.first), high, odd.first), 1);
            value = shift_bytes(byte_products(byte_products(value, low, even.second), high, odd.second), 1);
            return byte_products(byte_products(value, low, even.last), high, odd.last);
        }

        __m512i whole() const {
            const __m512i value = _mm512_add_epi32(last, shift_bytes(second, 1));
            return Bytes > 2 ? _mm512_add_epi32(value, shift_bytes(first, 2)) : value;
        }
    };

    static constexpr uint8_t kMiddle = 8;  // the zero point where none are given

    // One of four rows of the weight.
    struct Row {
        const uint8_t *codes, *zero;
        const float* scale;

        Row(const Packed& w, int64_t row) : codes(w.row(row)), scale(w.scale + row * w.groups) {
            zero = w.zero ? w.zero + row * w.groups : &kMiddle;
        }
    };

    static Vec scaled(const Parts& sums, const Row& row, const int32_t* shift, int64_t g, int64_t next_zero, Vec total) {
        const __m512i zero = _mm512_set1_epi32(zeros()[row.zero[g * next_zero]]);
        __m512i sum = word_products(sums.whole(), load_int(shift), zero);
        sum = word_products(sum, load_int(shift + 16), zero);
        return fma(to_vec(sum), splat(row.scale[g]), total);
    }

    // total [Tokens][16 apart]: tokens from t on, rows o to o + 4 of the weight, in groups of 128 columns, that is 64 bytes.
    // (The pieces of assembly hide from the compiler that addresses are related: it would keep one for each row.)
    template <int Tokens>
    __attribute__((noinline)) void four_of_128(int64_t o, int64_t t, Vec* total) const {
        const int64_t groups = w_.groups, row_bytes = w_.row_bytes(), apart = this->apart(), next = x_.apart();
        const int64_t next_zero = w_.zero ? 1 : 0, next_token = groups * kShift;
        const uint8_t *codes = w_.row(o), *zero = w_.zero ? w_.zero + o * groups : &kMiddle;
        int64_t zeros_apart = w_.zero ? groups : 0, three_zeros = 3 * zeros_apart, three_rows = 3 * row_bytes;
        int64_t scales_apart = groups, three_scales = 3 * groups;
        const float *scale = w_.scale + o * groups, *end = scale + groups;
        const int8_t* x = x_.row(t);
        const int32_t *shift = shifts(t), *times = zeros();
        const uint8_t* later = codes + 4 * row_bytes;
        __asm__("" : "+r"(three_rows), "+r"(three_zeros), "+r"(three_scales), "+r"(later));
        __asm__("" : "+r"(zeros_apart), "+r"(scales_apart));
        const __m512i nibble = _mm512_set1_epi8(15);
        Vec sums[Tokens][4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
            for (int i = 0; i < Tokens; ++i) sums[i][r] = splat(0.0f);
        for (; scale < end; codes += 64, later += 64, x += 128, shift += kShift, ++scale, zero += next_zero) {
            __asm__("" : "+r"(later));
            Parts even[Tokens], odd[Tokens];
            __m512i less[Tokens];
#pragma GCC unroll 2
            for (int i = 0; i < Tokens; ++i) {
                even[i] = Parts::of(x + i * next, apart);
                odd[i] = Parts::of(x + i * next + 64, apart);
                less[i] = load_int(shift + i * next_token);
            }
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const int64_t row = r == 3 ? three_rows : r * row_bytes;
                _mm_prefetch(reinterpret_cast<const char*>(later + row), _MM_HINT_T0);
                const __m512i bytes = _mm512_loadu_si512(codes + row);
                const __m512i low = _mm512_and_si512(bytes, nibble), high = upper_nibbles(bytes);
                const __m512i level = _mm512_set1_epi32(times[zero[r == 3 ? three_zeros : r * zeros_apart]]);
                const Vec factor = splat(scale[r == 3 ? three_scales : r * scales_apart]);
#pragma GCC unroll 2
                for (int i = 0; i < Tokens; ++i) {
                    const __m512i sum = Parts::sum(low, even[i], high, odd[i]);
                    sums[i][r] = fma(to_vec(word_products(sum, less[i], level)), factor, sums[i][r]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
            for (int i = 0; i < Tokens; ++i) total[i * 16 + r] = sums[i][r];
    }

    // total [4]: token t, rows o to o + 4 of the weight, of which `count` exist, in lanes. (What the loop reads is in locals:
    // the compiler must assume that a store changes members. Two tokens at once would not fit the registers.)
    void four(int64_t o, int64_t count, int64_t t, Vec* total) const {
        const int64_t groups = w_.groups, units = Unit<4>::whole(segments_[0]), rest = Unit<4>::rest(segments_[0]);
        const int64_t next_zero = w_.zero ? 1 : 0, apart = this->apart();
        const int64_t ahead = 4 * w_.row_bytes();
        const int8_t* x = x_.row(t);
        const int32_t* shift = shifts(t);
        const Row a(w_, o), b(w_, o + (count > 1 ? 1 : 0)), c(w_, o + (count > 2 ? 2 : 0)), d(w_, o + (count > 3 ? 3 : 0));
        Vec total_a = splat(0.0f), total_b = total_a, total_c = total_a, total_d = total_a;
        for (int64_t g = 0, at = 0; g < groups; ++g) {
            Parts in_a = Parts::zero(), in_b = in_a, in_c = in_a, in_d = in_a;
            const auto step = [&](__m512i p, __m512i q, __m512i r, __m512i s) __attribute__((always_inline)) {
                const Parts parts = Parts::of(x, apart);
                in_a.add(p, parts);
                in_b.add(q, parts);
                in_c.add(r, parts);
                in_d.add(s, parts);
                x += 64;
            };
            const auto unit = [&](const Unit<4>& p, const Unit<4>& q, const Unit<4>& r, const Unit<4>& s,
                                  int steps) __attribute__((always_inline)) {
                step(p.codes[0], q.codes[0], r.codes[0], s.codes[0]);
                if (steps == 2) step(p.codes[1], q.codes[1], r.codes[1], s.codes[1]);
            };
            for (int64_t u = 0; u < units; ++u, at += 64) {
                // of the next four rows
                for (const uint8_t* codes : {a.codes, b.codes, c.codes, d.codes})
                    _mm_prefetch(reinterpret_cast<const char*>(codes + at + ahead), _MM_HINT_T0);
                unit(Unit<4>(a.codes + at), Unit<4>(b.codes + at), Unit<4>(c.codes + at), Unit<4>(d.codes + at), 2);
            }
            if (rest) {
                unit(Unit<4>(a.codes + at, rest), Unit<4>(b.codes + at, rest), Unit<4>(c.codes + at, rest),
                     Unit<4>(d.codes + at, rest), Unit<4>::steps(rest));
                at += rest;
            }
            total_a = scaled(in_a, a, shift, g, next_zero, total_a);
            total_b = scaled(in_b, b, shift, g, next_zero, total_b);
            total_c = scaled(in_c, c, shift, g, next_zero, total_c);
            total_d = scaled(in_d, d, shift, g, next_zero, total_d);
            shift += kShift;
        }
        total[0] = total_a;
        total[1] = total_b;
        total[2] = total_c;
        total[3] = total_d;
    }

    const Packed& w_;
    const Segments& segments_;
    const Activations& x_;
    Buffer<int32_t> shifts_;  // [tokens][groups][2][16 lanes]: pair_of() sums of activations, and of what is left of them
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
