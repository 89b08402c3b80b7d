// pq_linear for up to 8 tokens in fp32: a thread has two adjacent outputs, a warp 64 of them, and 16 warps share the
// blocks of the weight. Their sums are added in the order of the warps.
//
// A step is one block: two codes, quads of their codewords from the table (fp32 quads are its pieces of 8 16-bit
// elements), and quads of x, which all lanes share.
//
// 8192x8192, d = 8, K = 256 on H100: codes 2.5 us from memory; codewords 4 bytes a weight at 128 bytes a cycle and
// multiprocessor, 9.3 us: the bound up to 4 tokens (x adds a cycle per token and quad); at 8 multiply-adds, 19 us.
// 56 to 96 registers; 66 KiB for d = 8, K = 256: one block of 512 threads a multiprocessor.
#include "cuda/pq_codewords.cuh"

namespace qnk {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps, kOutputs = 64;
constexpr int kAhead = 4;  // blocks whose codes are under way while as many are multiplied
constexpr int kMinSteps = 2 * kWarps;

// w: d in units of 16 bits. Tokens >= m.
template <typename Code, bool InShared, int Tokens>
__global__ void __launch_bounds__(kThreads, 1)
    pq_linear_few_float_kernel(const float* __restrict__ x, PqWeight w, CodewordTable table, PqOutput out, int m) {
    QNK_SHARED_MEMORY(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_output = blockIdx.x * kOutputs, output = first_output + 2 * lane;
    const int d = w.d / 2, quads = d / 4, stride = kWarps * gridDim.y;
    const int64_t columns = static_cast<int64_t>(w.blocks) * d;

    int ahead = blockIdx.y * kWarps + warp;
    int next[kAhead][2];
    const auto load = [&] {
#pragma unroll
        for (int i = 0; i < kAhead; ++i, ahead += stride) {
            const Code* codes = static_cast<const Code*>(w.codes) + static_cast<int64_t>(ahead) * w.n + output;
#pragma unroll
            for (int o = 0; o < 2; ++o) next[i][o] = ahead < w.blocks && output + o < w.n ? codes[o] : 0;
        }
    };
    load();
    Codewords<8, InShared>::fill(w, table, shared);
    __syncthreads();

    const Codewords<8, InShared> codewords(w, table, shared);
    float sums[Tokens][2] = {};
    for (int block = blockIdx.y * kWarps + warp; block < w.blocks; block += kAhead * stride) {
        int codes[kAhead][2];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) codes[i][0] = next[i][0], codes[i][1] = next[i][1];
        load();
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int at = block + i * stride;
            if (at >= w.blocks) break;
            for (int quad = 0; quad < quads; ++quad) {
                const auto from = codewords.source(quad, true);
                float4 codeword[2];
#pragma unroll
                for (int o = 0; o < 2; ++o) {
                    const PqWords<4> bits = codewords.template load<Code>(from, codes[i][o]);
                    codeword[o] = make_float4(__uint_as_float(bits.word[0]), __uint_as_float(bits.word[1]),
                                              __uint_as_float(bits.word[2]), __uint_as_float(bits.word[3]));
                }
#pragma unroll
                for (int token = 0; token < Tokens; ++token) {
                    if (token >= m) break;
                    const float4 four =
                        *reinterpret_cast<const float4*>(x + token * columns + static_cast<int64_t>(at) * d + quad * 4);
#pragma unroll
                    for (int o = 0; o < 2; ++o) {
                        float& sum = sums[token][o];
                        sum = fmaf(four.x, codeword[o].x, sum);
                        sum = fmaf(four.y, codeword[o].y, sum);
                        sum = fmaf(four.z, codeword[o].z, sum);
                        sum = fmaf(four.w, codeword[o].w, sum);
                    }
                }
            }
        }
    }

    __syncthreads();  // the table has been read: the sums of all warps, [warp][token][output], take its place
    float* all = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int token = 0; token < Tokens; ++token)
#pragma unroll
        for (int o = 0; o < 2; ++o) all[(warp * Tokens + token) * kOutputs + 2 * lane + o] = sums[token][o];
    __syncthreads();
    for (int i = threadIdx.x; i < m * kOutputs; i += kThreads) {
        const int token = i / kOutputs, at = first_output + i % kOutputs;
        if (at >= w.n) continue;
        float total = all[i];
#pragma unroll
        for (int other = 1; other < kWarps; ++other) total += all[other * Tokens * kOutputs + i];
        const int64_t to = static_cast<int64_t>(token) * w.n + at;
        if (out.parts)
            out.parts[static_cast<int64_t>(blockIdx.y) * m * w.n + to] = total;
        else
            static_cast<float*>(out.y)[to] = out.bias ? total + out.bias[at] : total;
    }
}

template <typename Code, bool InShared, int Tokens>
cudaError_t launch_few(const float* x, const PqWeight& w, const CodewordTable& table, const PqOutput& out, int m,
                       cudaStream_t stream) {
    constexpr int sums_bytes = kWarps * Tokens * kOutputs * 4;
    const int bytes = table.bytes > sums_bytes ? table.bytes : sums_bytes;
    return launch(pq_linear_few_float_kernel<Code, InShared, Tokens>, dim3((w.n + kOutputs - 1) / kOutputs, out.splits),
                  dim3(kThreads), bytes, stream, x, w, table, out, m);
}

}  // namespace

int pq_few_float_splits(int, const PqWeight& w) {
    const int most = processors() / ((w.n + kOutputs - 1) / kOutputs);
    const int splits = most < w.blocks / kMinSteps ? most : w.blocks / kMinSteps;
    return splits > 1 ? splits : 1;
}

cudaError_t pq_linear_few_float(const float* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream) {
    PqWeight halves = w;
    halves.d *= 2;
    return by_layout(halves, 0, [&](auto code, auto, auto in_shared, const CodewordTable& table) {
        using Code = decltype(code);
        if (m <= 1) return launch_few<Code, in_shared, 1>(x, halves, table, out, m, stream);
        if (m <= 2) return launch_few<Code, in_shared, 2>(x, halves, table, out, m, stream);
        if (m <= 4) return launch_few<Code, in_shared, 4>(x, halves, table, out, m, stream);
        return launch_few<Code, in_shared, 8>(x, halves, table, out, m, stream);
    });
}

}  // namespace qnk
