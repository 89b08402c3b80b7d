// pq_linear for many tokens, and its gradient of x, in bf16 or f16: tiles of tensor-core products over codewords that
// go from the table into the registers of the product, while x (or grad) comes through a pipeline of copies.
//
// Both have one form: y [m, width] = x [m, depth] @ B, with B = W^T and depth the columns of W, or B = W and depth
// its outputs. A step is 32 of the depth; a stage of the pipeline holds it for all tokens of the tile, so that the
// octets of a warp's 32 lanes are 512 bytes in a row: no two lanes need the same banks.
//
// Of a warp and 16 of the depth: 16 R rows of 32 bytes of codewords, 8 Tiles tokens of 32 bytes, and R * Tiles
// products of 2 cycles on A100 (1.6 on H100, as far as mma.sync goes). R = 4, Tiles = 8: 32 cycles of shared memory,
// 64 (50) of products. R = 2, Tiles = 4: 16 and 16 (13). 8192x8192, 256 tokens on H100: 34 GFLOP, 35 us at the dense
// peak, of which mma.sync reaches 60 %: 58 us predicted. 32 tokens: 8.2 us of shared memory, 12 us predicted with the
// parts of the sums. Large: 202 to 234 registers, two blocks a multiprocessor; 33 KiB of stages, 33 KiB for d = 8, K
// = 256. Small: 78 to 92 registers, 8 KiB of stages, five blocks.
#include "cuda/pq_fragments.cuh"

namespace qnk {
namespace {

constexpr int kThreads = 128, kStages = 4;
constexpr int kMinSteps = 8;  // of a split

// A block has Wide * Long warps with R * 16 of the width and Tiles * 8 tokens each.
template <int R_, int Tiles_, int Wide_, int Long_>
struct Shape {
    static constexpr int R = R_, Tiles = Tiles_, Wide = Wide_, Long = Long_;
    static constexpr int kWidth = 16 * R * Wide, kTokens = 8 * Tiles * Long;
    static constexpr int kStageBytes = kTokens * 64;
};
using Small = Shape<2, 4, 4, 1>;  // 128 wide, 32 tokens
using Large = Shape<4, 8, 2, 2>;  // 128 wide, 128 tokens
constexpr int kSmallTokens = 64;

template <typename T, typename Code, int Width, bool InShared, typename S, bool Transposed>
__global__ void __launch_bounds__(kThreads)
    pq_linear_tiles_kernel(const T* __restrict__ x, PqWeight w, CodewordTable table, PqOutput out, int m) {
    constexpr int kRun = 2 * S::R;
    QNK_SHARED_MEMORY(shared);
    unsigned char* stages = shared + (table.bytes + 127) / 128 * 128;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_wide = warp % S::Wide, warp_long = warp / S::Wide;
    const int depth = Transposed ? w.n : w.columns(), width = Transposed ? w.columns() : w.n;
    const unsigned tiles_wide = (width + S::kWidth - 1) / S::kWidth;
    const int pieces = w.d / Width, all_steps = (depth + 31) / 32;
    const int first_step = static_cast<int>(static_cast<int64_t>(all_steps) * blockIdx.y / gridDim.y);
    const int last_step = static_cast<int>(static_cast<int64_t>(all_steps) * (blockIdx.y + 1) / gridDim.y);
    // of this thread's run of the width
    const int first = static_cast<int>(blockIdx.x % tiles_wide) * S::kWidth + (warp_wide * 8 + g) * kRun;
    const int64_t first_token = static_cast<int64_t>(blockIdx.x / tiles_wide) * S::kTokens;

    const auto stage = [&](int step) {
        if (step < last_step) {
            auto* to = reinterpret_cast<PqWords<4>*>(stages + step % kStages * S::kStageBytes);
            for (int i = threadIdx.x; i < S::kTokens * 4; i += kThreads) {
                const int64_t token = first_token + i / 4;
                stage_octet(to + i, x, token, token < m, step * 32 + i % 4 * 8, depth);
            }
        }
        cp_async_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) stage(first_step + i);

    // W^T: the octet moves with the steps, the outputs stay. W: the other way round.
    const OctetPlace<Width> by(4, pieces);
    OctetPlace<Width> place(Transposed ? first / 8 : first_step * 4 + t, pieces);
    OctetCodes<Code, Width, Transposed ? 8 : kRun> codes, next;
    next.load(w, place, Transposed ? first_step * 32 + t * 8 : first);
    Codewords<Width, InShared>::fill(w, table, shared);
    const Codewords<Width, InShared> codewords(w, table, shared);
    PqSumsOfWarp<S::R, S::Tiles> sums;
    for (int step = first_step; step < last_step; ++step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // this step has come, and all have left the one before it, whose place is next
        stage(step + kStages - 1);
        codes = next;
        const auto* octets = reinterpret_cast<const PqWords<4>*>(stages + step % kStages * S::kStageBytes) +
                             warp_long * S::Tiles * 32 + lane;
        PqWords<4> tokens[S::Tiles];
#pragma unroll
        for (int tile = 0; tile < S::Tiles; ++tile) tokens[tile] = octets[tile * 32];
        if constexpr (Transposed) {
            next.load(w, place, (step + 1) * 32 + t * 8);
            multiply_transposed<T>(sums, codewords, codes, place, w.blocks, w.n - step * 32 - t * 8, tokens);
        } else {
            OctetPlace<Width> now = place;
            place.advance(by, pieces);
            next.load(w, place, first);
            multiply<T>(sums, codewords, codes, now, w.blocks, tokens);
        }
    }
    cp_async_wait<0>();

#pragma unroll
    for (int tile = 0; tile < S::Tiles; ++tile)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int64_t token = first_token + (warp_long * S::Tiles + tile) * 8 + 2 * t + odd;
            float run[kRun];
#pragma unroll
            for (int i = 0; i < kRun; ++i) run[i] = sums.at(i, tile, odd);
            write_run<T>(out, run, token, first, m, width, static_cast<int>(blockIdx.y));
        }
}

template <typename S, bool Transposed, typename T>
cudaError_t launch_tiles(const T* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream) {
    const int width = Transposed ? w.columns() : w.n, stage_bytes = kStages * S::kStageBytes + 128;
    const int64_t tiles =
        static_cast<int64_t>((width + S::kWidth - 1) / S::kWidth) * ((m + S::kTokens - 1) / S::kTokens);
    const dim3 grid(static_cast<unsigned>(tiles), out.splits);
    return by_layout(w, stage_bytes, [&](auto code, auto piece, auto in_shared, const CodewordTable& table) {
        return launch(pq_linear_tiles_kernel<T, decltype(code), piece, in_shared, S, Transposed>, grid, dim3(kThreads),
                      table.bytes + stage_bytes, stream, x, w, table, out, m);
    });
}

}  // namespace

int pq_tile_splits(int m, const PqWeight& w) {
    const bool small = m <= kSmallTokens;
    const int tokens = small ? Small::kTokens : Large::kTokens, programs = (small ? 2 : 1) * processors();
    const int64_t tiles = static_cast<int64_t>((w.n + 127) / 128) * ((m + tokens - 1) / tokens);
    const int64_t steps = (w.columns() + 31) / 32, most = programs / tiles;
    const int64_t splits = most < steps / kMinSteps ? most : steps / kMinSteps;
    return splits > 1 ? static_cast<int>(splits) : 1;
}

template <typename T>
cudaError_t pq_linear_tiles(const T* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream) {
    if (m <= kSmallTokens) return launch_tiles<Small, false>(x, w, out, m, stream);
    return launch_tiles<Large, false>(x, w, out, m, stream);
}

template <typename T>
cudaError_t pq_linear_grad_x(const T* grad, const PqWeight& w, T* grad_x, int m, cudaStream_t stream) {
    return launch_tiles<Large, true>(grad, w, PqOutput{grad_x, nullptr, nullptr, 1}, m, stream);
}

#define QNK_PQ_TILES(T)                                                                                      \
    template cudaError_t pq_linear_tiles(const T*, const PqWeight&, const PqOutput&, int, cudaStream_t);     \
    template cudaError_t pq_linear_grad_x(const T*, const PqWeight&, T*, int, cudaStream_t);
QNK_PQ_TILES(bf16)
QNK_PQ_TILES(f16)
#undef QNK_PQ_TILES

}  // namespace qnk
