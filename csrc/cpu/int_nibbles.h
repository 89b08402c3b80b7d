// Integer product for a few tokens over codes of 4 bits with AVX2: bytes of codes times bytes of activations.
//
// A row of activations is fixed point in two or three signed bytes, as with AVX-512 (int_activations.h). Codes are
// multiplied as they are, without a sign: products of up to 256 columns are summed in 16 bits, from minus the zero point
// times the sum of the activations on. What they come to fits, 15 * 128 * 16 < 2^15, and so is exact even if sums wrap on
// the way. Per 64 codes of a row four instructions to unpack them, and four a token and byte; words of 16 bits
// (int_words.h) would take 16 and 16.
#pragma once

#include "cpu/buffer.h"
#include "cpu/fixed_point.h"
#include "cpu/int_weight.h"
#include "cpu/parallel.h"
#include "qnkernels.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)

// Parts: bytes of an activation.
template <int Parts>
class NibbleProduct {
  public:
    static bool serves(const Packed& w, int64_t m) {
        return w.bits == 4 && m <= kMostTokens && w.k > 0 && w.group_size() % kStep == 0 && w.zeros_are_codes();
    }

    NibbleProduct(const Packed& w, int64_t m)
        : w_(w), m_(m), apart_(w.k * Parts + 64), spans_(w.groups * ((w.group_size() + kSpan - 1) / kSpan)),
          bytes_(m * apart_), sums_(m * spans_ * Parts * 16) {}

    // representable: false where a row has no fixed point.
    template <typename T>
    int multiply(const T* x, const float* bias, T* y, bool& representable) {
        if (!bytes_ || !sums_) return QNK_NO_MEMORY;
        representable = true;
        for (int64_t t = 0; t < m_ && representable; ++t) representable = take(x + t * w_.k, t);
        if (!representable) return QNK_OK;
        parallel_for(w_.n, 16, [&](int64_t begin, int64_t end) {
            const int64_t turns = (m_ + kAtOnce - 1) / kAtOnce;
            for (int64_t turn = 0, t = 0; turn < turns; ++turn) {
                const int64_t here = (m_ - t + turns - turn - 1) / (turns - turn);
                switch (here) {  // (at most kAtOnce; sums of all rows that are met together fit the registers)
                    case 1: rows<1, 4>(t, bias, y, begin, end); break;
                    case 2: rows<2, 2>(t, bias, y, begin, end); break;
                    case 3: rows<3, 1>(t, bias, y, begin, end); break;
                    default: rows<kAtOnce, 1>(t, bias, y, begin, end);
                }
                t += here;
            }
        });
        return QNK_OK;
    }

  private:
    static constexpr int64_t kMostTokens = Parts == 3 ? 12 : 24;  // for which this is faster than fp32 is
    static constexpr int kAtOnce = Parts == 3 ? 3 : 4;  // tokens
    static constexpr int64_t kStep = 64;   // columns: 32 bytes of a row
    static constexpr int64_t kSpan = 256;  // columns whose products are summed in 16 bits
    static_assert(15 * 128 * (kSpan / 16) < 1 << 15);

    // Of token t: for each 64 columns [Parts][64], the highest bytes first, of each the even columns first.
    int8_t* bytes(int64_t t) const { return bytes_.get() + t * apart_; }
    // Of token t: for each span [Parts][16], lane by lane as products are summed; those of symmetric codes times -8.
    int16_t* sums(int64_t t) const { return sums_.get() + t * spans_ * Parts * 16; }
    static __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static __m256i nibble() { return _mm256_set1_epi8(15); }

    // sum + the products of two neighbours each, of codes and the bytes at x. (As intrinsics GCC 12 makes all products
    // first, and stores sums for want of registers.)
    static __m256i add(__m256i sum, __m256i codes, const int8_t* x) {
        __m256i product;
        __asm__("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0"
                : "+x"(sum), "=&x"(product)
                : "m"(*reinterpret_cast<const __m256i_u*>(x)), "x"(codes));
        return sum;
    }

    template <typename T>
    bool take(const T* x, int64_t t) {
        int unit;
        if (!byte_unit(x, w_.k, Parts, unit)) return false;
        unit_[t] = power_of_two(unit);
        const Vec up = splat(power_of_two(-unit));
        // bytes of q + 0x808080, each less 128, are the signed bytes of q
        const __m256i half = _mm256_set1_epi32(Parts == 3 ? 0x808080 : 0x8080);
        for (int64_t c = 0; c < w_.k; c += kStep) {
            alignas(32) uint32_t fixed[kStep];
            for (int i = 0; i < kStep; i += kLanes) {
                const __m256i value = _mm256_cvtps_epi32((qnk::load(x + c + i) * up).v);
                const __m256i signs = _mm256_xor_si256(_mm256_add_epi32(value, half), half);
                _mm256_store_si256(reinterpret_cast<__m256i*>(fixed + i), signs);
            }
            int8_t* to = bytes(t) + c * Parts;
            for (int b = 0; b < Parts; ++b, to += kStep)
                for (int i = 0; i < kStep / 2; ++i) {
                    to[i] = static_cast<int8_t>(fixed[2 * i] >> (8 * (Parts - 1 - b)));
                    to[i + kStep / 2] = static_cast<int8_t>(fixed[2 * i + 1] >> (8 * (Parts - 1 - b)));
                }
        }
        const __m256i times = _mm256_set1_epi16(w_.zero ? 1 : -8);
        const int8_t* from = bytes(t);
        int16_t* to = sums(t);
        each_span([&](int64_t, int64_t steps) {
            for (int b = 0; b < Parts; ++b, to += 16) {
                __m256i sum = _mm256_setzero_si256();
                for (int64_t i = 0; i < steps; ++i)
                    for (int half = 0; half < 2; ++half)
                        sum = add(sum, _mm256_set1_epi8(1), from + (i * Parts + b) * kStep + half * kStep / 2);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_mullo_epi16(sum, times));
            }
            from += steps * Parts * kStep;
        });
        return true;
    }

    // run(group, steps) for each span of each group.
    template <typename Run>
    __attribute__((always_inline)) void each_span(const Run& run) const {
        for (int64_t g = 0; g < w_.groups; ++g)
            for (int64_t rest = w_.group_size(); rest > 0; rest -= kSpan)
                run(g, (rest < kSpan ? rest : kSpan) / kStep);
    }

    // y of tokens t, t + 1, ... and rows begin to end.
    template <int Tokens, int Rows, typename T>
    void rows(int64_t t, const float* bias, T* y, int64_t begin, int64_t end) const {
        for (int64_t o = begin; o < end; o += Rows) {
            float out[Tokens][Rows];
            if (w_.zero)
                some<true, Tokens, Rows>(t, o, end - o, out);
            else
                some<false, Tokens, Rows>(t, o, end - o, out);
            for (int r = 0; r < Rows && o + r < end; ++r)
                for (int v = 0; v < Tokens; ++v)
                    y[(t + v) * w_.n + o + r] = from_float<T>(bias ? out[v][r] + bias[o + r] : out[v][r]);
        }
    }

    // out [Tokens][Rows] <- products of rows o, o + 1, ..., of which `count` exist.
    template <bool Zeros, int Tokens, int Rows>
    __attribute__((noinline)) void some(int64_t t, int64_t o, int64_t count, float (&out)[Tokens][Rows]) const {
        Vec total[Tokens][Rows];
        const uint8_t *codes[Rows], *zeros[Rows];
        const float* scales[Rows];
        for (int r = 0; r < Rows; ++r) {
            const int64_t row = o + (r < count ? r : 0);
            codes[r] = w_.row(row);
            zeros[r] = Zeros ? w_.zero + row * w_.groups : nullptr;
            scales[r] = w_.scale + row * w_.groups;
            for (int v = 0; v < Tokens; ++v) total[v][r] = splat(0.0f);
        }
        const int64_t ahead = t == 0 ? Rows * w_.row_bytes() : 0;  // (too far for the processor to guess)
        const int8_t* x = bytes(t);
        const int16_t* first = sums(t);
        each_span([&](int64_t g, int64_t steps) __attribute__((always_inline)) {
            __m256i sum[Tokens][Rows][Parts];
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) {
                __builtin_prefetch(codes[r] + ahead);
                if (steps > 2) __builtin_prefetch(codes[r] + ahead + 64);
                const __m256i zero = _mm256_set1_epi16(static_cast<short>(Zeros ? -zeros[r][g] : 0));
#pragma GCC unroll 4
                for (int v = 0; v < Tokens; ++v)
#pragma GCC unroll 3
                    for (int b = 0; b < Parts; ++b) {
                        const __m256i of_x = load(first + v * spans_ * Parts * 16 + b * 16);
                        sum[v][r][b] = Zeros ? _mm256_mullo_epi16(of_x, zero) : of_x;
                    }
            }
            first += Parts * 16;
            for (; steps; --steps) {
#pragma GCC unroll 4
                for (int r = 0; r < Rows; ++r) {
                    const __m256i packed = load(codes[r]);
                    codes[r] += kStep / 2;
                    const __m256i even = _mm256_and_si256(packed, nibble());
                    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble());
#pragma GCC unroll 4
                    for (int v = 0; v < Tokens; ++v)
#pragma GCC unroll 3
                        for (int b = 0; b < Parts; ++b) {
                            const int8_t* with = x + v * apart_ + b * kStep;
                            sum[v][r][b] = add(add(sum[v][r][b], even, with), odd, with + kStep / 2);
                        }
                }
                x += Parts * kStep;
            }
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) {
                const Vec scale = splat(scales[r][g]);
#pragma GCC unroll 4
                for (int v = 0; v < Tokens; ++v)
                    // (the unit first: the scales of weight and activations may be far apart)
                    total[v][r] = fma(joined(sum[v][r]) * splat(unit_[t + v]), scale, total[v][r]);
            }
        });
        for (int v = 0; v < Tokens; ++v)
            for (int r = 0; r < Rows; ++r) out[v][r] = qnk::sum(total[v][r]);
    }

    // Sums of 16 bits, of all bytes, as one; rounded once: two bytes stay below 2^24.
    static Vec joined(const __m256i (&sum)[Parts]) {
        const __m256i ones = _mm256_set1_epi16(1);
        const __m256i high = _mm256_add_epi32(_mm256_madd_epi16(sum[0], _mm256_set1_epi16(256)), _mm256_madd_epi16(sum[1], ones));
        const Vec value{_mm256_cvtepi32_ps(high)};
        if (Parts == 2) return value;
        return fma(value, splat(256.0f), {_mm256_cvtepi32_ps(_mm256_madd_epi16(sum[Parts - 1], ones))});
    }

    const Packed& w_;
    int64_t m_;
    int64_t apart_;  // bytes of a token; multiples of 4 KiB would share few sets of the first-level cache
    int64_t spans_;  // of a row
    Buffer<int8_t> bytes_;
    Buffer<int16_t> sums_;
    float unit_[kMostTokens];
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
