// pq_linear for many tokens, and its gradient of x, in bf16 or f16 on sm_90a: wgmma with codewords that go from the
// table into the registers of A, while x (or grad) comes into shared memory, as B, through a pipeline of copies.
//
// Both are y^T [width, m] = A [width, depth] @ x^T, with A = W and depth the columns of W, or A = W^T and depth its
// outputs. The order of k is that of x, so that the tiles of x are plain copies; the order of the rows of A is free:
// a thread's four rows, two of each m64 product, are a run of adjacent ones. For W it reads 4 bytes of a codeword at a
// time, its neighbours the rest of 16 (8): as many cycles of shared memory as with long loads, and 4 times as many
// instructions. For W^T it reads 8 bytes, its four rows, of each of the four outputs of its registers. (In the order of
// k that gives a thread whole codewords, x would be permuted in pieces of 4 bytes: with 4-byte copies 64 instructions
// of a warp for 32 of k instead of 16, each with an address, or in another pass, 50 us of 4096 tokens.)
//
// A block: 256 of the width and 128 tokens, two warpgroups with two m64n128 products each; a step is 64 of the depth.
// Of a step, in cycles of an SM: tensor cores 1024 (2048 products a cycle). Shared memory: 512 for tiles of x, which
// each product reads, 256 for codewords, 128 for copies, 64 for codes through the L1: 960. Instructions: 350 of each
// warp, two warps a scheduler: 700. The decoding of one half of a step runs beside the products of the other, by count;
// measured on an H200 (8192x8192, 256 tokens) are 2000 to 2130 cycles a step and 78 us, tensor cores 46 % and issue
// slots 33 % busy. Warpgroups that take turns with the tensor cores, as those of int_linear do, took 10 to 15 % longer.
// Predicted for 8192x8192, d = 8, K = 256 on H100 (989 TFLOPS of bf16, of which 70 % are expected, since shared memory
// is as busy as the tensor cores): 128 tokens: 4 parts, 25 us and 7 us for adding parts; 256: 2 parts, 50 + 5 us;
// 4096: 790 us (mma.sync, at 60 %: 29, 58, 930). Registers: 220 to 241, so 8 warps an SM; 97 KiB of shared memory with
// d = 8 and K = 256: 64 of stages, 33 of codewords; W^T: 130 KiB.
#include "cuda/pq_fragments.cuh"
#include "cuda/pq_rows.cuh"
#include "cuda/wgmma.h"

namespace qnk {
namespace {

constexpr int kThreads = 256, kTokens = 128, kRun = kRowsOfThread, kWidth = 64 * kRun;
constexpr int kStages = 4, kAhead = 2;  // a tile is copied two steps ahead, while products may still read one
constexpr int kStageBytes = kTokens * 128;
constexpr int kOtherBytes = kStages * kStageBytes + static_cast<int>(kSwizzleBytes);  // beside the codewords
constexpr int kMinSteps = 8;                                                          // of a split

// Copies of the tiles of x: a thread has one chunk of 8 values of four tokens. Tokens past the end repeat the last one:
// sums of theirs are not written.
template <typename T>
class TileCopies {
  public:
    __device__ TileCopies(const T* x, int64_t first_token, int m, int length, unsigned char* stages)
        : length_(length), first_(static_cast<int>(threadIdx.x) % 8 * 8) {
        const int row = static_cast<int>(threadIdx.x) / 8;
        to_ = stages + tile_offset(row, first_ / 8);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int64_t token = first_token + row + i * kApart;
            from_[i] = x + (token < m ? token : m - 1) * length + first_;
        }
    }

    __device__ __forceinline__ void start(int step) const {
        const int bytes = step * 64 + first_ < length_ ? 16 : 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            cp_async_16(to_ + step % kStages * kStageBytes + i * kApart * 128, from_[i] + step * 64, bytes);
    }

  private:
    static constexpr int kApart = kThreads / 8, kRows = kTokens / kApart;
    const T* from_[kRows];
    unsigned char* to_;
    int length_, first_;
};

template <typename T, typename Code, int Width, bool Transposed>
__global__ void __launch_bounds__(kThreads)
    pq_linear_wgmma_kernel(const T* __restrict__ x, PqWeight w, CodewordTable table, PqOutput out, int m) {
    if constexpr (kHasWgmma) {
        QNK_SHARED_MEMORY(shared);
        unsigned char* const stages = shared + to_swizzle_boundary(shared);
        unsigned char* const words = stages + kStages * kStageBytes;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const int depth = Transposed ? w.n : w.columns(), width = Transposed ? w.columns() : w.n;
        const unsigned tiles_wide = (width + kWidth - 1) / kWidth;
        const int all_steps = (depth + 63) / 64;
        const int first_step = static_cast<int>(static_cast<int64_t>(all_steps) * blockIdx.y / gridDim.y);
        const int last_step = static_cast<int>(static_cast<int64_t>(all_steps) * (blockIdx.y + 1) / gridDim.y);
        // of this thread's run of the width
        const int first = static_cast<int>(blockIdx.x % tiles_wide) * kWidth + (warp * 8 + g) * kRun;
        const int64_t first_token = static_cast<int64_t>(blockIdx.x / tiles_wide) * kTokens;

        const TileCopies<T> copies(x, first_token, m, depth, stages);
        const auto stage = [&](int step) {
            if (step < last_step) copies.start(step);
            cp_async_commit();
        };
        for (int i = 0; i < kAhead; ++i) stage(first_step + i);

        using Rows = std::conditional_t<Transposed, RowsOfColumns<Code>, RowsOfOutputs<Code, Width>>;
        Rows rows(w, first, first_step, t);
        rows.load_codes(first_step);
        Codewords<Width, true>::fill(w, table, words);
        // lanes that read different words of one piece share its copy
        const Codewords<Width, true> codewords(w, table, words, Transposed ? lane : lane / (Width / 2));
        rows.next_step();
        __syncthreads();  // the table is there
        HalfStep a[2];
        rows.template decode<0>(a[0], codewords);
        float d[2][kTokens / 2] = {};
        wgmma_fence(d);
        const uint64_t tiles = wgmma_swizzled_operand(shared_address(stages));
        const auto multiply = [&](HalfStep& half, uint64_t tile) {
            wgmma_fence(half);
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int r = 0; r < 2; ++r) wgmma_m64k16<T>(d[r], half[k][r], tile + k * kNextK);
            wgmma_commit();
        };
        for (int step = first_step; step < last_step; ++step) {
            cp_async_wait<kAhead - 1>();
            fence_async_shared();
            __syncthreads();  // this step has come, and all products of the one before the last are complete
            stage(step + kAhead);
            rows.load_codes(step + 1);
            const uint64_t tile = tiles + step % kStages * (kStageBytes >> 4);
            multiply(a[0], tile);
            wgmma_wait<1>();  // those of the second half of the step before: its registers are free
            rows.template decode<1>(a[1], codewords);
            multiply(a[1], tile + 2 * kNextK);
            wgmma_wait<1>();
            rows.next_step();
            rows.template decode<0>(a[0], codewords);
        }
        wgmma_wait<0>();
        wgmma_results(d);
        cp_async_wait<0>();

#pragma unroll
        for (int tile = 0; tile < kTokens / 8; ++tile)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int64_t token = first_token + tile * 8 + 2 * t + odd;
                float run[kRun];
#pragma unroll
                for (int i = 0; i < kRun; ++i) run[i] = d[i / 2][tile * 4 + i % 2 * 2 + odd];
                write_run<T>(out, run, token, first, m, width, static_cast<int>(blockIdx.y));
            }
    }
}

template <bool Transposed, typename T>
cudaError_t launch_wgmma(const T* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream) {
    const int width = Transposed ? w.columns() : w.n;
    const dim3 grid(static_cast<unsigned>(pq_wgmma_tiles(m, width)), out.splits);
    const auto of = [&](auto code, auto piece) {
        const CodewordTable table = codeword_table(w, piece, kOtherBytes, shared_memory_limit());
        return launch(pq_linear_wgmma_kernel<T, decltype(code), piece, Transposed>, grid, dim3(kThreads),
                      table.bytes + kOtherBytes, stream, x, w, table, out, m);
    };
    const auto of_piece = [&](auto piece) {
        return w.code_bytes == 1 ? of(uint8_t(), piece) : of(uint16_t(), piece);
    };
    if constexpr (!Transposed)
        if (w.d % 8 == 0) return of_piece(std::integral_constant<int, 8>());
    return of_piece(std::integral_constant<int, 4>());
}

}  // namespace

// Rows of x and grad are copied in chunks of 8 values, and codes are read four at a time. (Of any width of pieces, one
// copy of the table has as many bytes.)
bool pq_wgmma_serves(const PqWeight& w) {
    const int pieces = w.d % 8 == 0 ? w.d / 8 : w.d / 4;
    return has_wgmma() && w.n % 8 == 0 && w.columns() % 8 == 0 && w.columns() > 0 && (pieces & (pieces - 1)) == 0 &&
           codeword_table(w, 4, kOtherBytes, shared_memory_limit()).rows > 0;
}

int64_t pq_wgmma_tiles(int m, int width) {
    return static_cast<int64_t>((width + kWidth - 1) / kWidth) * ((m + kTokens - 1) / kTokens);
}

int pq_wgmma_splits(int m, const PqWeight& w) {
    const int64_t most = processors() / pq_wgmma_tiles(m, w.n), enough = (w.columns() + 63) / 64 / kMinSteps;
    const int64_t splits = most < enough ? most : enough;
    return splits > 1 ? static_cast<int>(splits) : 1;
}

template <typename T>
cudaError_t pq_linear_wgmma(const T* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream) {
    return launch_wgmma<false>(x, w, out, m, stream);
}

template <typename T>
cudaError_t pq_linear_grad_x_wgmma(const T* grad, const PqWeight& w, T* grad_x, int m, cudaStream_t stream) {
    return launch_wgmma<true>(grad, w, PqOutput{grad_x, nullptr, nullptr, 1}, m, stream);
}

#define QNK_PQ_WGMMA(T)                                                                                      \
    template cudaError_t pq_linear_wgmma(const T*, const PqWeight&, const PqOutput&, int, cudaStream_t);     \
    template cudaError_t pq_linear_grad_x_wgmma(const T*, const PqWeight&, T*, int, cudaStream_t);
QNK_PQ_WGMMA(bf16)
QNK_PQ_WGMMA(f16)
#undef QNK_PQ_WGMMA

}  // namespace qnk
