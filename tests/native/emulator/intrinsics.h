// Arithmetic, bits, atomics and 16-bit floats under the names of CUDA. Included by cuda.h.
#pragma once

// ---- Bits ----
template <typename To, typename From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return bits_as<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
// prmt: nibble i of the selector chooses byte i of the result among those of (low, high); 8 replicates its sign.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> (4 * i) & 15;
        const unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 255;
        result |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return result;
}
inline int __dp4a(int a, int b, int c) {
    uint32_t sum = static_cast<uint32_t>(c);
    for (int i = 0; i < 4; ++i)
        sum += static_cast<uint32_t>(static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i)));
    return static_cast<int>(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 255) * (b >> (8 * i) & 255);
    return c;
}

// ---- Arithmetic: each rounded once, to nearest even ----
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
// Conversions saturate, and NaN gives 0.
template <typename Integer>
inline Integer saturated(double rounded) {
    constexpr double low = static_cast<double>(std::numeric_limits<Integer>::min());
    constexpr double high = static_cast<double>(std::numeric_limits<Integer>::max());
    if (rounded != rounded) return 0;
    if (rounded <= low) return std::numeric_limits<Integer>::min();
    return rounded >= high ? std::numeric_limits<Integer>::max() : static_cast<Integer>(rounded);
}
inline int __float2int_rn(float v) { return saturated<int>(rint(v)); }
inline int __float2int_rz(float v) { return saturated<int>(trunc(v)); }
inline int __float2int_rd(float v) { return saturated<int>(floor(v)); }
inline int __float2int_ru(float v) { return saturated<int>(ceil(v)); }
inline unsigned __float2uint_rn(float v) { return saturated<unsigned>(rint(v)); }
inline unsigned __float2uint_rz(float v) { return saturated<unsigned>(trunc(v)); }
inline long long __float2ll_rn(float v) { return saturated<long long>(rint(v)); }
inline long long __double2ll_rn(double v) { return saturated<long long>(rint(v)); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
inline float __ll2float_rn(long long v) { return static_cast<float>(v); }
inline double __ll2double_rn(long long v) { return static_cast<double>(v); }
template <typename A, typename B>
inline auto min(A a, B b) -> std::common_type_t<A, B> {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));
    return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
inline auto max(A a, B b) -> std::common_type_t<A, B> {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b));
    return T(a) < T(b) ? T(b) : T(a);
}

// ---- Loads and stores with a hint ----
template <typename T>
inline T __ldg(const T* p) { return *p; }
template <typename T>
inline T __ldcs(const T* p) { return *p; }
template <typename T>
inline T __ldcg(const T* p) { return *p; }
template <typename T>
inline T __ldca(const T* p) { return *p; }
template <typename T>
inline void __stcs(T* p, T value) { *p = value; }
template <typename T>
inline void __stcg(T* p, T value) { *p = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- Atomics: fibers are not interrupted, so each is a read and a write. They return the old value ----
template <typename T>
inline T atomicExch(T* p, T value) { return std::exchange(*p, value); }
inline int atomicAdd(int* p, int v) {
    return atomicExch(p, static_cast<int>(static_cast<unsigned>(*p) + static_cast<unsigned>(v)));
}
inline unsigned atomicAdd(unsigned* p, unsigned v) { return atomicExch(p, *p + v); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) { return atomicExch(p, *p + v); }
inline float atomicAdd(float* p, float v) { return atomicExch(p, *p + v); }
inline double atomicAdd(double* p, double v) { return atomicExch(p, *p + v); }
#define QNK_ATOMICS(T)                                                                                             \
    inline T atomicMin(T* p, T v) { return atomicExch(p, *p < v ? *p : v); }                                       \
    inline T atomicMax(T* p, T v) { return atomicExch(p, *p > v ? *p : v); }                                       \
    inline T atomicCAS(T* p, T expected, T v) { return atomicExch(p, *p == expected ? v : *p); }
QNK_ATOMICS(int)
QNK_ATOMICS(unsigned)
QNK_ATOMICS(unsigned long long)
QNK_ATOMICS(long long)
#undef QNK_ATOMICS
inline unsigned atomicAnd(unsigned* p, unsigned v) { return atomicExch(p, *p & v); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return atomicExch(p, *p | v); }
inline unsigned atomicXor(unsigned* p, unsigned v) { return atomicExch(p, *p ^ v); }
inline unsigned atomicInc(unsigned* p, unsigned top) { return atomicExch(p, *p >= top ? 0u : *p + 1); }

// ---- 16-bit floats ----
using __nv_bfloat16 = qnk::bf16;
using __half = qnk::f16;
using half = __half;
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};
using half2 = __half2;
inline float __bfloat162float(__nv_bfloat16 v) { return qnk::to_float(v); }
inline float __half2float(__half v) { return qnk::to_float(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return qnk::from_float<qnk::bf16>(v); }
inline __nv_bfloat16 __float2bfloat16(float v) { return qnk::from_float<qnk::bf16>(v); }
inline __half __float2half_rn(float v) { return qnk::from_float<qnk::f16>(v); }
inline __half __float2half(float v) { return qnk::from_float<qnk::f16>(v); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return {v}; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short v) { return {v}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {qnk::to_float(v.x), qnk::to_float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {qnk::to_float(v.x), qnk::to_float(v.y)}; }
// One rounding: in double, to float by rounding to odd, which leaves the last rounding to the 16-bit format.
inline float round_to_odd(double v) {
    const float nearest = static_cast<float>(v);
    if (!(fabs(v) < HUGE_VAL) || static_cast<double>(nearest) == v || !(fabsf(nearest) < HUGE_VALF)) return nearest;
    const float toward_zero = fabs(static_cast<double>(nearest)) > fabs(v) ? nextafterf(nearest, 0.0f) : nearest;
    return bits_as<float>(bits_as<uint32_t>(toward_zero) | 1u);
}
#define QNK_HALF_ARITHMETIC(T, T2)                                                                                 \
    inline T2 __hadd2(T2 a, T2 b) {                                                                                \
        const auto add = [](T p, T q) {                                                                            \
            return qnk::from_float<T>(round_to_odd(double(qnk::to_float(p)) + double(qnk::to_float(q))));          \
        };                                                                                                         \
        return {add(a.x, b.x), add(a.y, b.y)};                                                                     \
    }                                                                                                              \
    inline T2 __hsub2(T2 a, T2 b) {                                                                                \
        const auto subtract = [](T p, T q) {                                                                       \
            return qnk::from_float<T>(round_to_odd(double(qnk::to_float(p)) - double(qnk::to_float(q))));          \
        };                                                                                                         \
        return {subtract(a.x, b.x), subtract(a.y, b.y)};                                                           \
    }                                                                                                              \
    inline T2 __hmul2(T2 a, T2 b) {                                                                                \
        const auto multiply = [](T p, T q) {                                                                       \
            return qnk::from_float<T>(round_to_odd(double(qnk::to_float(p)) * double(qnk::to_float(q))));          \
        };                                                                                                         \
        return {multiply(a.x, b.x), multiply(a.y, b.y)};                                                           \
    }                                                                                                              \
    inline T2 __hfma2(T2 a, T2 b, T2 c) {                                                                          \
        const auto one = [](T p, T q, T r) {                                                                       \
            return qnk::from_float<T>(                                                                             \
                round_to_odd(fma(double(qnk::to_float(p)), double(qnk::to_float(q)), double(qnk::to_float(r)))));  \
        };                                                                                                         \
        return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};                                                           \
    }
QNK_HALF_ARITHMETIC(__nv_bfloat16, __nv_bfloat162)
QNK_HALF_ARITHMETIC(__half, __half2)
#undef QNK_HALF_ARITHMETIC
