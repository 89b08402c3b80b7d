// y = x @ ((q - z) * s)^T for up to 16 rows of x, which wait for the weight to arrive.
//
// A block: 8 * Tiles outputs. Its warps take turns at chunks of 64 bytes of the rows of the weight, 16 bytes of a row a
// lane, and at the columns of x that belong to them; their sums are added at the end. All of it arrives by asynchronous
// copies in a ring of stages in shared memory, in which each lane reads only what it has copied itself: no barrier, and
// as many bytes on their way as the ring holds. Products on tensor cores: x is the first operand, 8 outputs the second.
#pragma once

#include "cuda/int_linear.h"

namespace qnk {

template <typename T, int Bits, int Rows, int Tiles>
struct Few {
    static constexpr int kWarps = Rows == 16 ? 4 : 8, kThreads = 32 * kWarps;
    static constexpr int kColumns = 128 / Bits;      // of a lane in a chunk: 16 bytes of codes
    static constexpr int kChunk = 4 * kColumns;      // columns; a group is whole chunks
    static constexpr int kUnits = kColumns / 8;      // of 8 columns of a lane
    static constexpr int kPerUnit = sizeof(T) / 2;   // 16-byte slots of x
    static constexpr int kSlots = Tiles + Rows / 8 * kUnits * kPerUnit;
    static constexpr int kStage = kSlots * kThreads * 16;  // bytes
    static constexpr int kRing = 96 * 1024 / kStage, kStages = kRing < 4 ? kRing : 4;
    static constexpr int kShared = kStages * kStage;
    static constexpr int kBlocks = sizeof(T) == 4 ? 1 : 2;  // of a multiprocessor; fp32 takes more registers
    static_assert(kStages >= 2 && kShared >= kWarps * Rows * 8 * Tiles * 4);
};

// Rows of x: 8 or 16 are multiplied, of which m exist.
template <typename T, int Bits, int Rows, int Tiles>
__global__ void __launch_bounds__(Few<T, Bits, Rows, Tiles>::kThreads, Few<T, Bits, Rows, Tiles>::kBlocks)
    int_linear_few_kernel(IntLinear a) {
    using F = Few<T, Bits, Rows, Tiles>;
    using E = typename OperandOf<T>::type;
    constexpr int kPieces = OperandOf<T>::pieces;
    QNK_SHARED_MEMORY(memory);
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int g = lane / 4, t = lane % 4;
    const int64_t first_out = static_cast<int64_t>(blockIdx.x) * (8 * Tiles), row_bytes = a.k * Bits / 8;
    const T* const x = static_cast<const T*>(a.x);
    const int64_t chunks = (a.k + F::kChunk - 1) / F::kChunk, per_part = a.turns * F::kWarps;
    const int64_t first = blockIdx.y * per_part, last = min(first + per_part, chunks);
    const auto slot = [&](int stage, int i) { return memory + stage * F::kStage + (i * F::kThreads + thread) * 16; };

    const auto load = [&](int stage, int64_t chunk) {
        const int64_t byte = chunk * 64 + t * 16, column = chunk * F::kChunk + t * F::kColumns;
        const bool inside = chunk < last && byte < row_bytes;
#pragma unroll
        for (int i = 0; i < Tiles; ++i) {
            const int64_t row = first_out + 8 * i + g;
            const bool exists = inside && row < a.n;
            cp_async_16(slot(stage, i), a.weight + (exists ? row * row_bytes + byte : 0), exists ? 16 : 0);
        }
#pragma unroll
        for (int rows = 0; rows < Rows / 8; ++rows) {
            const int row = 8 * rows + g;
            const bool exists = inside && row < a.m;
            const T* from = x + (exists ? row * a.k + column : 0);
#pragma unroll
            for (int i = 0; i < F::kUnits * F::kPerUnit; ++i)
                cp_async_16(slot(stage, Tiles + rows * F::kUnits * F::kPerUnit + i),
                            from + (exists ? i * 16 / sizeof(T) : 0), exists ? 16 : 0);
        }
        cp_async_commit();
    };

    int64_t chunk = first + warp;
#pragma unroll
    for (int stage = 0; stage < F::kStages - 1; ++stage) load(stage, chunk + stage * F::kWarps);
    float total[Tiles][4] = {};
    const int64_t group_chunks = a.groups == 1 ? chunks : a.k / a.groups / F::kChunk;
    for (int stage = 0; chunk < last; chunk += F::kWarps) {
        const int64_t group = chunk / group_chunks;
        uint32_t zeros[(Tiles + 3) / 4] = {};  // a byte for each tile
        float scale[Tiles][2];
#pragma unroll
        for (int i = 0; i < Tiles; ++i) {  // asked for before the wait, so that they arrive with the codes
            const int64_t out = first_out + 8 * i;
            zeros[i / 4] |= zero_at(a, parameter_index(a, out + g, group), Bits) << (i % 4 * 8);
            scale[i][0] = a.scale[parameter_index(a, out + 2 * t, group)];
            scale[i][1] = a.scale[parameter_index(a, out + 2 * t + 1, group)];
        }
        cp_async_wait<F::kStages - 2>();
        load((stage + F::kStages - 1) % F::kStages, chunk + (F::kStages - 1) * F::kWarps);
        uint4 codes[Tiles];
#pragma unroll
        for (int i = 0; i < Tiles; ++i) codes[i] = *reinterpret_cast<const uint4*>(slot(stage, i));
        float sum[Tiles][4] = {};
#pragma unroll
        for (int unit = 0; unit < F::kUnits; ++unit) {
            uint32_t value[2][kPieces][4] = {};
#pragma unroll
            for (int rows = 0; rows < Rows / 8; ++rows) {
                const int at = Tiles + (rows * F::kUnits + unit) * F::kPerUnit;
                if constexpr (kPieces == 1)
                    load_values<Bits, false>(reinterpret_cast<const T*>(slot(stage, at)), value[rows]);
                else
                    load_values<Bits, false>(reinterpret_cast<const float4*>(slot(stage, at)),
                                             reinterpret_cast<const float4*>(slot(stage, at + 1)), value[rows]);
            }
#pragma unroll
            for (int i = 0; i < Tiles; ++i) {
                const uint32_t word[4] = {codes[i].x, codes[i].y, codes[i].z, codes[i].w};
                uint32_t of_unit[Bits / 4], level[4];
#pragma unroll
                for (int w = 0; w < Bits / 4; ++w) of_unit[w] = word[unit * (Bits / 4) + w];
                const Decoder<E, Bits> decode(zeros[i / 4], i % 4);
                decode(of_unit, level);
#pragma unroll
                for (int piece = kPieces - 1; piece >= 0; --piece)
#pragma unroll
                    for (int half = 0; half < 4; half += 2)
                        mma_m16n8k16<E>(sum[i],
                                        {value[0][piece][half], value[1][piece][half], value[0][piece][half + 1],
                                         value[1][piece][half + 1]},
                                        {level[half], level[half + 1]});
            }
        }
#pragma unroll
        for (int i = 0; i < Tiles; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) total[i][j] = __fmaf_rn(sum[i][j], scale[i][j % 2], total[i][j]);
        stage = stage + 1 == F::kStages ? 0 : stage + 1;
    }

    cp_async_wait<0>();
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(memory);  // [warp][row][output]
#pragma unroll
    for (int i = 0; i < Tiles; ++i)
#pragma unroll
        for (int j = 0; j < Rows / 4; ++j)
            sums[(warp * Rows + g + j / 2 * 8) * (8 * Tiles) + 8 * i + 2 * t + j % 2] = total[i][j];
    __syncthreads();
    for (int i = thread; i < Rows * 8 * Tiles; i += F::kThreads) {
        const int64_t row = i / (8 * Tiles), out = first_out + i % (8 * Tiles);
        if (row >= a.m || out >= a.n) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < F::kWarps; ++w) sum += sums[w * (Rows * 8 * Tiles) + i];
        store_sum<T>(a, blockIdx.y, row, out, sum);
    }
}

}  // namespace qnk
