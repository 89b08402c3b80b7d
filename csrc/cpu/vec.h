// A vector of fp32 in the width of the instruction set being compiled, loaded from and stored to any dtype (integers, to
// 16 bits, too).
//
// Comparisons with NaN are false, min and max return their second argument then: clamp(v) = min(top, max(0, v))
// keeps NaN. A Mask has one bit a lane.
#pragma once

#include <type_traits>

#include "common/affine.h"
#include "common/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr bool kFusedMultiply = true;  // whether fma rounds once
using Mask = __mmask16;

struct Vec {
    __m512 v;
};

inline Vec splat(float value) { return {_mm512_set1_ps(value)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline Vec select(Mask mask, Vec yes, Vec no) { return {_mm512_mask_mov_ps(no.v, mask, yes.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float min_of(Vec a) { return _mm512_reduce_min_ps(a.v); }
inline float max_of(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec select(uint64_t bits, int v, Vec yes, Vec no) { return select(static_cast<Mask>(bits >> (16 * v)), yes, no); }
inline Mask first_lanes(int count) { return static_cast<Mask>((1u << count) - 1u); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Vec load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
inline Vec load(const uint16_t* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(words))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
// Rounded to bf16 in the upper halves; NaN may become infinity.
inline __m512i round_upper(Vec a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i to_even = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(to_even, odd, bits, _mm512_set1_epi32(0x8000));
}
// Where the upper halves of the 32 lanes of two vectors are, in halves.
inline __m512i upper_halves() {
    const auto pair = [](int first) { return first + 1 + ((first + 3) << 16); };
    return _mm512_setr_epi32(pair(0), pair(4), pair(8), pair(12), pair(16), pair(20), pair(24), pair(28), pair(32), pair(36),
                             pair(40), pair(44), pair(48), pair(52), pair(56), pair(60));
}
inline void store(bf16* p, Vec a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i kept = _mm512_mask_or_epi32(round_upper(a), is_nan(a), bits, _mm512_set1_epi32(0x400000));
    const __m512i halves = _mm512_permutexvar_epi16(upper_halves(), kept);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(halves));
}

// 32 values of bf16 as two vectors, those at even places and those at odd ones: no halves move between lanes.
struct Pairs {
    __m512i bits;

    Vec even() const { return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))}; }
    Vec odd() const { return {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)))}; }
};
inline Pairs load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
inline void store_pairs(bf16* p, Pairs a) { _mm512_storeu_si512(p, a.bits); }
inline Pairs select(uint32_t bits, Pairs yes, Pairs no) { return {_mm512_mask_mov_epi16(no.bits, bits, yes.bits)}; }
// No value is NaN.
inline Pairs round_pairs(Vec even, Vec odd) {
    constexpr __mmask32 kUpper = 0xaaaaaaaa;
    return {_mm512_mask_mov_epi16(_mm512_srli_epi32(round_upper(even), 16), kUpper, round_upper(odd))};
}

inline void store(f16* p, Vec a) {
    const __m256i half = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
inline void store(int16_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a.v)));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr bool kFusedMultiply = true;
using Mask = uint32_t;

struct Vec {
    __m256 v;
};

inline Vec splat(float value) { return {_mm256_set1_ps(value)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Mask less(Vec a, Vec b) {
    return static_cast<Mask>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}
inline Mask is_nan(Vec a) {
    return static_cast<Mask>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
}
inline Mask outside(Vec a, Vec low, Vec high) {
    const __m256 below = _mm256_cmp_ps(a.v, low.v, _CMP_LT_OQ), above = _mm256_cmp_ps(high.v, a.v, _CMP_LT_OQ);
    return static_cast<Mask>(_mm256_movemask_ps(_mm256_or_ps(below, above)));
}
inline Vec select(uint32_t bits, int v, Vec yes, Vec no) {  // (a variable shift into the sign is slow on Zen)
    const __m256i own = _mm256_slli_epi32(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), 8 * v);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), own), own);
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(set))};
}
inline Vec select(Mask mask, Vec yes, Vec no) { return select(mask, 0, yes, no); }
template <typename Op>
inline float fold(Vec a, Op op) {
    __m128 quad = op(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    quad = op(quad, _mm_movehl_ps(quad, quad));
    return _mm_cvtss_f32(op(quad, _mm_movehdup_ps(quad)));
}
inline float sum(Vec a) {
    return fold(a, [](__m128 p, __m128 q) { return _mm_add_ps(p, q); });
}
inline float min_of(Vec a) {
    return fold(a, [](__m128 p, __m128 q) { return _mm_min_ps(p, q); });
}
inline float max_of(Vec a) {
    return fold(a, [](__m128 p, __m128 q) { return _mm_max_ps(p, q); });
}
inline Mask first_lanes(int count) { return (1u << count) - 1u; }

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline Vec load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec load(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
}
inline Vec load(const uint16_t* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(words))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
inline void store(f16* p, Vec a) {
    const __m128i half = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
inline void store(int16_t* p, Vec a) {
    const __m256i whole = _mm256_cvtps_epi32(a.v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}

#else

constexpr int kLanes = 8;
constexpr bool kFusedMultiply = false;
using Mask = uint32_t;

struct Vec {
    float v[8];
};

template <typename Op>
inline Vec lanewise(Op op) {
    Vec result;
    for (int i = 0; i < 8; ++i) result.v[i] = op(i);
    return result;
}
template <typename Op>
inline Mask mask_of(Op op) {
    Mask mask = 0;
    for (int i = 0; i < 8; ++i) mask |= static_cast<Mask>(op(i)) << i;
    return mask;
}
inline Vec splat(float value) {
    return lanewise([&](int) { return value; });
}
inline Vec operator+(Vec a, Vec b) {
    return lanewise([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
    return lanewise([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
    return lanewise([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
    return lanewise([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec sqrt(Vec a) {
    return lanewise([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
inline Vec min(Vec a, Vec b) {
    return lanewise([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec max(Vec a, Vec b) {
    return lanewise([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Mask less(Vec a, Vec b) {
    return mask_of([&](int i) { return a.v[i] < b.v[i]; });
}
inline Mask is_nan(Vec a) {
    return mask_of([&](int i) { return a.v[i] != a.v[i]; });
}
inline Vec select(Mask mask, Vec yes, Vec no) {
    return lanewise([&](int i) { return (mask >> i) & 1u ? yes.v[i] : no.v[i]; });
}
inline Vec select(uint32_t bits, int v, Vec yes, Vec no) { return select((bits >> (8 * v)) & 255u, yes, no); }
template <typename Op>
inline float fold(Vec a, Op op) {
    for (int width = 4; width; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] = op(a.v[i], a.v[i + width]);
    return a.v[0];
}
inline Mask first_lanes(int count) { return (1u << count) - 1u; }

inline Vec load(const uint8_t* p) {
    return lanewise([&](int i) { return static_cast<float>(p[i]); });
}
inline Vec load(const uint16_t* p) {
    return lanewise([&](int i) { return static_cast<float>(p[i]); });
}
template <typename T>
inline Vec load(const T* p) {
    return lanewise([&](int i) { return to_float(p[i]); });
}
template <typename T>
inline void store(T* p, Vec a) {
    for (int i = 0; i < 8; ++i) p[i] = from_float<T>(a.v[i]);
}
inline void store(int16_t* p, Vec a) {
    for (int i = 0; i < 8; ++i) p[i] = static_cast<int16_t>(a.v[i]);
}

#endif

#if !defined(__AVX2__) || defined(__AVX512F__)
// Lanes below low or above high.
inline Mask outside(Vec a, Vec low, Vec high) { return less(a, low) | less(high, a); }
#endif

#if !defined(__AVX2__)
inline float sum(Vec a) {
    return fold(a, [](float p, float q) { return p + q; });
}
inline float min_of(Vec a) {
    return fold(a, [](float p, float q) { return p < q ? p : q; });
}
inline float max_of(Vec a) {
    return fold(a, [](float p, float q) { return p > q ? p : q; });
}
#endif

// The first `count` values; the other lanes are 0.
template <typename T>
inline Vec load_first(const T* p, int count) {
    if (count == kLanes) return load(p);
    T buffer[kLanes] = {};
    for (int i = 0; i < count; ++i) buffer[i] = p[i];
    return load(buffer);
}

template <typename T>
inline void store_first(T* p, Vec a, int count) {
    if (count == kLanes) return store(p, a);
    T buffer[kLanes];
    store(buffer, a);
    for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

// Vectors worked on together, step by step, so that the latency of each hides in the work of the others. The bits of a
// mask for all of them are a Masks, of which select(masks, v, yes, no) takes those of vector v.
constexpr int kBatch = 4;
using Masks = std::conditional_t<kLanes == 16, uint64_t, uint32_t>;
template <int N>
using Size = std::integral_constant<int, N>;

// One step: op(v) for N vectors.
template <int N, typename Op>
inline __attribute__((always_inline)) void each(const Op& op) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) op(v);
}

// Whether any lane of N vectors has at least the magnitude `bound`, which is not negative. NaN has. The bits of
// magnitudes are compared as integers: where floating-point operations are what holds up, others do that beside them.
template <int N>
inline __attribute__((always_inline)) bool any_reaches(const Vec (&x)[N], float bound) {
#if defined(__AVX512F__)
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    each<N>([&](int v) { most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x[v].v), magnitude)); });
    return _mm512_cmpge_epu32_mask(most, _mm512_castps_si512(splat(bound).v)) != 0;
#elif defined(__AVX2__)
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    each<N>([&](int v) { most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(x[v].v), magnitude)); });
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(_mm256_castps_si256(splat(bound).v), most)) != -1;
#else
    bool any = false;
    each<N>([&](int v) {
        for (int i = 0; i < kLanes; ++i) any |= !(__builtin_fabsf(x[v].v[i]) < bound);
    });
    return any;
#endif
}

// op(i, lanes, Size<N>) for every N vectors of `lanes` elements from i on, of `count` elements: for kBatch whole ones at
// a time, then for single ones, the last of which may have fewer.
template <typename Op>
inline __attribute__((always_inline)) void by_batch(int64_t count, const Op& op) {
    int64_t i = 0;
    for (; i + kBatch * kLanes <= count; i += kBatch * kLanes) op(i, kLanes, Size<kBatch>());
    for (; i < count; i += kLanes) op(i, static_cast<int>(count - i < kLanes ? count - i : kLanes), Size<1>());
}

// to [n] <- from [n] in fp32
template <typename T>
void widen(const T* from, int64_t n, float* to) {
    by_batch(n, [&](int64_t i, int lanes, auto size) {
        each<size>([&](int v) { store_first(to + i + v * kLanes, load_first(from + i + v * kLanes, lanes), lanes); });
    });
}

// Adding it and taking it away rounds 0 <= v < 2^22 to the nearest integer, ties to even; NaN stays NaN.
inline Vec round_magic() { return splat(kRoundMagic); }
inline Vec round_even(Vec v) { return (v + round_magic()) - round_magic(); }

// Integer at or below |v| < 2^22; NaN stays NaN.
inline Vec floor(Vec v) {
#if defined(__AVX512F__)
    return {_mm512_roundscale_ps(v.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
#elif defined(__AVX2__)
    return {_mm256_floor_ps(v.v)};
#else
    const Vec nearest = round_even(v);
    return nearest - select(less(v, nearest), splat(1.0f), splat(0.0f));
#endif
}

}  // namespace QNK_ISA
}  // namespace qnk
