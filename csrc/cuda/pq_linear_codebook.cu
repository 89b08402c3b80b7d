// The gradient of pq_linear's codebook in bf16 or f16: a tile of the dense weight's gradient in the registers of the
// tensor-core product grad^T @ x, added by codeword to sums in shared memory. The dense gradient is never written.
//
// Blocks stay and take one tile of 128 outputs and 128 columns after the other, so that their sums go to memory once.
// Both operands have tokens along k but rows of tokens in memory, which ldmatrix transposes; a row of 256 bytes is
// stored with its 16-byte chunks permuted by the token, so that the 8 rows of a matrix lie in different banks.
//
// 8192x8192, 512 tokens on H100: 69 GFLOP, 69 us at the dense peak, 115 us at the 60 % of mma.sync. The scatter is 67
// million terms of two atomics each, 4.2 million warp instructions, 32,000 a multiprocessor: at 4 cycles each 75 us, at
// 12, with the collisions of random codes, 220 us, whatever the batch. Predicted: 200 to 330 us, as the two alternate.
// 199 to 204 registers; 48 KiB of stages and 17 KiB of sums (K = 256, d = 8): two blocks a multiprocessor.
#include "cuda/pq_sums.cuh"

namespace qnk {
namespace {

constexpr int kThreads = 128, kStages = 3, kTile = 128, kTokens = 32, kBlocksPerProcessor = 2;
constexpr int kChunks = kTile / 8, kOctetsOfTile = kTokens * kChunks;
constexpr int kStageBytes = 2 * kOctetsOfTile * 16;  // grad and x [token][chunk]

__device__ __forceinline__ int chunk_at(int token, int chunk) { return token * kChunks + (chunk ^ (token & 7)); }

template <typename T, typename Code>
__global__ void __launch_bounds__(kThreads)
    pq_linear_grad_codebook_kernel(const T* __restrict__ grad, const T* __restrict__ x, PqWeight w, PqSums to, int m,
                                   int sums_bytes) {
    QNK_SHARED_MEMORY(shared);
    auto* stages = reinterpret_cast<PqWords<4>*>(shared);
    const CodewordSums sums(w, to, sums_bytes ? reinterpret_cast<uint32_t*>(shared + kStages * kStageBytes) : nullptr);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_outputs = warp % 2 * 64, warp_columns = warp / 2 * 64;
    const int matrix = lane / 8, matrix_row = lane % 8;  // whose address this lane gives to ldmatrix
    const int columns = w.columns(), steps = (m + kTokens - 1) / kTokens;
    const int tiles_wide = (columns + kTile - 1) / kTile;
    const int64_t tiles = static_cast<int64_t>(tiles_wide) * ((w.n + kTile - 1) / kTile);

    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int first_output = static_cast<int>(tile / tiles_wide) * kTile;
        const int first_column = static_cast<int>(tile % tiles_wide) * kTile;
        const auto stage = [&](int step) {
            if (step < steps) {
                PqWords<4>* at = stages + step % kStages * 2 * kOctetsOfTile;
                for (int i = threadIdx.x; i < kOctetsOfTile; i += kThreads) {
                    const int row = i / kChunks, chunk = i % kChunks, token = step * kTokens + row;
                    PqWords<4>* to_grad = at + chunk_at(row, chunk);
                    stage_octet(to_grad, grad, token, token < m, first_output + chunk * 8, w.n);
                    stage_octet(to_grad + kOctetsOfTile, x, token, token < m, first_column + chunk * 8, columns);
                }
            }
            cp_async_commit();
        };
        for (int i = 0; i < kStages - 1; ++i) stage(i);
        float dense[4][8][4] = {};  // of 64 outputs and 64 columns
        for (int step = 0; step < steps; ++step) {
            cp_async_wait<kStages - 2>();
            __syncthreads();
            stage(step + kStages - 1);
            const PqWords<4>* grads = stages + step % kStages * 2 * kOctetsOfTile;
            const PqWords<4>* octets = grads + kOctetsOfTile;
#pragma unroll
            for (int half = 0; half < kTokens; half += 16) {
                uint32_t a[4][4];
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    ldmatrix_x4_trans(a[r], grads + chunk_at(half + matrix / 2 * 8 + matrix_row,
                                                             warp_outputs / 8 + r * 2 + matrix % 2));
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, octets + chunk_at(half + matrix % 2 * 8 + matrix_row,
                                                           warp_columns / 8 + pair * 2 + matrix / 2));
                    const uint32_t even[2] = {b[0], b[1]}, odd[2] = {b[2], b[3]};
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        mma_m16n8k16<T>(dense[r][2 * pair], a[r], even);
                        mma_m16n8k16<T>(dense[r][2 * pair + 1], a[r], odd);
                    }
                }
            }
        }
        cp_async_wait<0>();
        __syncthreads();  // all have read the last stages, which the next tile overwrites
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            int outputs[8];
            float terms[8][2];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                outputs[i] = first_output + warp_outputs + i * 8 + g;
                terms[i][0] = dense[i / 2][c][i % 2 * 2];
                terms[i][1] = dense[i / 2][c][i % 2 * 2 + 1];
            }
            scatter<Code>(sums, w, first_column + warp_columns + c * 8 + 2 * t, outputs, terms);
        }
    }
    sums.flush();
}

}  // namespace

template <typename T>
cudaError_t pq_linear_grad_codebook(const T* grad, const T* x, const PqWeight& w, const PqSums& to, int m,
                                    cudaStream_t stream) {
    const int sums_bytes = sums_in_shared(w, kStages * kStageBytes);
    const int64_t tiles =
        static_cast<int64_t>((w.columns() + kTile - 1) / kTile) * ((w.n + kTile - 1) / kTile);
    const int64_t most = kBlocksPerProcessor * processors();
    const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most));
    const auto kernel = w.code_bytes == 1 ? pq_linear_grad_codebook_kernel<T, uint8_t>
                                          : pq_linear_grad_codebook_kernel<T, uint16_t>;
    return launch(kernel, grid, dim3(kThreads), kStages * kStageBytes + sums_bytes, stream, grad, x, w, to, m,
                  sums_bytes);
}

template cudaError_t pq_linear_grad_codebook(const bf16*, const bf16*, const PqWeight&, const PqSums&, int,
                                             cudaStream_t);
template cudaError_t pq_linear_grad_codebook(const f16*, const f16*, const PqWeight&, const PqSums&, int,
                                             cudaStream_t);

}  // namespace qnk
