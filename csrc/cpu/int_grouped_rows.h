// Product for few tokens with 4-bit codes in short groups, rows of the weight read where they lie as in int_rows.h.
//
// Floor: the codes read once; 8.4 MB of 4096x4096 from a third-level cache at 120 GB/s take 70 us. Measured on Zen 5,
// 2 cores: 108 to 133 us for one bf16 token.
#pragma once

#include "cpu/int_rows.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

// Few tokens and 4-bit codes in short groups: the sums of a group stay in 16 lanes, as integers, and are scaled there.
//
// Per 64 bytes of codes: 3 instructions to unpack, and for each token one for each step and byte of fixed point and up
// to 8 to join, shift and scale. What zero points take off is looked up, since products of 32-bit integers would load the port
// that is loaded most.
template <int Bytes>
class GroupedRowProduct {
  public:
    GroupedRowProduct(const Packed& w, const Segments& segments, const Activations& x)
        : w_(w), segments_(segments), x_(x), zeros_(w.zero ? 16 : 1),
          shifts_(x.tokens() * segments.count() * zeros_ * 16) {
        if (!shifts_) return;
        for (int64_t t = 0; t < x.tokens(); ++t)
            for (int64_t i = 0; i < segments.count(); ++i) {
                Parts sums = Parts::zero();
                for (int64_t step = 0; step < segments[i].steps; ++step)
                    sums.add(_mm512_set1_epi8(1), Parts::of(x.row(t) + (segments[i].step + step) * 64, apart()));
                for (int z = 0; z < zeros_; ++z) {
                    const __m512i factor = _mm512_set1_epi32(w.zero ? -z : -w.zero_point(0, 0));
                    _mm512_store_si512(shifts(t) + (i * zeros_ + z) * 16, _mm512_mullo_epi32(sums.whole(), factor));
                }
            }
    }

    // A lane holds sums of up to 32 products of 15 by 2^22, which fit 31 bits.
    static bool serves(const Packed& w, const Segments& segments, int bytes, int64_t tokens) {
        return w.bits == 4 && tokens <= kMostTokens && bytes > 1 && segments.count() > 1 && w.group_size() <= 512 &&
               w.zeros_are_codes();
    }

    explicit operator bool() const { return static_cast<bool>(shifts_); }

    // Rows [begin, end) of the weight, y [tokens, n].
    template <typename T>
    void multiply(const float* bias, T* y, int64_t begin, int64_t end) const {
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
    }

  private:
    static constexpr int64_t kMostTokens = kHasTiles ? 6 : 12;

    int64_t apart() const { return x_.tokens() * x_.apart(); }  // of the bytes of a token
    int32_t* shifts(int64_t t) const { return shifts_.get() + t * segments_.count() * zeros_ * 16; }

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

        __m512i whole() const {
            const __m512i value = _mm512_add_epi32(last, shift_bytes(second, 1));
            return Bytes > 2 ? _mm512_add_epi32(value, shift_bytes(first, 2)) : value;
        }
    };

    // One of four rows of the weight.
    struct Row {
        const uint8_t *codes, *zero;
        const float* scale;

        Row(const Packed& w, int64_t row) : codes(w.row(row)), scale(w.scale + row * w.groups) {
            static const uint8_t none = 0;
            zero = w.zero ? w.zero + row * w.groups : &none;
        }
    };

    static Vec scaled(const Parts& sums, const Row& row, const int32_t* shifts, int64_t g, int64_t next_zero, Vec total) {
        const __m512i sum = _mm512_add_epi32(sums.whole(), load_int(shifts + row.zero[g * next_zero] * 16));
        return fma(to_vec(sum), splat(row.scale[g]), total);
    }

    // total [Tokens][16 apart]: tokens from t on, rows o to o + 4 of the weight, in groups of 128 columns, that is 64 bytes.
    // Sums start at what zero points take off. (What is read lies at strides, few addresses that fit the registers.)
    template <int Tokens>
    __attribute__((noinline)) void four_of_128(int64_t o, int64_t t, Vec* total) const {
        const int64_t groups = w_.groups, row_bytes = w_.row_bytes(), apart = this->apart(), next = x_.apart();
        const int64_t next_zero = w_.zero ? 1 : 0, next_shifts = zeros_ * 16, next_token = groups * next_shifts;
        const uint8_t *codes = w_.row(o), none[4] = {}, *zero = w_.zero ? w_.zero + o * groups : none;
        const int64_t zeros_apart = w_.zero ? groups : 1;
        const float* scale = w_.scale + o * groups;
        const int8_t* x = x_.row(t);
        const int32_t* x_shifts = shifts(t);
        const __m512i nibble = _mm512_set1_epi8(15);
        Vec sums[Tokens][4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
            for (int i = 0; i < Tokens; ++i) sums[i][r] = splat(0.0f);
        for (int64_t g = 0; g < groups; ++g, codes += 64, x += 128, x_shifts += next_shifts, ++scale, zero += next_zero) {
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const uint8_t* row = codes + r * row_bytes;
                _mm_prefetch(reinterpret_cast<const char*>(row + 4 * row_bytes), _MM_HINT_T0);
                const __m512i bytes = _mm512_loadu_si512(row);
                const __m512i even = _mm512_and_si512(bytes, nibble), odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
                const int64_t shift = zero[r * zeros_apart] * int64_t{16};
                const Vec factor = splat(scale[r * groups]);
#pragma GCC unroll 2
                for (int i = 0; i < Tokens; ++i) {
                    Parts parts = Parts::zero();
                    parts.last = _mm512_load_si512(x_shifts + i * next_token + shift);
                    parts.add(even, Parts::of(x + i * next, apart));
                    parts.add(odd, Parts::of(x + i * next + 64, apart));
                    sums[i][r] = fma(to_vec(parts.whole()), factor, sums[i][r]);
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
        const int64_t next_zero = w_.zero ? 1 : 0, next_shifts = zeros_ * 16, apart = this->apart();
        const int64_t ahead = 4 * w_.row_bytes();
        const int8_t* x = x_.row(t);
        const int32_t* x_shifts = shifts(t);
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
            total_a = scaled(in_a, a, x_shifts, g, next_zero, total_a);
            total_b = scaled(in_b, b, x_shifts, g, next_zero, total_b);
            total_c = scaled(in_c, c, x_shifts, g, next_zero, total_c);
            total_d = scaled(in_d, d, x_shifts, g, next_zero, total_d);
            x_shifts += next_shifts;
        }
        total[0] = total_a;
        total[1] = total_b;
        total[2] = total_c;
        total[3] = total_d;
    }

    const Packed& w_;
    const Segments& segments_;
    const Activations& x_;
    int64_t zeros_;
    Buffer<int32_t> shifts_;  // [tokens][groups][zero points][16 lanes]: minus a zero point times the sums of activations
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
