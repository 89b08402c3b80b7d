// y = x @ ((q - z) * s)^T for up to 16 rows of x, which wait for the weight to arrive.
//
// A block: 16 * Tiles outputs. Its warps take turns at runs of Run * 64 bytes of the rows of the weight, 16 bytes of a
// row a lane and step; their sums are added at the end. Codes go from memory straight into registers, and what belongs
// to them of x by asynchronous copies into shared memory, where each lane reads only what it has copied itself: no
// barrier. They are asked for Run and kAheadX steps ahead, as soon as a step has freed their place. Codes are the first
// operand of the tensor cores (16 outputs), so that decoded words are where they have to be, and rows of x the second
// (8 of them).
#pragma once

#include "cuda/int_linear.h"

namespace qnk {

constexpr int few_ahead_of_x(int x_size, int octets) { return x_size == 4 && octets == 2 ? 2 : 4; }

// Bytes of shared memory of a block: x of the steps ahead or, at the end, the sums of all warps. x_size: bytes of an
// element of x; octets: of rows of x.
constexpr int few_shared(int x_size, int bits, int octets, int outputs, int warps) {
    const int pieces = octets * (16 / bits) * (x_size / 2);
    const int ring = few_ahead_of_x(x_size, octets) * pieces * warps * 32 * 16, sums = warps * octets * 8 * outputs * 4;
    return ring > sums ? ring : sums;
}

template <typename T, int Bits, int Octets, int Tiles, int Run, int Warps>
struct Few {
    static constexpr int kThreads = 32 * Warps, kOutputs = 16 * Tiles, kRows = 8 * Octets;
    static constexpr int kColumns = 128 / Bits;  // of a lane in a step: 16 bytes of codes
    static constexpr int kStep = 4 * kColumns;   // columns; a group is whole steps
    static constexpr int kUnits = kColumns / 8;  // of 8 columns of a lane
    static constexpr int kPerUnit = sizeof(T) / 2, kPieces = Octets * kUnits * kPerUnit;  // 16-byte pieces of x
    static constexpr int kAheadX = few_ahead_of_x(sizeof(T), Octets), kPhases = kAheadX / Run;
    static constexpr int kShared = few_shared(sizeof(T), Bits, Octets, kOutputs, Warps);
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
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int g = lane / 4, t = lane % 4;
    constexpr int kTurn = 64 * Run;  // bytes of a row
    const int row_bytes = static_cast<int>(a.k * Bits / 8), per_part = static_cast<int>(a.turns) * Warps * kTurn;
    const int first_byte = static_cast<int>(blockIdx.y) * per_part + warp * kTurn;
    const int end = min(static_cast<int>(blockIdx.y + 1) * per_part, row_bytes);
    const int64_t first_out = static_cast<int64_t>(blockIdx.x) * F::kOutputs;

    // Outputs 8i + g and rows of x 8i + g; past the last one it is repeated, and its sums are not written. A lane's 16
    // bytes of codes and what belongs to them of x are both inside the row or both not, and then x is 0.
    const uint8_t* codes_of[2 * Tiles];
    uint32_t parameters_of[2 * Tiles];
    const T* x_of[Octets];
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) {
        codes_of[i] = a.weight + min(first_out + 8 * i + g, a.n - 1) * row_bytes + first_byte + t * 16;
        parameters_of[i] = parameter_index(a, first_out + 8 * i + g, 0);
    }
#pragma unroll
    for (int i = 0; i < Octets; ++i)
        x_of[i] = static_cast<const T*>(a.x) + min(static_cast<int64_t>(8 * i + g), a.m - 1) * a.k +
                  (first_byte + t * 16) / 16 * F::kColumns;
    unsigned char* const ring = memory + thread * 16;
    const auto piece_at = [&](int place, int octet, int unit) {
        return ring + (place * F::kPieces + (octet * F::kUnits + unit) * F::kPerUnit) * (F::kThreads * 16);
    };

    uint4 codes[Run][2 * Tiles] = {};
    float scale[Run][2 * Tiles];  // of groups; one scale of an output waits for the end
    uint32_t zero[kParameters][2 * Tiles];
    int codes_byte = first_byte + t * 16, x_byte = codes_byte;  // of what is loaded next
    const float groups_of_step = Grouped ? static_cast<float>(a.groups * F::kStep) / static_cast<float>(a.k) : 0.0f;
    const auto load_parameters = [&](int u) {
        // half a step from an integer at least, so that its roundings do no harm to the 2^20 steps there may be
        const float step = static_cast<float>(codes_byte / 64 + u) + 0.5f;
        const uint32_t group = min(static_cast<int>(step * groups_of_step), static_cast<int>(a.groups) - 1);
#pragma unroll
        for (int i = 0; i < 2 * Tiles; ++i) {
            if (Grouped) scale[u][i] = a.scale[parameters_of[i] + group];
            zero[u][i] = zero_at(a, parameters_of[i] + group, Bits);
        }
    };
    const auto load_codes = [&](int u) {
        if (codes_byte + u * 64 >= end) return;
#pragma unroll
        for (int i = 0; i < 2 * Tiles; ++i) codes[u][i] = load_once_16(codes_of[i] + u * 64);
        if (Grouped) load_parameters(u);
    };
    const auto advance_codes = [&] {
#pragma unroll
        for (int i = 0; i < 2 * Tiles; ++i) codes_of[i] += Warps * kTurn;
        codes_byte += Warps * kTurn;
    };
    const auto load_x = [&](int place, int u) {
        const int bytes = x_byte + u * 64 < end ? 16 : 0;
#pragma unroll
        for (int octet = 0; octet < Octets; ++octet)
#pragma unroll
            for (int i = 0; i < F::kUnits * F::kPerUnit; ++i)
                cp_async_16(piece_at(place, octet, 0) + i * (F::kThreads * 16),
                            x_of[octet] + u * F::kStep + i * (16 / static_cast<int>(sizeof(T))), bytes);
        cp_async_commit();
    };
    const auto advance_x = [&] {
#pragma unroll
        for (int i = 0; i < Octets; ++i) x_of[i] += Warps * Run * F::kStep;
        x_byte += Warps * kTurn;
    };

    if (!Grouped) load_parameters(0);
#pragma unroll
    for (int u = 0; u < Run; ++u) load_codes(u);
    advance_codes();
#pragma unroll
    for (int phase = 0; phase < F::kPhases; ++phase) {
#pragma unroll
        for (int u = 0; u < Run; ++u) load_x(phase * Run + u, u);
        advance_x();
    }
    float total[Tiles][Octets][4] = {};
    int phase = 0;
    for (int byte = first_byte; byte < end; byte += Warps * kTurn) {
#pragma unroll
        for (int u = 0; u < Run; ++u) {
            if (byte + u * 64 >= end) break;  // and it keeps the steps apart, for which there are not registers enough
            const int p = Grouped ? u : 0;
            uint4 now[2 * Tiles];
            float factor[2 * Tiles];
            uint32_t zero_now[2 * Tiles];
#pragma unroll
            for (int i = 0; i < 2 * Tiles; ++i) {
                now[i] = codes[u][i], zero_now[i] = zero[p][i];
                if (Grouped) factor[i] = scale[u][i];
            }
            load_codes(u);
            cp_async_wait<F::kAheadX - 1>();
            float sum[Tiles][Octets][4] = {};
#pragma unroll
            for (int unit = 0; unit < F::kUnits; ++unit) {
                uint32_t value[Octets][kPieces][4];
#pragma unroll
                for (int octet = 0; octet < Octets; ++octet) {
                    const unsigned char* const from = piece_at(phase * Run + u, octet, unit);
                    if constexpr (kPieces == 1)
                        load_values<Bits, false>(reinterpret_cast<const T*>(from), value[octet]);
                    else
                        load_values<Bits, false>(reinterpret_cast<const float4*>(from),
                                                 reinterpret_cast<const float4*>(from + F::kThreads * 16),
                                                 value[octet]);
                }
#pragma unroll
                for (int tile = 0; tile < Tiles; ++tile) {
                    uint32_t level[2][4];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const uint4& four = now[2 * tile + h];
                        const uint32_t word[4] = {four.x, four.y, four.z, four.w};
                        uint32_t of_unit[Bits / 4];
#pragma unroll
                        for (int w = 0; w < Bits / 4; ++w) of_unit[w] = word[unit * (Bits / 4) + w];
                        Decoder<E, Bits>(zero_now[2 * tile + h], 0)(of_unit, level[h]);
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
            load_x(phase * Run + u, u);  // the products have what was there
#pragma unroll
            for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
                for (int octet = 0; octet < Octets; ++octet)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        total[tile][octet][j] = Grouped ? __fmaf_rn(sum[tile][octet][j], factor[2 * tile + j / 2],
                                                                    total[tile][octet][j])
                                                        : total[tile][octet][j] + sum[tile][octet][j];
        }
        advance_codes();
        advance_x();
        phase = phase + 1 == F::kPhases ? 0 : phase + 1;
    }

    cp_async_wait<0>();
    __syncthreads();  // all have read their x, whose place the sums take
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
    for (int i = thread; i < F::kRows * F::kOutputs; i += F::kThreads) {
        const int64_t row = i / F::kOutputs, out = first_out + i % F::kOutputs;
        if (row >= a.m || out >= a.n) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < Warps; ++w) sum += sums[w * (F::kRows * F::kOutputs) + i];
        store_sum<T>(a, blockIdx.y, row, out, Grouped ? sum : sum * a.scale[out]);
    }
}

}  // namespace qnk
