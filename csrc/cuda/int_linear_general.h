// y = x @ ((q - z) * s)^T for every shape, alignment and group size, one code at a time; and the sum of parts.
#pragma once

#include "cuda/int_linear.h"

namespace qnk {

constexpr int kGeneralWarps = 4, kGeneralRows = 8;

// A warp: one output for 8 rows of x. Lanes take every 32nd column.
template <typename T, int Bits>
__global__ void __launch_bounds__(32 * kGeneralWarps) int_linear_general_kernel(IntLinear a) {
    const int64_t row_tiles = (a.m + kGeneralRows - 1) / kGeneralRows;
    const int64_t out = blockIdx.x / row_tiles * kGeneralWarps + threadIdx.x / 32;
    const int64_t first = blockIdx.x % row_tiles * kGeneralRows;
    if (out >= a.n) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const uint8_t* codes = a.weight + out * (a.k * Bits / 8);
    const T* x = static_cast<const T*>(a.x) + first * a.k;
    const uint32_t group_size = static_cast<uint32_t>(a.k / a.groups);
    float sum[kGeneralRows] = {};
    for (int64_t column = lane; column < a.k; column += 32) {
        const int64_t group = static_cast<uint32_t>(column) / group_size;
        const int64_t parameter = out * a.groups + group;
        const int zero = a.zero_point ? a.zero_point[parameter] : 1 << (Bits - 1);
        const int level = static_cast<int>(unpack_code(codes, column, Bits)) - zero;
        const float weight = __fmul_rn(static_cast<float>(level), a.scale[parameter]);
#pragma unroll
        for (int r = 0; r < kGeneralRows; ++r)
            if (first + r < a.m) sum[r] = __fmaf_rn(to_float(x[r * a.k + column]), weight, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < kGeneralRows; ++r) {
        for (int apart = 16; apart > 0; apart /= 2) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], apart);
        if (lane == r && first + r < a.m) store_sum<T>(a, 0, first + r, out, sum[r]);
    }
}

// y [m, n] <- sum over parts of partial [parts, m, n] + bias, always in the same order.
template <typename T>
__global__ void __launch_bounds__(256) int_linear_sum_kernel(IntLinear a, int64_t parts) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, size = a.m * a.n;
    if (i >= size) return;
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += a.partial[part * size + i];
    static_cast<T*>(a.y)[i] = from_float<T>(sum + bias_at(a, i % a.n));
}

}  // namespace qnk
