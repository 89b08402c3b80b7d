// The two forms in which tiles multiply activations with packed integer weights: as bytes (int_activations.h), with sums in
// 32-bit integers, and, where activations are bf16, as they are, with codes less their zero points in bf16, exactly,
// and sums in fp32.
#pragma once

#include "cpu/int_rows.h"
#include "cpu/tiles.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

constexpr int64_t kTileBytes = 1024;

// Sums for 32 rows of the weight.
struct Sums {
    int32_t* products;         // [32][apart], bits of fp32 in Bf16Form
    float* totals;             // [32][tokens], where a row has several segments
    const int32_t* of_codes;   // [32]
};

// y [tokens, n] or the totals, rows o to o + 32 as far as `end`, from value(r, t): 16 sums of row o + r times its scale.
// `unit` scales tokens, [tokens]; null: 1. put(to, a, b) stores 32 values of a token.
template <typename T, typename Value, typename Put>
inline void finish_rows(const Packed& w, int64_t tokens, bool first, bool last, const float* unit, const float* bias,
                        T* y, int64_t o, int64_t end, float* totals, const Value& value, const Put& put) {
    const int64_t block = (tokens + 15) / 16 * 16, n = w.n, rows = end - o < 32 ? end - o : 32;
    for (int64_t t = 0; t < tokens; t += 16) {
        const Vec by_token = unit ? load(unit + t) : splat(1.0f);
        const auto sum_of = [&](int64_t r) {
            Vec sum = value(r, t);
            if (!first) sum = load(totals + r * block + t) + sum;
            return sum;
        };
        if (!last) {
            for (int64_t r = 0; r < rows; ++r) store(totals + r * block + t, sum_of(r));
            continue;
        }
        __m512i out[2][16];
        for (int64_t r = 0; r < 32; ++r) {
            Vec sum = splat(0.0f);
            if (r < rows) {
                sum = sum_of(r);
                if (unit) sum = sum * by_token;
                if (bias) sum = sum + splat(bias[o + r]);
            }
            out[r / 16][r % 16] = _mm512_castps_si512(sum.v);
        }
        transpose(out[0]);
        transpose(out[1]);
        const int64_t here = tokens - t < 16 ? tokens - t : 16;
        for (int64_t j = 0; j < here; ++j) {
            const Vec low{_mm512_castsi512_ps(out[0][j])}, high{_mm512_castsi512_ps(out[1][j])};
            T* to = y + (t + j) * n + o;
            if (rows == 32) {
                put(to, low, high);
            } else {
                store_first(to, low, static_cast<int>(rows < 16 ? rows : 16));
                if (rows > 16) store_first(to + 16, high, static_cast<int>(rows - 16));
            }
        }
    }
}

class ByteForm {
  public:
    static constexpr bool kBytes = true, kSigned = false;  // (codes)

    ByteForm(const Packed& w, const Segments& segments, const Quantization& how, int64_t capacity)
        : w_(w), segments_(segments), x_(w, segments, how, capacity) {}
    explicit operator bool() const { return static_cast<bool>(x_); }

    static int64_t width(const Packed&, const Segments& segments) { return segments.width(); }
    static int64_t parts(const Quantization& how) { return how.bytes; }
    int64_t steps(const Segment& s) const { return s.steps; }
    int64_t first_step(const Segment& s) const { return s.step; }
    static int line_shift(int bits) { return bits == 8 ? 0 : 1; }

    template <typename T>
    bool take(const T* x, int64_t tokens) {
        return x_.quantize(x, tokens);
    }
    int64_t tokens() const { return x_.tokens(); }
    int64_t columns(int64_t step) const { return step * 64; }
    __m512i row(int64_t index, int64_t columns) const { return _mm512_load_si512(x_.row(index) + columns); }

    // `steps` steps of a segment of a row from `step` on, to [steps][2 KiB apart][64]; with the sum of their codes.
    template <int Bits>
    void unpack(const Segment& s, int64_t row, int64_t step, int64_t steps, uint8_t* to, int32_t& sum) const {
        constexpr int kSteps = Unit<Bits>::kSteps;
        const int64_t whole = Unit<Bits>::whole(s), rest = Unit<Bits>::rest(s), unit = step / kSteps;
        const int64_t stop = unit + steps / kSteps < whole ? unit + steps / kSteps : whole;
        const uint8_t* from = w_.row(row) + s.column * Bits / 8;
        __m512i total = _mm512_setzero_si512();
        const bool sums = x_.bytes() == 1;
        const auto put = [&](const Unit<Bits>& codes, int count) {
            for (int i = 0; i < count; ++i, to += 2 * kTileBytes) {
                _mm512_store_si512(to, codes.codes[i]);
                if (sums) total = byte_products(total, codes.codes[i], _mm512_set1_epi8(1));
            }
        };
        for (int64_t u = unit; u < stop; ++u) put(Unit<Bits>(from + u * 64), kSteps);
        if (rest && step + steps > whole * kSteps) put(Unit<Bits>(from + whole * 64, rest), Unit<Bits>::steps(rest));
        if (sums) sum = (step ? sum : 0) + _mm512_reduce_add_epi32(total);
    }

    template <typename T>
    void finish(int64_t i, const float* bias, T* y, int64_t o, int64_t end, int64_t apart, const Sums& work) const {
        switch (x_.bytes()) {
            case 1: return finish<1>(i, bias, y, o, end, apart, work);
            default: return finish<3>(i, bias, y, o, end, apart, work);
        }
    }

  private:
    template <int Bytes, typename T>
    void finish(int64_t i, const float* bias, T* y, int64_t o, int64_t end, int64_t apart, const Sums& work) const {
        const int64_t tokens = x_.tokens(), groups = w_.groups, group = segments_[i].group;
        const int32_t *x_zero = x_.zero(), *sums = work.products, *code_sums = work.of_codes;
        const int32_t* x_sums[Bytes];
        for (int b = 0; b < Bytes; ++b) x_sums[b] = x_.sums(i, b);
        const float *scale = w_.scale + o * groups + group, *unit = x_.scale();
        int32_t zero[32];
        for (int64_t r = 0; r < 32 && o + r < end; ++r) zero[r] = w_.zero_point(o + r, group);
        const auto value = [&](int64_t r, int64_t t) {
            const __m512i z = _mm512_set1_epi32(zero[r]);
            const auto part = [&](int b) {
                __m512i sum = load_int(sums + r * apart + b * tokens + t);
                if (Bytes == 1)
                    sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(code_sums[r]), load_int(x_zero + t)));
                return _mm512_sub_epi32(sum, _mm512_mullo_epi32(z, load_int(x_sums[b] + t)));
            };
            // (fixed point first gets its unit, a power of two: the scales of weight and activations may be far apart)
            const Vec sum = Bytes == 1 ? joined<Bytes>(part) : joined<Bytes>(part) * load(unit + t);
            return sum * splat(scale[r * groups]);
        };
        const auto put = [](T* to, Vec low, Vec high) {
            store(to, low);
            store(to + 16, high);
        };
        finish_rows(w_, tokens, i == 0, i + 1 == segments_.count(), Bytes == 1 ? unit : nullptr, bias, y, o, end,
                    work.totals, value, put);
    }

    const Packed& w_;
    const Segments& segments_;
    Activations x_;
};

// 32 values of bf16 from integers that it holds exactly.
inline __m512i to_bf16(__m512i low, __m512i high) {
    const __m512 a = _mm512_cvtepi32_ps(low), b = _mm512_cvtepi32_ps(high);
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh(b, a);
#else
    return _mm512_permutex2var_epi16(_mm512_castps_si512(a), upper_halves(), _mm512_castps_si512(b));
#endif
}

// total + the sums of two products each of bf16, in fp32.
__attribute__((always_inline)) inline __m512i bf16_products(__m512i total, __m512i codes, __m512i x) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(codes), "v"(x));
    return total;
}

class Bf16Form {
  public:
    static constexpr bool kBytes = false, kSigned = true;

    Bf16Form(const Packed& w, const Segments& segments, const Quantization&, int64_t)
        : w_(w), segments_(segments), group_steps_(steps_of(w)) {}
    explicit operator bool() const { return true; }

    // Bytes of a row of activations: each group takes whole steps of 32 columns.
    static int64_t width(const Packed& w, const Segments&) { return w.groups * steps_of(w) * 64; }
    static int64_t parts(const Quantization&) { return 1; }
    int64_t steps(const Segment& s) const { return (s.columns + 31) / 32; }
    int64_t first_step(const Segment& s) const {
        return s.group * group_steps_ + (s.column - s.group * w_.group_size()) / 32;
    }
    static int line_shift(int bits) { return bits == 8 ? 1 : 2; }

    // Codes 0 to 15 less a zero point, twice over.
    static __m512i values_of(int zero) {
        const __m512i codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i values = _mm512_sub_epi32(codes, _mm512_set1_epi32(zero));
        return to_bf16(values, values);
    }

    // False where a row [k] has only magnitudes so small that products would take parts of it for zero (of sums, too, that
    // quotients of scales have made up to 2^9 smaller), or finite ones so large that their sums may be infinite before they
    // are scaled.
    static bool holds(const bf16* x, int64_t tokens, int64_t k) {
        bool held = true;
        parallel_for(tokens, 1 + 65536 / (k + 1), [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t)
                if (!holds(x + t * k, k)) __atomic_store_n(&held, false, __ATOMIC_RELAXED);
        });
        return held;
    }

    bool take(const bf16* x, int64_t tokens) {
        x_ = x;
        tokens_ = tokens;
        return holds(x, tokens, w_.k);
    }
    int64_t tokens() const { return tokens_; }

    // 32 columns from `first` on, masked; or, of 64 columns of 8-bit codes, those of every second pair.
    struct Columns {
        int64_t first;
        __mmask32 mask;
        int half;  // 0 or 1: which pairs; -1: all columns
    };
    Columns columns(int64_t step) const {
        const int64_t in_group = step % group_steps_ * 32, rest = w_.group_size() - in_group;
        const int64_t first = step / group_steps_ * w_.group_size() + in_group, odd = in_group % 64;
        if (w_.bits == 8 && rest + odd >= 64) return {first - odd, 0, odd ? 1 : 0};
        return {first, rest < 32 ? (__mmask32{1} << rest) - 1 : ~__mmask32{0}, -1};
    }
    __m512i row(int64_t index, const Columns& columns) const {
        const bf16* from = x_ + index * w_.k + columns.first;
        if (columns.half < 0) return _mm512_maskz_loadu_epi16(columns.mask, from);
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i at = _mm512_add_epi32(even, _mm512_set1_epi32(columns.half));
        return _mm512_permutex2var_epi32(_mm512_loadu_si512(from), at, _mm512_loadu_si512(from + 32));
    }

    // As ByteForm, without sums. Codes past a segment's end meet activations that are zero.
    template <int Bits>
    void unpack(const Segment& s, int64_t row, int64_t step, int64_t steps, uint8_t* to, int32_t&) const {
        const uint8_t* from = w_.row(row) + (s.column + step * 32) * Bits / 8;
        const Row<Bits> decoder(w_.zero_point(row, s.group));
        int64_t i = 0;
        if constexpr (Bits == 8) {  // (a chunk starts at an even step)
            for (; i + 2 <= steps && s.columns - (step + i) * 32 >= 64; i += 2, from += 64, to += 4 * kTileBytes)
                decoder.decode(_mm512_loadu_si512(from), to, to + 2 * kTileBytes);
        }
        for (; i < steps; ++i, from += 4 * Bits, to += 2 * kTileBytes) {
            const int64_t rest = s.columns - (step + i) * 32;
            _mm512_store_si512(to, rest < 32 ? decoder.decode(from, rest) : decoder.decode(from));
        }
    }

    template <typename T>
    void finish(int64_t i, const float* bias, T* y, int64_t o, int64_t end, int64_t apart, const Sums& work) const {
        const int64_t groups = w_.groups;
        const float *sums = reinterpret_cast<const float*>(work.products), *scale = w_.scale + o * groups + segments_[i].group;
        const auto value = [&](int64_t r, int64_t t) { return load(sums + r * apart + t) * splat(scale[r * groups]); };
        finish_rows(w_, tokens_, i == 0, i + 1 == segments_.count(), nullptr, bias, y, o, end, work.totals, value, put<T>);
    }

    // y from totals that are whole.
    template <typename T>
    void finish_totals(const float* bias, T* y, int64_t o, int64_t end, const Sums& work) const {
        const int64_t apart = (tokens_ + 15) / 16 * 16;
        const auto value = [&](int64_t r, int64_t t) { return load(work.totals + r * apart + t); };
        finish_rows(w_, tokens_, true, true, nullptr, bias, y, o, end, work.totals, value, put<T>);
    }

    // (The instruction takes denormals for zero, as the products have.)
    template <typename T>
    static void put(T* to, Vec low, Vec high) {
#if defined(__AVX512BF16__)
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
#else
        store(to, low);
        store(to + 16, high);
#endif
    }

  private:
    static bool holds(const bf16* x, int64_t k) {
        constexpr uint16_t kLeast = (127 - 91) << 7, kLarge = (127 + 100) << 7, kInfinite = (127 + 128) << 7;
        uint16_t most = largest(x, k, kInfinite + 0x7f);
        if (most >= kInfinite) most = largest(x, k, kInfinite - 1);
        return most < kLarge && (!most || most >= kLeast);
    }

    // The bits of the largest magnitude of x [k] up to `limit`.
    static uint16_t largest(const bf16* x, int64_t k, uint16_t limit) {
        const __m512i magnitude = _mm512_set1_epi16(0x7fff), top = _mm512_set1_epi16(static_cast<int16_t>(limit));
        __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // (one would wait for itself)
        const auto take = [&](__m512i x, __m512i& most) {
            const __m512i value = _mm512_and_si512(x, magnitude);
            most = _mm512_mask_max_epu16(most, _mm512_cmple_epu16_mask(value, top), most, value);
        };
        int64_t i = 0;
        for (; i + 64 <= k; i += 64)
            for (int j = 0; j < 2; ++j) take(_mm512_loadu_si512(x + i + 32 * j), most[j]);
        for (; i < k; i += 32) {
            const __mmask32 mask = k - i < 32 ? (__mmask32{1} << (k - i)) - 1 : ~__mmask32{0};
            take(_mm512_maskz_loadu_epi16(mask, x + i), most[0]);
        }
        most[0] = _mm512_max_epu16(most[0], most[1]);
        alignas(64) uint16_t lanes[32];
        _mm512_store_si512(lanes, most[0]);
        uint16_t result = 0;
        for (const uint16_t lane : lanes) result = lane > result ? lane : result;
        return result;
    }

    // Codes less a zero point, in bf16: exact, as integers of 8 bits and sign.
    template <int Bits>
    class Row;

    static int64_t steps_of(const Packed& w) { return (w.group_size() + 31) / 32; }

    const Packed& w_;
    const Segments& segments_;
    int64_t group_steps_;
    const bf16* x_ = nullptr;
    int64_t tokens_ = 0;
};

template <>
class Bf16Form::Row<8> {
  public:
    explicit Row(int zero)
        : zero_(_mm512_set1_epi32(zero)), low_zero_(_mm512_set1_ps(kLow + static_cast<float>(zero))),
          high_zero_(_mm512_set1_ps(kHigh + static_cast<float>(zero))) {}

    // The first two, and the last two, of every four of 64 codes. A code becomes the last bits of a number in fp32, or the
    // last but 8, from which the same number with its zero point for a code is taken off; what is left fits 16 bits.
    void decode(__m512i codes, uint8_t* first, uint8_t* last) const {
        _mm512_store_si512(first, pairs(codes));
        _mm512_store_si512(last, pairs(_mm512_srli_epi32(codes, 16)));
    }

    __m512i decode(const uint8_t* from) const { return decode(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
    __m512i decode(const uint8_t* from, int64_t columns) const {
        return decode(_mm256_maskz_loadu_epi8((__mmask32{1} << columns) - 1, from));
    }

  private:
    __m512i decode(__m256i codes) const {
        const __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
        const __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1));
        return to_bf16(_mm512_sub_epi32(low, zero_), _mm512_sub_epi32(high, zero_));
    }

    // Of the low two of four codes.
    __m512i pairs(__m512i codes) const {
        const auto number = [&](int mask, float base) {  // (codes & mask) | base
            const __m512i bits = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(mask), _mm512_castps_si512(_mm512_set1_ps(base)), 0xea);
            return _mm512_castsi512_ps(bits);
        };
        const __m512i low = _mm512_castps_si512(_mm512_sub_ps(number(0xff, kLow), low_zero_));
        const __m512i high = _mm512_castps_si512(_mm512_sub_ps(number(0xff00, kHigh), high_zero_));
        return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
    }

    static constexpr float kLow = 1 << 23, kHigh = 1 << 15;  // whose last bit, and last but 8, is 1

    __m512i zero_;
    __m512 low_zero_, high_zero_;
};

template <>
class Bf16Form::Row<4> {
  public:
    explicit Row(int zero) : values_(values_of(zero)) {}

    __m512i decode(const uint8_t* from) const { return decode(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
    __m512i decode(const uint8_t* from, int64_t columns) const {
        return decode(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << (columns / 2)) - 1), from));
    }

  private:
    // Each lane of 16 bits gets its code in its low four bits, all but one of those that a permutation looks at.
    __m512i decode(__m128i codes) const {
        const __m512i at = _mm512_setr_epi64(0x000c000800040000, 0x001c001800140010, 0x002c002800240020, 0x003c003800340030,
                                             0x000c000800040000, 0x001c001800140010, 0x002c002800240020, 0x003c003800340030);
        const __m512i halves = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1), _mm512_castsi128_si512(codes));
        return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(at, halves), values_);
    }

    __m512i values_;
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
