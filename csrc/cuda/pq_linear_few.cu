// pq_linear for up to 16 tokens in bf16 or f16: the whole depth of 64 (or 32) outputs in one block of 16 warps.
//
// A warp takes every 16th step of 32 columns: a thread reads the codes of 8 (or 4) adjacent outputs for its octet,
// their codewords from the table, and the octet of two tokens; tensor cores multiply, so that 16 tokens cost little
// more than one. The sums of the warps are added in their order, and where there are few outputs, blocks share the
// depth too.
//
// 8192x8192, d = 8, K = 256 on H100 (132 multiprocessors, 1.7 GHz), 8.4 M codes:
//   codes from memory                       8.4 MB                                    2.5 us
//   codewords from shared memory            134 MB, 128 bytes a cycle                 4.7 us   the bound
//   products                                16 of a step, 32 cycles (A100) or 26      4.7 or 3.8 us
//   instructions                            70 of a step and warp, 25 to load, 4 a cycle   3.5 us
//   x from the second level                 16 KiB per block and token, 128 blocks    0.4 us a token
// Predicted: 6 us with the start, the table and the sums for one token, 10 us for 16. What else there is: a table of
// products x . codeword takes one 4-byte look-up per code, but random ones collide (3.5 cycles of 32 lanes where
// 16-byte ones of 8 lanes take 4): 4.2 us for one token, as much again for each further one. Products by plain
// threads: 19 instructions a code, 5.5 us for one token, 8 more a token. Up to 128 registers and, for d = 8 or less
// and K up to 256, 33 KiB (sums of 16 tokens: 64 KiB): one block of 512 threads a multiprocessor.
#include "cuda/pq_fragments.cuh"

namespace qnk {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kMinSteps = 2 * kWarps;

template <typename T, typename Code, int Width, bool InShared, int Run>
__global__ void __launch_bounds__(kThreads)
    pq_linear_few_kernel(const T* __restrict__ x, PqWeight w, CodewordTable table, PqOutput out, int m) {
    constexpr int kOutputs = 8 * Run;
    // steps whose codes are under way while as many are multiplied: 16 to 64 bytes of a thread
    constexpr int kAhead = sizeof(OctetCodes<Code, Width, Run>) > 8 ? 2 : 4;
    QNK_SHARED_MEMORY(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_output = blockIdx.x * kOutputs;
    const int columns = w.columns(), pieces = w.d / Width;
    const int stride = kWarps * gridDim.y, steps = (columns + 31) / 32;
    const uint32_t zero = gridDim.z - 1;  // see multiply_few

    const int first_octet = (blockIdx.y * kWarps + warp) * 4 + t;
    const OctetPlace<Width> by(stride * 4, pieces);
    OctetPlace<Width> ahead(first_octet, pieces), place = ahead;
    OctetCodes<Code, Width, Run> next[kAhead];
    const auto load = [&] {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            next[i].load(w, ahead, first_output + g * Run);
            ahead.advance(by, pieces);
        }
    };
    load();
    // of a step: the octet of tokens g and g + 8; kAhead is even, so that every other step takes the same registers
    PqWords<4> octets[2][2];
    int octet = first_octet;
    const auto load_x = [&](PqWords<4>(&to)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = g + 8 * i;
            to[i] = {};
            if (token < m) to[i] = load_octet(x + static_cast<int64_t>(token) * columns, octet * 8, columns);
        }
        octet += stride * 4;
    };
    load_x(octets[0]);
    Codewords<Width, InShared>::fill(w, table, shared);
    __syncthreads();

    const Codewords<Width, InShared> codewords(w, table, shared);
    float sums[Run][4] = {};
    for (int step = blockIdx.y * kWarps + warp; step < steps; step += kAhead * stride) {
        OctetCodes<Code, Width, Run> codes[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) codes[i] = next[i];
        load();
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            load_x(octets[(i + 1) % 2]);
            if (step + i * stride < steps)
                multiply_few<T>(sums, codewords, codes[i], place, w.blocks, octets[i % 2], zero);
            place.advance(by, pieces);
        }
    }

    __syncthreads();  // the table has been read: the sums of all warps, [warp][token][output], take its place
    float* all = reinterpret_cast<float*>(shared);
    const int tokens = (m + 7) / 8 * 8;
#pragma unroll
    for (int i = 0; i < Run; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int of_token = g + j / 2 * 8, output = (2 * t + j % 2) * Run + i;
            if (of_token < tokens) all[(warp * tokens + of_token) * kOutputs + output] = sums[i][j];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < m * kOutputs; i += kThreads) {
        const int of_token = i / kOutputs, output = first_output + i % kOutputs;
        if (output >= w.n) continue;
        float total = all[i];
#pragma unroll
        for (int other = 1; other < kWarps; ++other) total += all[other * tokens * kOutputs + i];
        const int64_t at = static_cast<int64_t>(of_token) * w.n + output;
        if (out.parts)
            out.parts[static_cast<int64_t>(blockIdx.y) * m * w.n + at] = total;
        else
            static_cast<T*>(out.y)[at] = from_float<T>(out.bias ? total + out.bias[output] : total);
    }
}

bool table_fits(const PqWeight& w) { return codeword_table(w, w.d % 8 ? 4 : 8, 0).rows > 0; }

// Adjacent outputs of a thread, an eighth of those of a block: fewer where more would leave multiprocessors idle, or
// registers short.
int run_of(const PqWeight& w) { return table_fits(w) && (w.n + 63) / 64 * 10 >= processors() * 9 ? 8 : 4; }

template <typename T, typename Code, int Width, bool InShared, int Run>
cudaError_t launch_few(const T* x, const PqWeight& w, const CodewordTable& table, const PqOutput& out, int m,
                       cudaStream_t stream) {
    const int sums_bytes = kWarps * ((m + 7) / 8 * 8) * 8 * Run * 4;
    const int bytes = table.bytes > sums_bytes ? table.bytes : sums_bytes;
    const dim3 grid((w.n + 8 * Run - 1) / (8 * Run), out.splits);
    return launch(pq_linear_few_kernel<T, Code, Width, InShared, Run>, grid, dim3(kThreads), bytes, stream, x, w, table,
                  out, m);
}

}  // namespace

int pq_few_splits(int, const PqWeight& w) {
    const int outputs = 8 * run_of(w), tiles = (w.n + outputs - 1) / outputs;
    const int steps = (w.columns() + 31) / 32, most = processors() / tiles;
    const int splits = most < steps / kMinSteps ? most : steps / kMinSteps;
    return splits > 1 ? splits : 1;
}

template <typename T>
cudaError_t pq_linear_few(const T* x, const PqWeight& w, const PqOutput& out, int m, cudaStream_t stream) {
    return by_layout(w, 0, [&](auto code, auto width, auto in_shared, const CodewordTable& table) {
        using Code = decltype(code);
        if constexpr (in_shared)
            if (run_of(w) == 8) return launch_few<T, Code, width, true, 8>(x, w, table, out, m, stream);
        return launch_few<T, Code, width, in_shared, 4>(x, w, table, out, m, stream);
    });
}

template cudaError_t pq_linear_few(const bf16*, const PqWeight&, const PqOutput&, int, cudaStream_t);
template cudaError_t pq_linear_few(const f16*, const PqWeight&, const PqOutput&, int, cudaStream_t);

}  // namespace qnk
