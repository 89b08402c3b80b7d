// y = x @ ((q - z) * s)^T for up to 16 rows of x, which wait for the weight to arrive.
//
// A block: 16 * Tiles outputs. Its warps take turns at runs of Run * 64 bytes of the rows of the weight, 16 bytes of a
// row a lane and step; their sums are added at the end. Codes go from memory straight into registers, those of the next
// turn while this one is multiplied; codes are the first operand of the tensor cores (16 outputs), so that decoded words
// are where they have to be, and rows of x the second (8 of them).
#pragma once

#include "cuda/int_linear.h"

namespace qnk {

template <typename T, int Bits, int Octets, int Tiles, int Run, int Warps>
struct Few {
    static constexpr int kThreads = 32 * Warps, kOutputs = 16 * Tiles, kRows = 8 * Octets;
    static constexpr int kColumns = 128 / Bits;    // of a lane in a step: 16 bytes of codes
    static constexpr int kStep = 4 * kColumns;     // columns; a group is whole steps
    static constexpr int kUnits = kColumns / 8;    // of 8 columns of a lane
    static constexpr int kTurn = Run * kStep;      // columns
    static constexpr int kShared = Warps * kRows * kOutputs * 4;
    static constexpr int kBlocks = sizeof(T) == 4 || Octets == 2 ? 1 : 512 / kThreads;  // of a multiprocessor
};

// Grouped: each step has its own scale and zero point; otherwise there is one of each output.
template <typename T, int Bits, int Octets, int Tiles, int Run, int Warps, bool Grouped>
__global__ void __launch_bounds__(32 * Warps, Few<T, Bits, Octets, Tiles, Run, Warps>::kBlocks)
    int_linear_few_kernel(IntLinear a) {
    using F = Few<T, Bits, Octets, Tiles, Run, Warps>;
    using E = typename OperandOf<T>::type;
    constexpr int kPieces = OperandOf<T>::pieces, kParameters = Grouped ? Run : 1;
    QNK_SHARED_MEMORY(memory);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const int64_t first_out = static_cast<int64_t>(blockIdx.x) * F::kOutputs, row_bytes = a.k * Bits / 8;
    const int64_t turns = (a.k + F::kTurn - 1) / F::kTurn, per_part = a.turns * Warps;
    const int64_t last = min((blockIdx.y + 1) * per_part, turns);
    const float groups_of_step = Grouped ? static_cast<float>(a.groups * F::kStep) / static_cast<float>(a.k) : 0.0f;

    // of outputs 8i + g; those past the last one repeat it
    const uint8_t* row_of[2 * Tiles];
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) row_of[i] = a.weight + min(first_out + 8 * i + g, a.n - 1) * row_bytes + t * 16;

    struct Ahead {
        uint4 codes[Run][2 * Tiles];
        float scale[kParameters][2 * Tiles];
        uint32_t zero[kParameters][2 * Tiles];
    };
    const auto load_parameters = [&](Ahead& to, int u, int64_t step) {
        // half a step from an integer at least, so that its roundings do no harm to the 2^20 steps there may be
        const int group = static_cast<int>((static_cast<float>(step) + 0.5f) * groups_of_step);
        const int existing = min(group, static_cast<int>(a.groups) - 1);  // a run may be longer than the row
#pragma unroll
        for (int i = 0; i < 2 * Tiles; ++i) {
            const uint32_t index = parameter_index(a, first_out + 8 * i + g, existing);
            to.scale[u][i] = a.scale[index];
            to.zero[u][i] = zero_at(a, index, Bits);
        }
    };
    const auto load = [&](Ahead& to, int64_t turn) {
        if (turn >= last) return;
#pragma unroll
        for (int u = 0; u < Run; ++u) {
            const int64_t step = turn * Run + u, byte = step * 64;
            const bool inside = byte + t * 16 < row_bytes;
#pragma unroll
            for (int i = 0; i < 2 * Tiles; ++i)
                to.codes[u][i] = inside ? load_once_16(row_of[i] + byte) : uint4{0, 0, 0, 0};
            if (Grouped) load_parameters(to, u, step);
        }
    };

    Ahead next;
    int64_t turn = blockIdx.y * per_part + warp;
    if (!Grouped) load_parameters(next, 0, 0);
    load(next, turn);
    float total[Tiles][Octets][4] = {};
    for (; turn < last; turn += Warps) {
        const Ahead now = next;
        load(next, turn + Warps);
#pragma unroll
        for (int u = 0; u < Run; ++u) {
            const int64_t column = (turn * Run + u) * F::kStep + t * F::kColumns;
            const int p = Grouped ? u : 0;
            float sum[Tiles][Octets][4] = {};
#pragma unroll
            for (int unit = 0; unit < F::kUnits; ++unit) {
                uint32_t value[Octets][kPieces][4] = {};
#pragma unroll
                for (int octet = 0; octet < Octets; ++octet) {
                    const int row = 8 * octet + g;
                    if (row >= a.m || column + unit * 8 >= a.k) continue;
                    const T* from = static_cast<const T*>(a.x) + row * a.k + column + unit * 8;
                    if constexpr (kPieces == 1)
                        load_values<Bits, false>(from, value[octet]);
                    else
                        load_values<Bits, false>(reinterpret_cast<const float4*>(from),
                                                 reinterpret_cast<const float4*>(from) + 1, value[octet]);
                }
#pragma unroll
                for (int tile = 0; tile < Tiles; ++tile) {
                    uint32_t level[2][4];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const uint4 codes = now.codes[u][2 * tile + h];
                        const uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
                        uint32_t of_unit[Bits / 4];
#pragma unroll
                        for (int w = 0; w < Bits / 4; ++w) of_unit[w] = word[unit * (Bits / 4) + w];
                        Decoder<E, Bits>(now.zero[p][2 * tile + h], 0)(of_unit, level[h]);
                    }
#pragma unroll
                    for (int octet = 0; octet < Octets; ++octet)
#pragma unroll
                        for (int piece = kPieces - 1; piece >= 0; --piece)
#pragma unroll
                            for (int half = 0; half < 4; half += 2)
                                mma_m16n8k16<E>(
                                    sum[tile][octet],
                                    {level[0][half], level[1][half], level[0][half + 1], level[1][half + 1]},
                                    {value[octet][piece][half], value[octet][piece][half + 1]});
                }
            }
#pragma unroll
            for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
                for (int octet = 0; octet < Octets; ++octet)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        total[tile][octet][j] =
                            __fmaf_rn(sum[tile][octet][j], now.scale[p][2 * tile + j / 2], total[tile][octet][j]);
        }
    }

    float* const sums = reinterpret_cast<float*>(memory);  // [warp][row][output]
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
        for (int octet = 0; octet < Octets; ++octet)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = 8 * octet + 2 * t + j % 2, output = 16 * tile + 8 * (j / 2) + g;
                sums[(warp * F::kRows + row) * F::kOutputs + output] = total[tile][octet][j];
            }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < F::kRows * F::kOutputs; i += F::kThreads) {
        const int64_t row = i / F::kOutputs, out = first_out + i % F::kOutputs;
        if (row >= a.m || out >= a.n) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < Warps; ++w) sum += sums[w * (F::kRows * F::kOutputs) + i];
        store_sum<T>(a, blockIdx.y, row, out, sum);
    }
}

}  // namespace qnk
