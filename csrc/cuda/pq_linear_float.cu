// pq_linear for many tokens, and its gradients, in fp32: products of plain threads over tiles in shared memory.
//
// All three are sums over a depth of 32 at a time of a [32][rows] times b [32][64], by 16 x 16 threads with rows / 16
// rows and 4 columns each. The weight is decoded into its tile in quads of a codeword.
//
// Floor: fp32 multiply-adds, 8192x8192 and 256 tokens on H100 34 GFLOP, 0.51 ms at 67 TFLOP/s; of a step of 64 rows, 4
// cycles of multiply-adds and 3 of shared memory a warp, and a tenth of that for decoding: 0.75 ms predicted.
// 72 to 96 registers, 11 or 17 KiB: two blocks a multiprocessor.
#include "cuda/pq_sums.cuh"

namespace qnk {
namespace {

constexpr int kThreads = 256, kDepth = 32, kWidth = 64;
constexpr int kPad = 4;  // floats: rows stay aligned to 16 bytes, and a column of quads is spread over the banks
constexpr int kMinSteps = 8;
constexpr int kFewRows = 16, kManyRows = 64;

template <int Columns>
struct alignas(16) FloatRow {
    float at[Columns + kPad];
    __device__ float& operator[](int i) { return at[i]; }
    __device__ const float& operator[](int i) const { return at[i]; }
};

struct Indices {
    int row = threadIdx.x / 16, column = threadIdx.x % 16 * 4;
};

template <int Rows>
__device__ __forceinline__ void multiply_add(float (&sums)[Rows / 16][4], const FloatRow<Rows> (&a)[kDepth],
                                             const FloatRow<kWidth> (&b)[kDepth]) {
    const Indices at;
#pragma unroll 8
    for (int i = 0; i < kDepth; ++i) {
        const float4 four = *reinterpret_cast<const float4*>(&b[i][at.column]);
        const float columns[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int r = 0; r < Rows / 16; ++r)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                sums[r][j] = fmaf(a[i][at.row * (Rows / 16) + r], columns[j], sums[r][j]);
    }
}

// to[i][row] <- matrix [rows, depth] transposed, 0 outside
template <int Rows>
__device__ __forceinline__ void load_transposed(FloatRow<Rows> (&to)[kDepth], const float* matrix, int64_t first_row,
                                                int64_t rows, int first, int depth) {
#pragma unroll
    for (int i = threadIdx.x; i < Rows * kDepth; i += kThreads) {
        const int64_t row = first_row + i / kDepth;
        const int column = first + i % kDepth;
        to[i % kDepth][i / kDepth] = row < rows && column < depth ? matrix[row * depth + column] : 0.0f;
    }
}

// to[i][column] <- matrix [rows, width], 0 outside
__device__ __forceinline__ void load_rows(FloatRow<kWidth> (&to)[kDepth], const float* matrix, int first_row, int rows,
                                          int first, int width) {
#pragma unroll
    for (int i = threadIdx.x; i < kDepth * kWidth; i += kThreads) {
        const int64_t row = first_row + i / kWidth;
        const int column = first + i % kWidth;
        to[i / kWidth][i % kWidth] = row < rows && column < width ? matrix[row * width + column] : 0.0f;
    }
}

// Four elements of W from a column that is a multiple of 4, 0 outside.
template <typename Code>
__device__ __forceinline__ float4 weight_quad(const PqWeight& w, int output, int column) {
    if (output >= w.n || column >= w.columns()) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const int block = column / w.d;
    const int code = static_cast<const Code*>(w.codes)[static_cast<int64_t>(block) * w.n + output];
    const float* codeword = static_cast<const float*>(w.codebook) + (code < w.k ? code : w.k - 1) * w.d;
    return *reinterpret_cast<const float4*>(codeword + column - block * w.d);
}

// b <- W^T of 32 columns and 64 outputs, or W of 32 outputs and 64 columns
template <typename Code, bool Transposed>
__device__ __forceinline__ void load_weight(FloatRow<kWidth> (&b)[kDepth], const PqWeight& w, int first_depth,
                                            int first_width) {
#pragma unroll
    for (int i = threadIdx.x; i < kDepth * kWidth / 4; i += kThreads) {  // neighbours: outputs, adjacent codes
        if (Transposed) {
            const int output = i % kDepth, column = i / kDepth * 4;
            *reinterpret_cast<float4*>(&b[output][column]) =
                weight_quad<Code>(w, first_depth + output, first_width + column);
        } else {
            const int output = i % kWidth, column = i / kWidth * 4;
            const float4 quad = weight_quad<Code>(w, first_width + output, first_depth + column);
            b[column][output] = quad.x, b[column + 1][output] = quad.y;
            b[column + 2][output] = quad.z, b[column + 3][output] = quad.w;
        }
    }
}

// y [m, width] = x [m, depth] @ W^T, or @ W if Transposed.
template <typename Code, bool Transposed, int Rows>
__global__ void __launch_bounds__(kThreads, 2)
    pq_linear_float_kernel(const float* __restrict__ x, PqWeight w, PqOutput out, int m) {
    QNK_SHARED(FloatRow<Rows>, a, [kDepth]);
    QNK_SHARED(FloatRow<kWidth>, b, [kDepth]);
    const int depth = Transposed ? w.n : w.columns(), width = Transposed ? w.columns() : w.n;
    const unsigned tiles_wide = (width + kWidth - 1) / kWidth;
    const int steps = (depth + kDepth - 1) / kDepth;
    const int first_step = static_cast<int>(static_cast<int64_t>(steps) * blockIdx.y / gridDim.y);
    const int last_step = static_cast<int>(static_cast<int64_t>(steps) * (blockIdx.y + 1) / gridDim.y);
    const int first = static_cast<int>(blockIdx.x % tiles_wide) * kWidth;
    const int64_t first_token = static_cast<int64_t>(blockIdx.x / tiles_wide) * Rows;
    float sums[Rows / 16][4] = {};
    for (int step = first_step; step < last_step; ++step) {
        __syncthreads();
        load_transposed<Rows>(a, x, first_token, m, step * kDepth, depth);
        load_weight<Code, Transposed>(b, w, step * kDepth, first);
        __syncthreads();
        multiply_add<Rows>(sums, a, b);
    }
    const Indices at;
#pragma unroll
    for (int r = 0; r < Rows / 16; ++r)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int64_t token = first_token + at.row * (Rows / 16) + r;
            const int column = first + at.column + j;
            if (token >= m || column >= width) continue;
            if (out.parts)
                out.parts[(static_cast<int64_t>(blockIdx.y) * m + token) * width + column] = sums[r][j];
            else
                static_cast<float*>(out.y)[token * width + column] =
                    out.bias ? sums[r][j] + out.bias[column] : sums[r][j];
        }
}

// As pq_linear_grad_codebook_kernel: tiles of 64 outputs and 64 columns of grad^T @ x.
template <typename Code>
__global__ void __launch_bounds__(kThreads, 2)
    pq_linear_grad_codebook_float_kernel(const float* __restrict__ grad, const float* __restrict__ x, PqWeight w,
                                         PqSums to, int m, int sums_bytes) {
    QNK_SHARED_MEMORY(shared);
    QNK_SHARED(FloatRow<kWidth>, a, [kDepth]);
    QNK_SHARED(FloatRow<kWidth>, b, [kDepth]);
    const CodewordSums sums(w, to, sums_bytes ? reinterpret_cast<uint32_t*>(shared) : nullptr);
    const int columns = w.columns(), tiles_wide = (columns + kWidth - 1) / kWidth;
    const int64_t tiles = static_cast<int64_t>(tiles_wide) * ((w.n + kWidth - 1) / kWidth);
    const Indices at;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int first_output = static_cast<int>(tile / tiles_wide) * kWidth;
        const int first_column = static_cast<int>(tile % tiles_wide) * kWidth;
        float dense[4][4] = {};
        for (int token = 0; token < m; token += kDepth) {
            __syncthreads();
            load_rows(a, grad, token, m, first_output, w.n);
            load_rows(b, x, token, m, first_column, columns);
            __syncthreads();
            multiply_add<kWidth>(dense, a, b);
        }
        const int column = first_column + at.column, block = column / w.d;
        if (column >= columns) continue;
        const Code* codes = static_cast<const Code*>(w.codes) + static_cast<int64_t>(block) * w.n;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int output = first_output + at.row * 4 + r;
            if (output >= w.n) continue;
            const int code = codes[output];
#pragma unroll
            for (int j = 0; j < 4; ++j) sums.add(code, column - block * w.d + j, dense[r][j]);
        }
    }
    sums.flush();
}

template <bool Transposed, int Rows>
cudaError_t launch_float(const float* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream) {
    const int width = Transposed ? w.columns() : w.n;
    const int64_t tiles = static_cast<int64_t>((width + kWidth - 1) / kWidth) * ((m + Rows - 1) / Rows);
    const dim3 grid(static_cast<unsigned>(tiles), out.splits);
    const auto kernel = w.code_bytes == 1 ? pq_linear_float_kernel<uint8_t, Transposed, Rows>
                                          : pq_linear_float_kernel<uint16_t, Transposed, Rows>;
    return launch(kernel, grid, dim3(kThreads), 0, stream, x, w, out, m);
}

}  // namespace

int pq_float_splits(int m, const PqWeight& w) {
    const int rows = m <= kFewRows ? kFewRows : kManyRows;
    const int64_t tiles = static_cast<int64_t>((w.n + kWidth - 1) / kWidth) * ((m + rows - 1) / rows);
    const int64_t steps = (w.columns() + kDepth - 1) / kDepth, most = 4 * processors() / tiles;
    const int64_t splits = most < steps / kMinSteps ? most : steps / kMinSteps;
    return splits > 1 ? static_cast<int>(splits) : 1;
}

cudaError_t pq_linear_float(const float* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream) {
    if (m <= kFewRows) return launch_float<false, kFewRows>(x, w, out, m, stream);
    return launch_float<false, kManyRows>(x, w, out, m, stream);
}

cudaError_t pq_linear_grad_x_float(const float* grad, const PqWeight& w, float* grad_x, int m, cudaStream_t stream) {
    return launch_float<true, kManyRows>(grad, w, PqOutput{grad_x, nullptr, nullptr, 1}, m, stream);
}

cudaError_t pq_linear_grad_codebook_float(const float* grad, const float* x, const PqWeight& w, const PqSums& to, int m,
                                          cudaStream_t stream) {
    const int sums_bytes = sums_in_shared(w, 2 * kDepth * sizeof(FloatRow<kWidth>));
    const int64_t tiles = static_cast<int64_t>((w.columns() + kWidth - 1) / kWidth) * ((w.n + kWidth - 1) / kWidth);
    const int64_t most = 2 * processors();
    const auto kernel = w.code_bytes == 1 ? pq_linear_grad_codebook_float_kernel<uint8_t>
                                          : pq_linear_grad_codebook_float_kernel<uint16_t>;
    return launch(kernel, dim3(static_cast<unsigned>(tiles < most ? tiles : most)), dim3(kThreads), sums_bytes, stream,
                  grad, x, w, to, m, sums_bytes);
}

}  // namespace qnk
