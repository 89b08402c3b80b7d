// y = x @ ((q - z) * s)^T for many rows of x on sm_90a: y^T = W x^T by wgmma, codes decoded into its register operand.
//
// A block: 128 outputs, 64 to each of two warpgroups, by 128 rows of x. A step is 64 columns. Codes never touch shared
// memory: a lane loads the 16 columns (16 t ..) of its two outputs, a step ahead, and asks for later ones into the L2
// cache. So that these are the columns which wgmma expects of the lane, x is copied with its pairs of columns
// transposed (8 by 4 in place of 4 by 8), pair by pair, asynchronously, two steps ahead. Four tiles of x: that of the
// step, the next two, and that of the step before, which a slower warpgroup may still read.
// Two products of 16 columns are a group; while one runs the operand of the next is decoded. The warpgroups take turns
// (turns.h), a group each, which also stand for the barrier of a step; x is copied three steps ahead, and codes are
// loaded a whole step ahead. Sums of a group of the weight, or of 256 columns of a longer one, stay in tensor
// cores, which cut off where fp32 would round; they are scaled and added up in fp32.
//
// A step on one multiprocessor, in cycles, by count: products 2 x 4 x 64 = 512; instructions 416 of four schedulers
// (int8 with bf16: 208 of a warp, of which 80 decode and 32 copy), less for int4 and f16; shared memory 256 + 128, x
// read twice and written. From the L2 cache 24 KiB (int4: 20), 48 bytes a cycle (40) if products were the bound; about
// 30 to 40 can be had, so that is the bound, 600 to 800 cycles a step. Measured on an H200, 8192x8192 with 256
// rows of bf16: int8 92 us, int4 106 (104 and 114 without turns), about 1230 cycles a step.
#pragma once

#include "cuda/int_linear.h"
#include "cuda/turns.h"
#include "cuda/wgmma.h"

namespace qnk {

template <typename T, int Bits>
struct Warpgroups {
    static constexpr int kThreads = 256, kColumns = 64, kRows = 128, kOutputs = 128;
    static constexpr int kTile = kRows * kColumns * 2, kTiles = 4;       // bytes; of x
    static constexpr int kShared = kTiles * kTile + int{kSwizzleBytes};  // the tiles start at a multiple of that
    static constexpr int kLoad = 16 * Bits / 8, kWords = kLoad / 4;      // bytes and words of the 16 codes of a lane
    static constexpr int kInSum = 256 / kColumns;                        // steps that tensor cores add up
    static constexpr int kPrefetch = 8;  // steps from the codes that are loaded to those asked into the L2 cache
};

// Codes of a lane: outputs g and g + 8, 16 columns each.
template <int Words>
struct LaneCodes {
    uint32_t word[2][Words];

    __device__ __forceinline__ void load(int row, const uint8_t* from) {
        using Load = std::conditional_t<Words == 4, uint4, uint2>;
        const Load read = *reinterpret_cast<const Load*>(from);
        word[row][0] = read.x, word[row][1] = read.y;
        if constexpr (Words == 4) word[row][2] = read.z, word[row][3] = read.w;
    }
};

template <typename T, int Bits>
__global__ void __launch_bounds__(256, 1) int_linear_warpgroups_kernel(IntLinear a) {
    if constexpr (kHasWgmma) {
        using S = Warpgroups<T, Bits>;
        QNK_SHARED_MEMORY(memory);
        unsigned char* const tiles = memory + to_swizzle_boundary(memory);
        const int thread = static_cast<int>(threadIdx.x), g = thread % 32 / 4, t = thread % 4;
        const TileOf tile(blockIdx.x, (a.m + S::kRows - 1) / S::kRows, (a.n + S::kOutputs - 1) / S::kOutputs);
        const int64_t block_row = tile.row * S::kRows, row_bytes = a.k * Bits / 8;
        const int64_t out = tile.output * S::kOutputs + thread / 32 * 16 + g;  // and out + 8
        const int steps = static_cast<int>((a.k + S::kColumns - 1) / S::kColumns);
        const int whole = static_cast<int>(a.k / S::kColumns);  // without the last one where it is cut
        const int first = static_cast<int>(blockIdx.y * a.turns), last = min(first + static_cast<int>(a.turns), steps);

        // A warp copies a row of a tile at a time, two columns a lane, and every eighth row. Rows that do not exist are
        // left as they are and not written to y; outputs that do not exist are those of the last one.
        const int warp = thread / 32, pair = thread % 32;
        const int copied = static_cast<int>(min((a.m - block_row - warp + 7) / 8, int64_t{S::kRows / 8}));
        const T* x_from = static_cast<const T*>(a.x) + (block_row + warp) * a.k + first * S::kColumns + 2 * pair;
        const uint32_t apart = static_cast<uint32_t>(8 * a.k);
        const int x_to = tile_offset(warp, pair % 8) + pair / 8 * 4;
        const auto load_x = [&](int step, int slot) {
            if (step < last) {
                const int bytes = step < whole || 2 * pair < static_cast<int>(a.k % S::kColumns) ? 4 : 0;
                unsigned char* const to = tiles + slot * S::kTile + x_to;
                if (copied == S::kRows / 8) {
#pragma unroll
                    for (uint32_t i = 0; i < S::kRows / 8; ++i)
                        cp_async_4(to + i * kSwizzleBytes, x_from + static_cast<uint64_t>(i) * apart, bytes);
                } else {
#pragma unroll 1
                    for (int i = 0; i < copied; ++i)
                        cp_async_4(to + i * kSwizzleBytes, x_from + static_cast<uint64_t>(i) * apart, bytes);
                }
                x_from += S::kColumns;
            }
            cp_async_commit();
        };

        const auto codes_of = [&](int64_t output) {
            return a.weight + min(output, a.n - 1) * row_bytes + (static_cast<int64_t>(first) * 4 + t) * S::kLoad;
        };
        const uint8_t* codes_from[2] = {codes_of(out), codes_of(out + 8)};
        LaneCodes<S::kWords> codes, next_codes;
        const auto load_codes = [&](int step, LaneCodes<S::kWords>& to) {
            if (step >= last) return;
            const bool inside = step < whole || t * 16 < static_cast<int>(a.k % S::kColumns);
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                to.load(row, inside ? codes_from[row] : a.weight);
                codes_from[row] += 4 * S::kLoad;
            }
            if (step + S::kPrefetch < min(last, whole)) {
                prefetch_l2(codes_from[0] + (S::kPrefetch - 1) * 4 * S::kLoad);
                prefetch_l2(codes_from[1] + (S::kPrefetch - 1) * 4 * S::kLoad);
            }
        };

        const int group_steps = a.groups == 1 ? steps : static_cast<int>(a.k / a.groups) / S::kColumns;
        int64_t group = first / group_steps;
        int steps_left = group_steps - first % group_steps;
        const auto zeros_of = [&](int64_t of_group) {  // a byte for each of the two outputs
            return zero_at(a, parameter_index(a, out, of_group), Bits) |
                   zero_at(a, parameter_index(a, out + 8, of_group), Bits) << 8;
        };
        uint32_t zeros = zeros_of(group), next_zeros = zeros_of(min(group + 1, a.groups - 1));
        float scale[2];
        const auto load_scale = [&] {
            scale[0] = a.scale[parameter_index(a, out, group)];
            scale[1] = a.scale[parameter_index(a, out + 8, group)];
        };
        load_scale();

        float total[S::kRows / 2] = {};
        uint32_t weight[2][2][4];  // the operand: of two groups of products, for two products each
        load_codes(first, codes);
        constexpr int kAhead = 3;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) load_x(first + i, i);
        cp_async_wait<kAhead - 1>();
        fence_async_shared();
        load_codes(first + 1, next_codes);
        __syncthreads();
        const Turns turns;
        turns.start();
        int slot = 0;
        for (int step = first; step < last;) {
            // the second warpgroup starts with half of them, so that one adds up while the other multiplies
            const int most = step == first && thread >= 128 ? S::kInSum / 2 : S::kInSum;
            const int stop = min(step + min(steps_left, most), last);
            steps_left -= stop - step;
            float sum[S::kRows / 2] = {};
            wgmma_fence(sum);
            for (; step < stop; ++step) {
                const uint32_t from = shared_address(tiles) + static_cast<uint32_t>(slot * S::kTile);
                const uint64_t operand = wgmma_swizzled_operand(from);
#pragma unroll
                for (int unit = 0; unit < 2; ++unit) {
#pragma unroll
                    for (int row = 0; row < 2; ++row) {
                        uint32_t of_unit[Bits / 4], level[4];
#pragma unroll
                        for (int w = 0; w < Bits / 4; ++w) of_unit[w] = codes.word[row][unit * (Bits / 4) + w];
                        const Decoder<T, Bits> decode(zeros, row);
                        decode(of_unit, level);
                        in_order<Bits>(level);
#pragma unroll
                        for (int i = 0; i < 4; ++i) weight[unit][i / 2][row + i % 2 * 2] = level[i];
                    }
                    if (unit == 1) {
                        // the other warpgroup multiplies the next step only after this turn
                        codes = next_codes;
                        cp_async_wait<1>();
                        fence_async_shared();
                        load_codes(step + 2, next_codes);
                    }
                    wgmma_fence(weight[unit]);
                    turns.wait();
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        wgmma_m64k16<T>(sum, weight[unit][i], operand + static_cast<uint64_t>(2 * unit + i) * kNextK);
                    wgmma_commit();
                    wgmma_wait<1>();  // of the other operand
                    turns.pass();
                }
                // before this turn the products of the step before were complete in both warpgroups
                load_x(step + 3, (slot + 3) % S::kTiles);
                slot = (slot + 1) % S::kTiles;
            }
            wgmma_wait<0>();
            wgmma_results(sum);
#pragma unroll
            for (int i = 0; i < S::kRows / 2; ++i) total[i] = __fmaf_rn(sum[i], scale[i / 2 % 2], total[i]);
            if (steps_left == 0) {
                ++group;
                steps_left = group_steps;
                zeros = next_zeros;
                if (step < last) {
                    next_zeros = zeros_of(min(group + 1, a.groups - 1));
                    load_scale();
                }
            }
        }
        turns.finish();
#pragma unroll
        for (int i = 0; i < S::kRows / 2; ++i) {
            const int64_t row = block_row + i / 4 * 8 + 2 * t + i % 2, output = out + i / 2 % 2 * 8;
            if (row < a.m && output < a.n) store_sum<T>(a, blockIdx.y, row, output, total[i]);
        }
    }
}

}  // namespace qnk
