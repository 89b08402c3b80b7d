// Integer product for few tokens: rows of the weight are read where they lie and multiplied as bytes, four at a time.
//
// Per 64 codes and row of activations one instruction (64 products); memory is the limit as long as there are few.
#pragma once

#include "cpu/int_activations.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

// Lane 4 j + i <- the sum of lanes of total[4 j + i], by add(a, b).
template <typename Add>
inline __m512i sums_of(const __m512i* total, const Add& add) {
    __m512i quarter[4];
    for (int j = 0; j < 4; ++j) {
        const __m512i* t = total + 4 * j;
        const __m512i a = add(_mm512_unpacklo_epi32(t[0], t[1]), _mm512_unpackhi_epi32(t[0], t[1]));
        const __m512i b = add(_mm512_unpacklo_epi32(t[2], t[3]), _mm512_unpackhi_epi32(t[2], t[3]));
        quarter[j] = add(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    const auto fold = [&](__m512i a, __m512i b) {
        return add(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    return fold(fold(quarter[0], quarter[1]), fold(quarter[2], quarter[3]));
}

inline __m512i sums_of(const __m512i* total) {
    return sums_of(total, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
}

inline Vec sums_of(const Vec (&total)[16]) {
    __m512i bits[16];
    for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(total[i].v);
    return {_mm512_castsi512_ps(sums_of(bits, [](__m512i a, __m512i b) {
        return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
    }))};
}

inline __m512i load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Vec to_vec(__m512i value) { return {_mm512_cvtepi32_ps(value)}; }

// fp32 of a sum in bytes of fixed point, or of 8-bit codes: part(b) is that of byte b.
template <int Bytes, typename Part>
inline Vec joined(const Part& part) {
    Vec value = to_vec(part(Bytes - 1));
    if (Bytes > 1) value = fma(to_vec(part(Bytes - 2)), splat(256.0f), value);
    if (Bytes > 2) value = fma(to_vec(part(0)), splat(65536.0f), value);
    return value;
}

class RowProduct {
  public:
    static constexpr int kMostRows = 6;  // of activations, and one of ones where they have zero points

    RowProduct(const Packed& w, const Segments& segments, const Activations& x) : w_(w), segments_(segments), x_(x) {}

    explicit operator bool() const { return true; }

    // Rows of activations it multiplies with.
    static int64_t rows(int bytes, int64_t tokens) { return tokens * bytes + (bytes == 1 ? 1 : 0); }
    static bool serves(const Segments& segments, int bytes, int64_t tokens) {
        return segments.count() == 1 && rows(bytes, tokens) <= kMostRows;
    }

    // Rows [begin, end) of the weight, y [tokens, n].
    template <typename T>
    void multiply(const float* bias, T* y, int64_t begin, int64_t end) const {
        switch (x_.tokens() * x_.bytes()) {
            case 1: return run<1>(bias, y, begin, end);
            case 2: return run<2>(bias, y, begin, end);
            case 3: return run<3>(bias, y, begin, end);
            case 4: return run<4>(bias, y, begin, end);
            case 5: return run<5>(bias, y, begin, end);
            default: return run<6>(bias, y, begin, end);
        }
    }

  private:
    template <int Rows, typename T>
    void run(const float* bias, T* y, int64_t begin, int64_t end) const {
        if (w_.bits == 8)
            x_.bytes() == 1 ? block<Rows, true, 8>(bias, y, begin, end) : block<Rows, false, 8>(bias, y, begin, end);
        else
            x_.bytes() == 1 ? block<Rows, true, 4>(bias, y, begin, end) : block<Rows, false, 4>(bias, y, begin, end);
    }

    // Ones: the last row of sums is that of the weight's codes.
    template <int Rows, bool Ones, int Bits, typename T>
    void block(const float* bias, T* y, int64_t begin, int64_t end) const {
        constexpr int kSums = Rows + (Ones ? 1 : 0);
        __m512i totals[kSums][16];
        alignas(64) int32_t sums[kSums][16];
        for (int64_t o = begin; o < end; o += 16) {
            const int count = static_cast<int>(end - o < 16 ? end - o : 16);
            for (int r = 0; r < count; r += 4)
                four<Rows, Ones, Bits>(o + r, count - r, reinterpret_cast<__m512i(*)[16]>(&totals[0][r]));
            for (int v = 0; v < kSums; ++v) _mm512_store_si512(sums[v], sums_of(totals[v]));
            switch (x_.bytes()) {
                case 1: write<1>(sums, Ones ? sums[Rows] : nullptr, bias, y, o, count); break;
                default: write<3>(sums, nullptr, bias, y, o, count);
            }
        }
    }

    // Sums of four rows of the weight with each of Rows rows of activations. (Members by name: arrays would go through
    // memory.)
    template <int Rows, bool None = Rows == 0>
    struct Four {
        __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
        Four<Rows - 1> others;

        void add(__m512i p, __m512i q, __m512i r, __m512i s, const int8_t* x, int64_t apart) {
            add(p, q, r, s, _mm512_load_si512(x));
            others.add(p, q, r, s, x + apart, apart);
        }
        void add(__m512i p, __m512i q, __m512i r, __m512i s, __m512i x) {
            a = _mm512_dpbusd_epi32(a, p, x);
            b = _mm512_dpbusd_epi32(b, q, x);
            c = _mm512_dpbusd_epi32(c, r, x);
            d = _mm512_dpbusd_epi32(d, s, x);
        }
        void store(__m512i (*to)[16]) const {
            _mm512_store_si512(to[0], a);
            _mm512_store_si512(to[0] + 1, b);
            _mm512_store_si512(to[0] + 2, c);
            _mm512_store_si512(to[0] + 3, d);
            others.store(to + 1);
        }
    };
    template <int Rows>
    struct Four<Rows, true> {
        void add(__m512i, __m512i, __m512i, __m512i, const int8_t*, int64_t) {}
        void store(__m512i (*)[16]) const {}
    };

    // totals [row of activations][16 apart]: sums, in 16 lanes each, for 4 rows of the weight from o on, of which `count`
    // exist.
    template <int Rows, bool Ones, int Bits>
    void four(int64_t o, int count, __m512i (*totals)[16]) const {
        const int64_t whole = Unit<Bits>::whole(segments_[0]), rest = Unit<Bits>::rest(segments_[0]);
        const int64_t apart = segments_.width();
        const int8_t* x = x_.row(0);
        const uint8_t *p = w_.row(o), *q = w_.row(o + (count > 1 ? 1 : 0)), *r = w_.row(o + (count > 2 ? 2 : 0)),
                      *s = w_.row(o + (count > 3 ? 3 : 0));
        Four<Rows> total;
        Four<1> ones;
        const auto add = [&](__m512i i, __m512i j, __m512i k, __m512i l) {
            total.add(i, j, k, l, x, apart);
            if (Ones) ones.add(i, j, k, l, _mm512_set1_epi8(1));
            x += 64;
        };
        const auto unit = [&](const Unit<Bits>& i, const Unit<Bits>& j, const Unit<Bits>& k, const Unit<Bits>& l, int steps) {
            add(i.codes[0], j.codes[0], k.codes[0], l.codes[0]);
            constexpr int kLast = Unit<Bits>::kSteps - 1;
            if (steps == 2) add(i.codes[kLast], j.codes[kLast], k.codes[kLast], l.codes[kLast]);
        };
        for (int64_t at = 0; at < whole * 64; at += 64)
            unit(Unit<Bits>(p + at), Unit<Bits>(q + at), Unit<Bits>(r + at), Unit<Bits>(s + at), Unit<Bits>::kSteps);
        if (rest) {
            const int64_t at = whole * 64;
            unit(Unit<Bits>(p + at, rest), Unit<Bits>(q + at, rest), Unit<Bits>(r + at, rest), Unit<Bits>(s + at, rest),
                 Unit<Bits>::steps(rest));
        }
        total.store(totals);
        if (Ones) ones.store(totals + Rows);
    }

    template <int Bytes, typename T>
    void write(const int32_t (*sums)[16], const int32_t* ones, const float* bias, T* y, int64_t o, int count) const {
        const Mask rows = first_lanes(count);
        const __m512i zero = w_.zero ? _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(rows, w_.zero + o))
                                     : _mm512_set1_epi32(w_.zero_point(o, 0));
        const Vec scale{_mm512_maskz_loadu_ps(rows, w_.scale + o)};
        const Vec shift{bias ? _mm512_maskz_loadu_ps(rows, bias + o) : _mm512_setzero_ps()};
        for (int64_t t = 0; t < x_.tokens(); ++t) {
            const auto part = [&](int b) {
                __m512i sum = load_int(sums[b * x_.tokens() + t]);
                if (ones) sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(load_int(ones), _mm512_set1_epi32(x_.zero()[t])));
                return _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(x_.sums(0, b)[t])));
            };
            // (see ByteForm for the order)
            const Vec unit = splat(x_.scale()[t]), sum = joined<Bytes>(part);
            Vec value = Bytes == 1 ? (sum * scale) * unit : (sum * unit) * scale;
            if (bias) value = value + shift;
            T* to = y + t * w_.n + o;
            if (count == 16)
                store(to, value);
            else
                store_first(to, value, count);
        }
    }

    const Packed& w_;
    const Segments& segments_;
    const Activations& x_;
};

// Few tokens and 4-bit codes in short groups: the sums of a group stay in 16 lanes, as integers, and are scaled there.
//
// Per 64 bytes of codes: 3 instructions to unpack, and for each token one for each step and byte of fixed point and 8 to
// join, shift and scale. What zero points take off is looked up, since products of 32-bit integers would load the port
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
                    const __m512i zero = _mm512_set1_epi32(w.zero ? z : w.zero_point(0, 0));
                    _mm512_store_si512(shifts(t) + (i * zeros_ + z) * 16, _mm512_mullo_epi32(sums.whole(), zero));
                }
            }
    }

    // A lane holds sums of up to 32 products of 15 by 2^22, which fit 31 bits.
    static bool serves(const Packed& w, const Segments& segments, int bytes, int64_t tokens) {
        return w.bits == 4 && tokens <= kMostTokens && bytes > 1 && segments.count() > 1 && w.group_size() <= 512;
    }

    explicit operator bool() const { return static_cast<bool>(shifts_); }

    // Rows [begin, end) of the weight, y [tokens, n].
    template <typename T>
    void multiply(const float* bias, T* y, int64_t begin, int64_t end) const {
        for (int64_t o = begin; o < end; o += 16) {
            const int64_t count = end - o < 16 ? end - o : 16;
            const Mask rows = first_lanes(static_cast<int>(count));
            const Vec shift{bias ? _mm512_maskz_loadu_ps(rows, bias + o) : _mm512_setzero_ps()};
            Vec total[16] = {};
            for (int64_t t = 0; t < x_.tokens(); ++t) {
                for (int64_t r = 0; r < count; r += 4) four(o + r, count - r, t, total + r);
                Vec value = sums_of(total) * splat(x_.scale()[t]);
                if (bias) value = value + shift;
                T* to = y + t * w_.n + o;
                if (count == 16)
                    store(to, value);
                else
                    store_first(to, value, static_cast<int>(count));
            }
        }
    }

  private:
    static constexpr int64_t kMostTokens = 6;

    int64_t apart() const { return x_.tokens() * segments_.width(); }  // of the bytes of a token
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
            last = _mm512_dpbusd_epi32(last, codes, x.last);
            second = _mm512_dpbusd_epi32(second, codes, x.second);
            if (Bytes > 2) first = _mm512_dpbusd_epi32(first, codes, x.first);
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
        const __m512i sum = _mm512_sub_epi32(sums.whole(), load_int(shifts + row.zero[g * next_zero] * 16));
        return fma(to_vec(sum), splat(row.scale[g]), total);
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
    Buffer<int32_t> shifts_;  // [tokens][groups][zero points][16 lanes]: a zero point times the sums of the activations
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
