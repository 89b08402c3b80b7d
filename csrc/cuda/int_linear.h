// What the kernels of int_linear share: arguments, the last step of a sum, the choice of a kernel.
#pragma once

#include "common/packing.h"
#include "cuda/int_levels.h"
#include "qnkernels.h"

namespace qnk {

struct IntLinear {
    const void* x;              // [m, k]
    const uint8_t* weight;      // [n, k * bits / 8]
    const float* scale;         // [n, groups]
    const uint8_t* zero_point;  // [n, groups], or null: 2^(bits - 1)
    const void* bias;           // [n], or null
    int bias_dtype;
    void* y;         // [m, n] in the dtype of x
    float* partial;  // [parts, m, n] where parts > 1, else null
    int64_t m, n, k, groups;
    int64_t turns;  // of the loop over columns, in each part
};

// Of the last row where `row` is past it. 32 bits hold the index: groups of the kernels that ask have 32 codes or more.
__device__ __forceinline__ uint32_t parameter_index(const IntLinear& a, int64_t row, int64_t group) {
    const uint32_t last = static_cast<uint32_t>(a.n - 1), at = static_cast<uint32_t>(row);
    return (at < last ? at : last) * static_cast<uint32_t>(a.groups) + static_cast<uint32_t>(group);
}

__device__ __forceinline__ uint32_t zero_at(const IntLinear& a, uint32_t index, int bits) {
    return a.zero_point ? a.zero_point[index] : 1u << (bits - 1);
}

__device__ __forceinline__ float bias_at(const IntLinear& a, int64_t out) {
    if (!a.bias) return 0.0f;
    switch (a.bias_dtype) {
        case QNK_BF16: return to_float(static_cast<const bf16*>(a.bias)[out]);
        case QNK_F16: return to_float(static_cast<const f16*>(a.bias)[out]);
        default: return static_cast<const float*>(a.bias)[out];
    }
}

// y[row, out] <- the sum over all columns, or its part.
template <typename T>
__device__ __forceinline__ void store_sum(const IntLinear& a, int64_t part, int64_t row, int64_t out, float sum) {
    if (a.partial)
        a.partial[(part * a.m + row) * a.n + out] = sum;
    else
        static_cast<T*>(a.y)[row * a.n + out] = from_float<T>(sum + bias_at(a, out));
}

// The tile of a block: bands of 8 tiles of rows, so that both operands of blocks that run together stay in the cache.
struct TileOf {
    int64_t row, output;
    __device__ TileOf(int64_t block, int64_t rows, int64_t outputs) {
        constexpr int64_t kBand = 8;
        const int64_t band = block / (kBand * outputs), within = block % (kBand * outputs);
        const int64_t height = min(rows - band * kBand, kBand);
        row = band * kBand + within % height;
        output = within / height;
    }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Kernel { General, Few, Tiles, Warpgroups };

// How a product is taken apart.
struct Plan {
    Kernel kernel;
    int outputs;    // of a block
    int rows;       // of x, of a block
    int64_t parts;  // into which the loop over columns is cut, where the blocks are too few for the device
    int64_t turns;  // of that loop, in each part
    int warps = 0;  // of a block of the kernel for few rows
};

constexpr int kFewRows = 16;  // of x, at most, that wait for the weight
// From here on wgmma, where the device has it. (8192x8192, int8, rows of bf16 on an H200: 64 of them take 92 us by
// mma.sync, 128 take 67 us by wgmma.)
constexpr int kWarpgroupRows = kFewRows + 1;
constexpr int kUnit = 32;  // columns that four lanes take in two products; a group is whole units of the kernels

}  // namespace qnk
