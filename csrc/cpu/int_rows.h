// Integer product for few tokens: rows of the weight are read where they lie and multiplied as bytes, four at a time.
//
// Per 64 codes and row of activations one instruction (64 products); memory is the limit as long as there are few.
#pragma once

#include "cpu/int_activations.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

// Lane 4 j + i <- the sum of lanes of total[4 j + i].
inline __m512i sums_of(const __m512i* total) {
    __m512i quarter[4];
    for (int j = 0; j < 4; ++j) {
        const __m512i* t = total + 4 * j;
        const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(t[0], t[1]), _mm512_unpackhi_epi32(t[0], t[1]));
        const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(t[2], t[3]), _mm512_unpackhi_epi32(t[2], t[3]));
        quarter[j] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    const auto fold = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    return fold(fold(quarter[0], quarter[1]), fold(quarter[2], quarter[3]));
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
        alignas(64) int32_t sums[(kSums + 3) / 4 * 4][16];
        for (int64_t o = begin; o < end; o += 16) {
            const int count = static_cast<int>(end - o < 16 ? end - o : 16);
            for (int r = 0; r < count; r += 4) four<Rows, Ones, Bits>(o + r, count - r, &sums[0][r]);
            switch (x_.bytes()) {
                case 1: write<1>(sums, Ones ? sums[Rows] : nullptr, bias, y, o, count); break;
                case 2: write<2>(sums, nullptr, bias, y, o, count); break;
                default: write<3>(sums, nullptr, bias, y, o, count);
            }
        }
    }

    // sums [row of activations][16 apart], for 4 rows of the weight from o on, of which `count` exist.
    template <int Rows, bool Ones, int Bits>
    void four(int64_t o, int count, int32_t* sums) const {
        constexpr int kSums = Rows + (Ones ? 1 : 0);
        const Segment& s = segments_[0];
        __m512i total[(kSums + 3) / 4 * 16];
        for (__m512i& one : total) one = _mm512_setzero_si512();
        const int8_t* x[Rows];
        for (int v = 0; v < Rows; ++v) x[v] = x_.row(v);
        const uint8_t* w[4];
        for (int r = 0; r < 4; ++r) w[r] = w_.row(o + (r < count ? r : 0));
        const auto add = [&](int64_t step, int r, __m512i codes) {
#pragma GCC unroll 8
            for (int v = 0; v < Rows; ++v)
                total[4 * v + r] = _mm512_dpbusd_epi32(total[4 * v + r], codes, _mm512_load_si512(x[v] + step * 64));
            if (Ones) total[4 * Rows + r] = _mm512_dpbusd_epi32(total[4 * Rows + r], codes, _mm512_set1_epi8(1));
        };
        const int64_t whole = Unit<Bits>::whole(s), rest = Unit<Bits>::rest(s);
        for (int64_t u = 0; u < whole; ++u) {
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const Unit<Bits> unit(w[r] + u * 64);
                for (int i = 0; i < Unit<Bits>::kSteps; ++i) add(u * Unit<Bits>::kSteps + i, r, unit.codes[i]);
            }
        }
        if (rest)
            for (int r = 0; r < 4; ++r) {
                const Unit<Bits> unit(w[r] + whole * 64, rest);
                for (int i = 0; i < Unit<Bits>::steps(rest); ++i) add(whole * Unit<Bits>::kSteps + i, r, unit.codes[i]);
            }
        for (int v = 0; v < kSums; v += 4) {
            const __m512i folded = sums_of(total + 4 * v);
            _mm_store_si128(reinterpret_cast<__m128i*>(sums + v * 16), _mm512_castsi512_si128(folded));
            _mm_store_si128(reinterpret_cast<__m128i*>(sums + v * 16 + 16), _mm512_extracti32x4_epi32(folded, 1));
            _mm_store_si128(reinterpret_cast<__m128i*>(sums + v * 16 + 32), _mm512_extracti32x4_epi32(folded, 2));
            _mm_store_si128(reinterpret_cast<__m128i*>(sums + v * 16 + 48), _mm512_extracti32x4_epi32(folded, 3));
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
            Vec value = (joined<Bytes>(part) * scale) * splat(x_.scale()[t]);
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

// One token and 4-bit codes in short groups: the sums of a group stay in 16 lanes, as integers, and are scaled there.
class GroupedRowProduct {
  public:
    GroupedRowProduct(const Packed& w, const Segments& segments, const Activations& x)
        : w_(w), segments_(segments), x_(x), x_sums_(segments.count() * 16) {
        if (!x_sums_) return;
        for (int64_t i = 0; i < segments.count(); ++i) {
            __m512i sums[3] = {};
            for (int b = 0; b < 3; ++b)
                for (int64_t step = 0; step < segments[i].steps; ++step)
                    sums[b] = byte_sums(sums[b], _mm512_load_si512(x.row(b) + (segments[i].step + step) * 64));
            _mm512_store_si512(x_sums_.get() + i * 16, whole(sums));
        }
    }

    // A lane holds sums of up to 32 products of 15 by 2^22, which fit 31 bits.
    static bool serves(const Packed& w, const Segments& segments, int bytes, int64_t tokens) {
        return w.bits == 4 && tokens == 1 && bytes == 3 && segments.count() > 1 && w.group_size() <= 512;
    }

    explicit operator bool() const { return static_cast<bool>(x_sums_); }

    // Rows [begin, end) of the weight, y [n].
    template <typename T>
    void multiply(const float* bias, T* y, int64_t begin, int64_t end) const {
        for (int64_t o = begin; o < end; o += 4) {
            const int64_t count = end - o < 4 ? end - o : 4;
            Vec total[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
            const uint8_t* w[4];
            int64_t at[4];
            for (int64_t r = 0; r < 4; ++r) {
                w[r] = w_.row(o + (r < count ? r : 0));
                at[r] = (o + (r < count ? r : 0)) * w_.groups;
            }
            for (int64_t i = 0; i < segments_.count(); ++i) {
                const Segment& s = segments_[i];
                const __m512i x_sums = _mm512_load_si512(x_sums_.get() + i * 16);
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) {
                    const __m512i zero = _mm512_set1_epi32(w_.zero ? w_.zero[at[r] + s.group] : 8);
                    const __m512i sum = _mm512_sub_epi32(sums(w[r] + s.column / 2, s), _mm512_mullo_epi32(zero, x_sums));
                    total[r] = fma(to_vec(sum), splat(w_.scale[at[r] + s.group]), total[r]);
                }
            }
            for (int64_t r = 0; r < count; ++r)
                y[o + r] = from_float<T>(sum(total[r]) * x_.scale()[0] + (bias ? bias[o + r] : 0.0f));
        }
    }

  private:
    static __m512i whole(const __m512i* bytes) {
        const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(bytes[1], 8), bytes[2]);
        return _mm512_add_epi32(_mm512_slli_epi32(bytes[0], 16), low);
    }

    __m512i sums(const uint8_t* from, const Segment& s) const {
        __m512i total[3] = {};
        const int8_t* x[3] = {x_.row(0) + s.step * 64, x_.row(1) + s.step * 64, x_.row(2) + s.step * 64};
        const auto add = [&](int64_t step, __m512i codes) {
            for (int b = 0; b < 3; ++b)
                total[b] = _mm512_dpbusd_epi32(total[b], codes, _mm512_load_si512(x[b] + step * 64));
        };
        const int64_t units = Unit<4>::whole(s), rest = Unit<4>::rest(s);
        for (int64_t u = 0; u < units; ++u) {
            const Unit<4> unit(from + u * 64);
            add(2 * u, unit.codes[0]);
            add(2 * u + 1, unit.codes[1]);
        }
        if (rest) {
            const Unit<4> unit(from + units * 64, rest);
            for (int i = 0; i < Unit<4>::steps(rest); ++i) add(2 * units + i, unit.codes[i]);
        }
        return whole(total);
    }

    const Packed& w_;
    const Segments& segments_;
    const Activations& x_;
    Buffer<int32_t> x_sums_;
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
