// The gradient of pq_linear's codebook in bf16 or f16 on sm_90a: as pq_linear_codebook.cu, with wgmma.
//
// Both operands of grad^T @ x are tiles of shared memory in which the outputs or columns of a token lie together, as in
// memory; wgmma reads them across. A block is one warpgroup: two m64n128 products of 16 tokens take 128 cycles of the
// tensor cores and read 12 KiB, 96 cycles. Two blocks a multiprocessor, so that one multiplies while the other
// scatters: 173 registers, 65 KiB of stages and 17 KiB of sums (K = 256, d = 8).
//
// 8192x8192, 4096 tokens on H100: 550 GFLOP, 790 us at 70 % of the dense peak (930 at the 60 % of mma.sync), and the 75
// to 220 us of the scatter beside them: 800 to 1000 us predicted. 512 tokens: 190 to 320 us, as with mma.sync, as the
// scatter is most of it.
#include "cuda/pq_sums.cuh"
#include "cuda/wgmma.h"

namespace qnk {
namespace {

constexpr int kThreads = 128, kTile = 128, kTokens = 32, kBlocksPerProcessor = 2;
constexpr int kStages = 4, kAhead = 2;  // a tile is copied two steps ahead, while products may still read one
constexpr int kHalfBytes = kTokens * 128;      // 64 outputs or columns of a tile
constexpr int kStageBytes = 4 * kHalfBytes;    // grad, x
constexpr int kStagesBytes = kStages * kStageBytes + static_cast<int>(kSwizzleBytes);

template <typename T, typename Code>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    pq_linear_grad_codebook_wgmma_kernel(const T* __restrict__ grad, const T* __restrict__ x, PqWeight w, PqSums to,
                                         int m, int sums_bytes) {
    if constexpr (kHasWgmma) {
        QNK_SHARED_MEMORY(shared);
        unsigned char* const stages = shared + to_swizzle_boundary(shared);
        auto* const words = reinterpret_cast<uint32_t*>(stages + kStages * kStageBytes);
        const CodewordSums sums(w, to, sums_bytes ? words : nullptr);
        const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
        const int columns = w.columns(), steps = (m + kTokens - 1) / kTokens;
        const int tiles_wide = (columns + kTile - 1) / kTile;
        const int64_t tiles = static_cast<int64_t>(tiles_wide) * ((w.n + kTile - 1) / kTile);
        const uint64_t operand = wgmma_operand(shared_address(stages), kHalfBytes, kSwizzleBytes, Swizzle::Swizzle128);

        for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const int first_output = static_cast<int>(tile / tiles_wide) * kTile;
            const int first_column = static_cast<int>(tile % tiles_wide) * kTile;
            const auto stage = [&](int step) {
                if (step < steps) {
                    unsigned char* const at = stages + step % kStages * kStageBytes;
#pragma unroll 4
                    for (int i = 0; i < kTokens * kTile / 8 / kThreads; ++i) {
                        const int row = (thread + i * kThreads) / (kTile / 8), chunk = thread % (kTile / 8);
                        const int token = step * kTokens + row;
                        auto* const one = at + chunk / 8 * kHalfBytes + tile_offset(row, chunk % 8);
                        stage_octet(reinterpret_cast<PqWords<4>*>(one), grad, token, token < m,
                                    first_output + chunk * 8, w.n);
                        stage_octet(reinterpret_cast<PqWords<4>*>(one + 2 * kHalfBytes), x, token, token < m,
                                    first_column + chunk * 8, columns);
                    }
                }
                cp_async_commit();
            };
            for (int i = 0; i < kAhead; ++i) stage(i);
            float dense[2][kTile / 2] = {};
            wgmma_fence(dense);
            for (int step = 0; step < steps; ++step) {
                cp_async_wait<kAhead - 1>();
                fence_async_shared();
                __syncthreads();  // this step has come, and all products of the one before the last are complete
                stage(step + kAhead);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kTokens / 16; ++k) {
                    const uint64_t a = operand + ((step % kStages * kStageBytes + k * 2048) >> 4);
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        wgmma_m64k16_across<T>(dense[r], a + (r * kHalfBytes >> 4), a + (2 * kHalfBytes >> 4));
                }
                wgmma_commit();
                wgmma_wait<1>();
            }
            wgmma_wait<0>();
            wgmma_results(dense);
            cp_async_wait<0>();
#pragma unroll
            for (int c = 0; c < kTile / 8; ++c) {
                int outputs[4];
                float terms[4][2];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    outputs[i] = first_output + i / 2 * 64 + warp * 16 + i % 2 * 8 + g;
                    terms[i][0] = dense[i / 2][c * 4 + i % 2 * 2];
                    terms[i][1] = dense[i / 2][c * 4 + i % 2 * 2 + 1];
                }
                scatter<Code>(sums, w, first_column + c * 8 + 2 * t, outputs, terms);
            }
            __syncthreads();  // all are done with the last stages, which the next tile overwrites
        }
        sums.flush();
    }
}

}  // namespace

template <typename T>
cudaError_t pq_linear_grad_codebook_wgmma(const T* grad, const T* x, const PqWeight& w, const PqSums& to, int m,
                                          cudaStream_t stream) {
    const int sums_bytes = sums_in_shared(w, kStagesBytes);
    const int64_t tiles = static_cast<int64_t>((w.columns() + kTile - 1) / kTile) * ((w.n + kTile - 1) / kTile);
    const int64_t most = kBlocksPerProcessor * processors();
    const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most));
    const auto kernel = w.code_bytes == 1 ? pq_linear_grad_codebook_wgmma_kernel<T, uint8_t>
                                          : pq_linear_grad_codebook_wgmma_kernel<T, uint16_t>;
    return launch(kernel, grid, dim3(kThreads), kStagesBytes + sums_bytes, stream, grad, x, w, to, m, sums_bytes);
}

template cudaError_t pq_linear_grad_codebook_wgmma(const bf16*, const bf16*, const PqWeight&, const PqSums&, int,
                                                   cudaStream_t);
template cudaError_t pq_linear_grad_codebook_wgmma(const f16*, const f16*, const PqWeight&, const PqSums&, int,
                                                   cudaStream_t);

}  // namespace qnk
