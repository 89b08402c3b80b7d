// Codes less their zero points as operands of tensor cores, and the activations that they are multiplied by.
//
// A lane takes 8 consecutive columns at a time: 8 codes (Bits / 4 words) of a row of the weight and 8 values of a row
// of x, each as 4 words of two. Which column stands where in a product of 16 columns does not matter as long as both
// operands agree, so a lane's columns are next to each other in memory, and loads are as wide as the hardware allows.
// Levels are integers of at most 8 bits and a sign: exact in bf16 and f16, without a conversion instruction:
// 2^p + code is a matter of bits, and subtracting 2^p + zero point is exact.
#pragma once

#include "cuda/primitives.h"

namespace qnk {

template <typename T>
struct OperandOf {
    using type = T;  // of the products of x of dtype T
    static constexpr int pieces = 1;
};
template <>
struct OperandOf<float> {  // in three pieces of 8 bits of significand: no bit is lost
    using type = bf16;
    static constexpr int pieces = 3;
};

template <typename E>
constexpr uint32_t kBiasPair = 0x43004300u;  // bf16: 128, units of 1 up to 255
template <>
constexpr uint32_t kBiasPair<f16> = 0x64006400u;  // 1024, units of 1 up to 2047
constexpr uint32_t kBias32 = 0x4b000000u;          // fp32: 2^23

__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b, bf16) {
    const __nv_bfloat162 difference =
        __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&difference);
}
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b, f16) {
    const __half2 difference = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&difference);
}

// (a, b), (c, d) from (a, c), (b, d) and back: the low halves, and the high halves.
__device__ __forceinline__ uint32_t lows(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t highs(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// level[i]: columns (0, 1), (2, 3), (4, 5), (6, 7) of 8-bit codes, and (0, 4), (1, 5), (2, 6), (3, 7) of 4-bit codes,
// which lie 16 bits apart. E is bf16 or f16. The zero point is byte `which` of zeros, below 2^Bits.
template <typename E, int Bits>
class Decoder {
public:
    __device__ Decoder(uint32_t zeros, int which)
        : zero_(kBytesOfFloat ? __byte_perm(zeros, kBias32, 0x7440 | which)
                              : __byte_perm(zeros, kBiasPair<E>, 0x5050 | which | which << 8)) {}

    __device__ void operator()(const uint32_t (&codes)[Bits / 4], uint32_t (&level)[4]) const {
        if constexpr (Bits == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                level[i] = subtract(lop3<0xea>(codes[0] >> (4 * i), 0x000f000fu, kBiasPair<E>), zero_, E{});
        } else if constexpr (kBytesOfFloat) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                level[i] = highs(of_byte(codes[i / 2], i % 2 * 2), of_byte(codes[i / 2], i % 2 * 2 + 1));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                level[i] = subtract(__byte_perm(codes[i / 2], kBiasPair<E>, i % 2 ? 0x5352 : 0x5150), zero_, E{});
        }
    }

private:
    // 128 + code has no room for 8 bits in bf16: those go through fp32, of which the high half is the level, exactly.
    static constexpr bool kBytesOfFloat = Bits == 8 && sizeof(E) == 2 && kBiasPair<E> == kBiasPair<bf16>;

    __device__ uint32_t of_byte(uint32_t word, int i) const {
        const uint32_t biased = __byte_perm(word, kBias32, 0x7440 | i);
        return __float_as_uint(__fsub_rn(__uint_as_float(biased), __uint_as_float(zero_)));
    }

    uint32_t zero_;  // that of the bias and the zero point: a pair, or fp32
};

// Pairs of 4-bit levels in the order (0, 1), (2, 3), (4, 5), (6, 7); others are in it already.
template <int Bits>
__device__ __forceinline__ void in_order(uint32_t (&level)[4]) {
    if constexpr (Bits == 4) {
        const uint32_t a = level[0], b = level[1], c = level[2], d = level[3];
        level[0] = lows(a, b), level[1] = lows(c, d), level[2] = highs(a, b), level[3] = highs(c, d);
    }
}

// 8 values at `from`, 16-byte aligned, as pairs in the order of Decoder (or, InOrder, in their own), by pieces.
template <int Bits, bool InOrder, typename T>
__device__ __forceinline__ void load_values(const T* from, uint32_t (&word)[1][4]) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    if (Bits == 8 || InOrder) {
        word[0][0] = v.x, word[0][1] = v.y, word[0][2] = v.z, word[0][3] = v.w;
    } else {
        word[0][0] = lows(v.x, v.z), word[0][1] = highs(v.x, v.z);
        word[0][2] = lows(v.y, v.w), word[0][3] = highs(v.y, v.w);
    }
}

template <int Bits, bool InOrder>
__device__ __forceinline__ void load_values(const float4* low, const float4* high, uint32_t (&word)[3][4]) {
    const float4 a = *low, b = *high;
    float value[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int piece = 0; piece < 3; ++piece) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int first = Bits == 8 || InOrder ? 2 * i : i, second = Bits == 8 || InOrder ? 2 * i + 1 : i + 4;
            word[piece][i] = highs(__float_as_uint(value[first]), __float_as_uint(value[second]));
        }
        // What is left after the first 8 significant bits, exactly; 0 of infinity.
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float head = __uint_as_float(__float_as_uint(value[i]) & 0xffff0000u);
            value[i] = fabsf(value[i]) == INFINITY ? 0.0f : __fsub_rn(value[i], head);
        }
    }
}

}  // namespace qnk
