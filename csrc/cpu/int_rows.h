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

#endif

}  // namespace QNK_ISA
}  // namespace qnk
