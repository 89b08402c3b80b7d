// y = x @ ((q - z) * s)^T for many rows of x, on tensor cores: tiles of 64 or 128 rows by 128 outputs.
//
// A step is 64 columns of x and of the codes, which arrive by asynchronous copies in a ring of stages in shared memory.
// The warps lie side by side over the outputs, so that codes are decoded once, or twice where there are two rows of
// warps. A warp: 64 rows by 8 * kTiles outputs. Sums of a group, or of 256 columns of a longer one, stay in tensor
// cores, which cut off where fp32 would round; they are scaled and added up in fp32.
#pragma once

#include "cuda/int_linear.h"

namespace qnk {

template <typename T, int Bits, int WarpRows>
struct Tiles {
    static constexpr int kThreads = 256, kColumns = 64, kUnits = kColumns / kUnit;
    static constexpr int kRows = 64 * WarpRows, kOutputs = 128;
    static constexpr int kTiles = kOutputs / 8 / (8 / WarpRows);  // of 8 outputs, of a warp
    static constexpr int kX = kColumns * sizeof(T) / 16;          // 16-byte pieces of a row of x
    static constexpr int kCodes = kColumns * Bits / 8 / 16;       // and of a row of the weight
    static constexpr int kStage = (kRows * kX + kOutputs * kCodes) * 16;  // bytes
    static constexpr int kRing = 96 * 1024 / kStage, kStages = kRing < 4 ? kRing : 4;
    static constexpr int kShared = kStages * kStage;
    static_assert(kStages >= 2);

    // Where the pieces of a row lie, so that lanes that read one after another meet different banks.
    __device__ static int x_piece(int row, int piece) {
        return row * kX + (piece ^ (sizeof(T) == 4 ? row & 1 : (row & 1) * 4));
    }
    __device__ static int code_piece(int row, int piece) {
        return kRows * kX + row * kCodes + (piece ^ (Bits == 4 ? row >> 2 & 1 : row & 2));
    }
};

template <typename T, int Bits, int WarpRows>
__global__ void __launch_bounds__(256) int_linear_tiles_kernel(IntLinear a) {
    using S = Tiles<T, Bits, WarpRows>;
    using E = typename OperandOf<T>::type;
    constexpr int kPieces = OperandOf<T>::pieces, kTiles = S::kTiles;
    constexpr int kUnitsBetweenSums = 256 / kUnit;
    QNK_SHARED_MEMORY(memory);
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int g = lane / 4, t = lane % 4;
    const TileOf tile(blockIdx.x, (a.m + S::kRows - 1) / S::kRows, (a.n + S::kOutputs - 1) / S::kOutputs);
    const int64_t block_row = tile.row * S::kRows, block_out = tile.output * S::kOutputs, row_bytes = a.k * Bits / 8;
    const int warp_row = warp % WarpRows * 64, warp_out = warp / WarpRows * (8 * kTiles);
    const int64_t steps = (a.k + S::kColumns - 1) / S::kColumns;
    const int64_t first = blockIdx.y * a.turns, last = min(first + a.turns, steps);

    const auto load = [&](int stage, int64_t step) {
        unsigned char* const to = memory + stage * S::kStage;
        if (step < last) {
#pragma unroll 1  // addresses are cheaper to compute than to keep
            for (int i = thread; i < S::kRows * S::kX; i += S::kThreads) {
                const int64_t row = block_row + i / S::kX, column = step * S::kColumns + i % S::kX * (16 / sizeof(T));
                const bool exists = row < a.m && column < a.k;
                cp_async_16(to + S::x_piece(i / S::kX, i % S::kX) * 16,
                            static_cast<const T*>(a.x) + (exists ? row * a.k + column : 0), exists ? 16 : 0);
            }
#pragma unroll 1
            for (int i = thread; i < S::kOutputs * S::kCodes; i += S::kThreads) {
                const int64_t row = block_out + i / S::kCodes, byte = (step * S::kCodes + i % S::kCodes) * 16;
                const bool exists = row < a.n && byte < row_bytes;
                cp_async_16(to + S::code_piece(i / S::kCodes, i % S::kCodes) * 16,
                            a.weight + (exists ? row * row_bytes + byte : 0), exists ? 16 : 0);
            }
        }
        cp_async_commit();
    };

    const int64_t group_units = a.groups == 1 ? (a.k + kUnit - 1) / kUnit : a.k / a.groups / kUnit;
    int64_t unit = first * S::kUnits, group = unit / group_units, units_left = group_units - unit % group_units;
    const int64_t last_unit = min(last * S::kUnits, (a.k + kUnit - 1) / kUnit);
    float scale[kTiles][2];
    const auto zeros_of = [&](int64_t of_group) {  // a byte for each tile
        uint32_t zeros = 0;
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
            zeros |= zero_at(a, parameter_index(a, block_out + warp_out + 8 * i + g, of_group), Bits) << (8 * i);
        return zeros;
    };
    const auto load_scale = [&] {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i)
            scale[i / 2][i % 2] =
                a.scale[parameter_index(a, block_out + warp_out + i / 2 * 8 + 2 * t + i % 2, group)];
    };
    uint32_t zeros = zeros_of(group), next_zeros = zeros_of(min(group + 1, a.groups - 1));
    load_scale();

    float sum[4][kTiles][4] = {}, total[4][kTiles][4] = {};
    const auto add_up = [&] {
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int i = 0; i < kTiles; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    total[m][i][j] = __fmaf_rn(sum[m][i][j], scale[i][j % 2], total[m][i][j]);
                    sum[m][i][j] = 0.0f;
                }
    };

#pragma unroll
    for (int stage = 0; stage < S::kStages - 1; ++stage) load(stage, first + stage);
    int stage = 0, units_in_sum = 0;
    for (int64_t step = first; step < last; ++step) {
        cp_async_wait<S::kStages - 2>();
        __syncthreads();  // this stage is there for all, and all are done with the one that is loaded next
        load((stage + S::kStages - 1) % S::kStages, step + S::kStages - 1);
        const unsigned char* const from = memory + stage * S::kStage;
#pragma unroll
        for (int of_step = 0; of_step < S::kUnits; ++of_step, ++unit) {
            if (unit >= last_unit) break;
            if (units_left == 0) {
                add_up();
                units_in_sum = 0;
                ++group;
                units_left = group_units;
                zeros = next_zeros;
                next_zeros = zeros_of(min(group + 1, a.groups - 1));
                load_scale();
            }
            uint32_t level[kTiles][4];
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                uint32_t codes[Bits / 4];
                const int at = of_step * 4 * Bits + t * Bits;  // byte of the row
                const unsigned char* const piece = from + S::code_piece(warp_out + 8 * i + g, at / 16) * 16 + at % 16;
#pragma unroll
                for (int w = 0; w < Bits / 4; ++w) codes[w] = reinterpret_cast<const uint32_t*>(piece)[w];
                const Decoder<E, Bits> decode(zeros, i);
                decode(codes, level[i]);
                in_order<Bits>(level[i]);
            }
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                if (block_row + warp_row + 16 * m >= a.m) break;
                uint32_t value[2][kPieces][4];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = warp_row + 16 * m + 8 * half + g, piece = (of_step * 4 + t) * (sizeof(T) / 2);
                    const unsigned char* const at = from + S::x_piece(row, piece) * 16;
                    if constexpr (kPieces == 1)
                        load_values<Bits, true>(reinterpret_cast<const T*>(at), value[half]);
                    else
                        load_values<Bits, true>(reinterpret_cast<const float4*>(at),
                                                reinterpret_cast<const float4*>(from + S::x_piece(row, piece + 1) * 16),
                                                value[half]);
                }
#pragma unroll
                for (int piece = kPieces - 1; piece >= 0; --piece)
#pragma unroll
                    for (int pair = 0; pair < 4; pair += 2)
#pragma unroll
                        for (int i = 0; i < kTiles; ++i)
                            mma_m16n8k16<E>(sum[m][i],
                                            {value[0][piece][pair], value[1][piece][pair], value[0][piece][pair + 1],
                                             value[1][piece][pair + 1]},
                                            {level[i][pair], level[i][pair + 1]});
            }
            --units_left;
            if (++units_in_sum == kUnitsBetweenSums) {
                add_up();
                units_in_sum = 0;
            }
        }
        stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
    add_up();
    cp_async_wait<0>();
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int64_t row = block_row + warp_row + 16 * m + g + j / 2 * 8;
                const int64_t out = block_out + warp_out + 8 * i + 2 * t + j % 2;
                if (row < a.m && out < a.n) store_sum<T>(a, blockIdx.y, row, out, total[m][i][j]);
            }
}

}  // namespace qnk
