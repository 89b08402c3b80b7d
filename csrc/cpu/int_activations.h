// Activations as signed bytes, for products with packed integer weights.
//
// A row becomes either 8-bit codes of an affine quantizer (less 128), or, where only the weight is quantized, a fixed-
// point number of 15 or 22 bits and sign, in two or three bytes: x = scale * (first * 2^16 + second * 2^8 + third), each
// byte signed. The unit is a power of two, 2^-22 to 2^-21 of the row's largest magnitude with three bytes (2^-15 to
// 2^-14 with two; see fixed_point.h), so that integer products give the sum about as exactly as fp32 would: an element
// is off by at most half a unit.
#pragma once

#include "common/affine.h"
#include "cpu/divider.h"
#include "cpu/extremes.h"
#include "cpu/fixed_point.h"
#include "cpu/int_weight.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace qnk {
inline namespace QNK_ISA {

// What becomes of a row of activations.
struct Quantization {
    int bytes;               // 1: 8-bit codes; 2, 3: fixed point
    const float* scale;      // of the given quantizer of 8-bit codes; null: that of each row's range
    const float* zero_point;
};

#if defined(__AVX512F__)

inline __m512i byte_sums(__m512i total, __m512i bytes) {
    return byte_products(total, _mm512_set1_epi8(1), bytes);
}

class Activations {
  public:
    // For up to `capacity` tokens, a multiple of 16.
    Activations(const Packed& w, const Segments& segments, const Quantization& how, int64_t capacity)
        : w_(w), segments_(segments), how_(how), capacity_(capacity), apart_(segments.width() + kRowPadding),
          codes_(capacity * how.bytes * apart_),
          scale_(capacity), zero_(capacity), sums_(segments.count() * how.bytes * capacity), lost_(max_threads()) {}

    explicit operator bool() const { return codes_ && scale_ && zero_ && sums_ && lost_; }

    // Rows [tokens, k] of x; false where the fixed-point form does not serve one. Rows that have no 8-bit quantizer get the
    // scale NaN.
    template <typename T>
    bool quantize(const T* x, int64_t tokens) {
        tokens_ = tokens;
        for (int i = 0; i < max_threads(); ++i) lost_.get()[i] = 0;
        const int64_t grain = (16384 + w_.k - 1) / w_.k;
        parallel_for(tokens, grain, [&](int64_t begin, int64_t end, int thread) {
            // in 4 bits columns are reordered, from here
            alignas(64) int8_t row[3][kPiece];
            for (int64_t t = begin; t < end; ++t)
                if (!quantize_row(x + t * w_.k, t, row)) lost_.get()[thread] = 1;
        });
        for (int i = 0; i < max_threads(); ++i)
            if (lost_.get()[i]) return false;
        return true;
    }

    int64_t tokens() const { return tokens_; }
    int bytes() const { return how_.bytes; }
    // Codes [width] of byte b of token t; rows follow each other, all of the first byte before those of the second.
    const int8_t* row(int64_t index) const { return codes_.get() + index * apart_; }
    int64_t apart() const { return apart_; }
    const float* scale() const { return scale_.get(); }  // [capacity]
    // 8-bit codes: the zero point less 128, [capacity]. Fixed point has none.
    const int32_t* zero() const { return zero_.get(); }
    // Sums of the codes of byte b less their zero point in a segment, [capacity].
    const int32_t* sums(int64_t segment, int b) const { return sums_.get() + (segment * how_.bytes + b) * capacity_; }

  private:
    static constexpr int64_t kPiece = 2048;  // columns, a multiple of 128
    // Rows of a multiple of 4 KiB would share few sets of the first-level cache with the rows of the weight.
    static constexpr int64_t kRowPadding = kHasTiles ? 0 : 64;

    template <typename T>
    bool quantize_row(const T* x, int64_t t, int8_t (*row)[kPiece]) {
        if (how_.bytes == 1) {
            const Affine quantizer = affine_of(x);
            const bool finite = quantizer.scale - quantizer.scale == 0.0f;
            scale_.get()[t] = finite ? quantizer.scale : bits_float(0x7fc00000u);
            zero_.get()[t] = finite ? static_cast<int32_t>(quantizer.zero_point) - 128 : 0;
            if (!finite)
                fill_row(t, row, x, [](Vec, int8_t* to) { put(to, _mm512_setzero_si512()); });
            else if (Divider::serves(quantizer.scale))
                affine_row<true>(x, t, row, quantizer);
            else
                affine_row<false>(x, t, row, quantizer);
            return true;
        }
        zero_.get()[t] = 0;
        int unit;
        if (!byte_unit(x, w_.k, how_.bytes, unit)) return false;
        scale_.get()[t] = power_of_two(unit);
        const Vec up = splat(power_of_two(-unit));
        const __m512i half = _mm512_set1_epi32(how_.bytes == 3 ? 0x808080 : 0x8080);
        fill_row(t, row, x, [&](Vec value, int8_t* to) {
            const __m512i fixed = _mm512_cvtps_epi32((value * up).v);
            // bytes of q + 0x808080, each less 128, are the signed bytes of q
            const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(fixed, half), half);
            for (int b = how_.bytes - 1, shift = 0; b >= 0; --b, shift += 8)
                put(to + b * kPiece, _mm512_srli_epi32(bytes, shift));
        });
        return true;
    }

    // The low bytes of 16 integers.
    static void put(int8_t* to, __m512i value) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value));
    }

    template <typename T>
    Affine affine_of(const T* x) const {
        if (!how_.scale) {
            const Extremes range = extremes(x, w_.k);
            return affine_over(range.low, range.high, 255.0f, false);
        }
        Mask nan = 0;
        int64_t i = 0;
        for (; i + kLanes <= w_.k; i += kLanes) nan |= is_nan(load(x + i));
        if (i < w_.k) nan |= is_nan(load_first(x + i, static_cast<int>(w_.k - i)));
        return {nan ? bits_float(0x7fc00000u) : *how_.scale, *how_.zero_point};
    }

    template <bool Fast, typename T>
    void affine_row(const T* x, int64_t t, int8_t (*row)[kPiece], const Affine& quantizer) {
        const Divider divider(quantizer.scale);
        const Vec zero = splat(quantizer.zero_point), top = splat(255.0f), none = splat(0.0f), middle = splat(128.0f);
        fill_row(t, row, x, [&](Vec value, int8_t* to) {
            const Vec quotient = Fast ? divider.fast(value) : divider.exact(value);
            const Vec code = round_even(min(top, max(none, quotient + zero))) - middle;
            put(to, _mm512_cvtps_epi32(code.v));
        });
    }

    // Row t from bytes(16 values of x, to), which writes 16 codes at `to` and those of further bytes kPiece apart.
    template <typename T, typename Bytes>
    void fill_row(int64_t t, int8_t (*row)[kPiece], const T* x, const Bytes& bytes) {
        for (int64_t i = 0; i < segments_.count(); ++i) {
            const Segment& s = segments_[i];
            __m512i total[3] = {};
            for (int64_t piece = 0; piece < s.columns; piece += kPiece) {
                const int64_t columns = s.columns - piece < kPiece ? s.columns - piece : kPiece;
                const T* from = x + s.column + piece;
                int64_t c = 0;
                for (; c + kLanes <= columns; c += kLanes) bytes(load(from + c), row[0] + c);
                if (c < columns) bytes(load_first(from + c, static_cast<int>(columns - c)), row[0] + c);
                for (int b = 0; b < how_.bytes; ++b) {
                    // up to 15 codes past the end were written, and are taken as far as 128 columns go
                    for (int64_t end = columns; end % 128; ++end) row[b][end] = 0;
                    int8_t* to = codes_.get() + (b * tokens_ + t) * apart_ + s.step * 64 + piece;
                    total[b] = w_.bits == 8 ? copy(row[b], columns, to, total[b]) : split(row[b], columns, to, total[b]);
                }
            }
            for (int b = 0; b < how_.bytes; ++b)
                sums_.get()[(i * how_.bytes + b) * capacity_ + t] =
                    _mm512_reduce_add_epi32(total[b]) - static_cast<int32_t>(s.columns) * zero_.get()[t];
        }
    }

    static __m512i copy(const int8_t* from, int64_t columns, int8_t* to, __m512i total) {
        for (int64_t c = 0; c < columns; c += 64) {
            const __m512i codes = _mm512_load_si512(from + c);
            total = byte_sums(total, codes);
            _mm512_store_si512(to + c, codes);
        }
        return total;
    }

    // Even columns before odd ones, see Segments.
    static __m512i split(const int8_t* from, int64_t columns, int8_t* to, __m512i total) {
        for (int64_t c = 0; c < columns; c += 128) {
            const __m512i a = _mm512_load_si512(from + c), b = _mm512_load_si512(from + c + 64);
            const auto halves = [](__m512i low, __m512i high) {
                return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low)), _mm512_cvtepi16_epi8(high), 1);
            };
            const __m512i even = halves(a, b), odd = halves(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
            total = byte_sums(byte_sums(total, even), odd);
            if (columns - c > 64) {
                _mm512_store_si512(to + c, even);
                _mm512_store_si512(to + c + 64, odd);
            } else {
                _mm512_store_si512(to + c, _mm512_inserti64x4(even, _mm512_castsi512_si256(odd), 1));
            }
        }
        return total;
    }

    const Packed& w_;
    const Segments& segments_;
    Quantization how_;
    int64_t capacity_, tokens_ = 0, apart_;
    Buffer<int8_t> codes_;
    Buffer<float> scale_;
    Buffer<int32_t> zero_, sums_;
    Buffer<uint8_t> lost_;
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
