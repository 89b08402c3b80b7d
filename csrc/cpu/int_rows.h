// Integer product for few tokens: rows of the weight are read where they lie and multiplied as bytes, four at a time.
//
// Per 64 codes and row of activations one instruction (64 products); memory is the limit as long as there are few.
#pragma once

#include "cpu/int_activations.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

// In lane i of each quarter the sum of that quarter of total[i], by add(a, b).
template <typename Add>
inline __m512i quarter_sums(const __m512i* total, const Add& add) {
    const __m512i a = add(_mm512_unpacklo_epi32(total[0], total[1]), _mm512_unpackhi_epi32(total[0], total[1]));
    const __m512i b = add(_mm512_unpacklo_epi32(total[2], total[3]), _mm512_unpackhi_epi32(total[2], total[3]));
    return add(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Lane 4 j + i <- the sum of lanes i of the quarters of quarters[j].
template <typename Add>
inline __m512i joined_quarters(const __m512i* quarters, const Add& add) {
    const auto fold = [&](__m512i a, __m512i b) {
        return add(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    return fold(fold(quarters[0], quarters[1]), fold(quarters[2], quarters[3]));
}

inline __m512i add_ints(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }

// Lane i <- the sum of lanes of total[i].
inline Vec sums_of(const Vec* total) {
    __m512i bits[16], quarters[4];
    for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(total[i].v);
    const auto add = [](__m512i a, __m512i b) {
        return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
    };
    for (int j = 0; j < 4; ++j) quarters[j] = quarter_sums(bits + 4 * j, add);
    return {_mm512_castsi512_ps(joined_quarters(quarters, add))};
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
    // Of activations, and one of ones where they have zero points. (With tile instructions more are slower than tiles.)
    static constexpr int kMostRows = kHasTiles ? 6 : 33;
    static constexpr int64_t kAhead = kHasTiles ? 0 : 4;  // rows of the weight that are asked for before
    static constexpr int most_at_once(int bits) { return bits == 8 ? 6 : 4; }  // whose sums and factors fit the registers

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
        if (w_.bits == 8)
            x_.bytes() == 1 ? blocks<true, 8>(bias, y, begin, end) : blocks<false, 8>(bias, y, begin, end);
        else
            x_.bytes() == 1 ? blocks<true, 4>(bias, y, begin, end) : blocks<false, 4>(bias, y, begin, end);
    }

  private:
    // Ones: the last row of sums is that of the weight's codes.
    template <bool Ones, int Bits, typename T>
    void blocks(const float* bias, T* y, int64_t begin, int64_t end) const {
        constexpr int kAtOnce = most_at_once(Bits) - (Ones ? 1 : 0);
        const int rows = static_cast<int>(x_.tokens()) * x_.bytes(), turns = (rows + kAtOnce - 1) / kAtOnce;
        __m512i quarters[kMostRows][4];
        alignas(64) int32_t sums[kMostRows][16];
        for (int64_t o = begin; o < end; o += 16) {
            const int count = static_cast<int>(end - o < 16 ? end - o : 16);
            for (int j = 0; j < 4; ++j) {
                const int64_t from = o + (4 * j < count ? 4 * j : 0);
                for (int turn = 0, first = 0; turn < turns; ++turn) {
                    const int here = (rows - first + turns - turn - 1) / (turns - turn);
                    if (Ones && turn + 1 == turns)
                        some<Ones, Bits>(here, from, o + count - from, first, quarters, j);
                    else
                        some<false, Bits>(here, from, o + count - from, first, quarters, j);
                    first += here;
                }
            }
            for (int v = 0; v < rows + (Ones ? 1 : 0); ++v)
                _mm512_store_si512(sums[v], joined_quarters(quarters[v], add_ints));
            switch (x_.bytes()) {
                case 1: write<1>(sums, Ones ? sums[rows] : nullptr, bias, y, o, count); break;
                default: write<3>(sums, nullptr, bias, y, o, count);
            }
        }
    }

    template <bool Ones, int Bits>
    void some(int rows, int64_t o, int64_t count, int first, __m512i (*quarters)[4], int j) const {
        switch (rows) {
            case 1: return four<1, Ones, Bits>(o, count, first, quarters, j);
            case 2: return four<2, Ones, Bits>(o, count, first, quarters, j);
            case 3: return four<3, Ones, Bits>(o, count, first, quarters, j);
            case 4: return four<4, Ones, Bits>(o, count, first, quarters, j);
            case 5: return four<5, Ones, Bits>(o, count, first, quarters, j);
            default: return four<6, Ones, Bits>(o, count, first, quarters, j);
        }
    }

    // quarters [row of activations][j]: sums, from row `first` of them on, with 4 rows of the weight from o on, of which
    // `count` exist. (Not inlined, and all in locals: else the compiler stores sums that would fit the registers.)
    template <int Rows, bool Ones, int Bits>
    __attribute__((noinline)) void four(int64_t o, int64_t count, int64_t first, __m512i (*quarters)[4], int j) const {
        constexpr int kSums = Rows + (Ones ? 1 : 0), kSteps = Unit<Bits>::kSteps;
        const int64_t whole = Unit<Bits>::whole(segments_[0]), rest = Unit<Bits>::rest(segments_[0]);
        const int64_t apart = x_.apart(), ahead = kAhead * w_.row_bytes();
        const int8_t* x = x_.row(first);
        const uint8_t* row[4];
        for (int r = 0; r < 4; ++r) row[r] = w_.row(o + (r < count ? r : 0));
        __m512i total[4][kSums];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kSums; ++v) total[r][v] = _mm512_setzero_si512();
        const auto add = [&](int r, __m512i codes, const __m512i* tokens) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int v = 0; v < Rows; ++v) total[r][v] = byte_products(total[r][v], codes, tokens[v]);
            // (on ports that products leave free)
            if (Ones)
                total[r][Rows] = _mm512_add_epi32(total[r][Rows], _mm512_sad_epu8(codes, _mm512_setzero_si512()));
        };
        const auto load_tokens = [&](__m512i* tokens) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int v = 0; v < Rows; ++v) tokens[v] = _mm512_load_si512(x + v * apart);
            x += 64;
        };
        for (int64_t at = 0; at < whole * 64; at += 64) {
            __m512i tokens[kSteps][Rows];
#pragma GCC unroll 2
            for (int step = 0; step < kSteps; ++step) load_tokens(tokens[step]);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const Unit<Bits> unit(row[r] + at);
                if (kAhead) _mm_prefetch(reinterpret_cast<const char*>(row[r] + at + ahead), _MM_HINT_T1);
#pragma GCC unroll 2
                for (int step = 0; step < kSteps; ++step) add(r, unit.codes[step], tokens[step]);
            }
        }
        for (int step = 0; rest && step < Unit<Bits>::steps(rest); ++step) {
            __m512i tokens[Rows];
            load_tokens(tokens);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) add(r, Unit<Bits>(row[r] + whole * 64, rest).codes[step], tokens);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kSums; ++v) {
            const __m512i of_row[4] = {total[0][v], total[1][v], total[2][v], total[3][v]};
            quarters[first + v][j] = quarter_sums(of_row, add_ints);
        }
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
