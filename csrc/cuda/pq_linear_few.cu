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

// Whole: n is a multiple of Run and the columns of 8. Octets of tokens: 1 or 2.
template <typename T, typename Code, int Width, bool InShared, int Run, int Octets, bool Whole>
__global__ void __launch_bounds__(kThreads)
    pq_linear_few_kernel(const T* __restrict__ x, PqWeight w, CodewordTable table, PqOutput out, int m) {
    constexpr int kOutputs = 8 * Run;
    // steps whose codes are under way while as many are multiplied (2 to 8: up to 64 bytes of a thread), and whose x is
    constexpr int kAhead = 64 / Octets / sizeof(OctetCodes<Code, Width, Run>) > 8
                               ? 8
                               : 64 / Octets / sizeof(OctetCodes<Code, Width, Run>);
    constexpr int kAheadX = Octets == 1 && kAhead > 2 ? 4 : 2;
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
            next[i].template load<Whole>(w, ahead, first_output + g * Run);
            ahead.advance(by, pieces);
        }
    };
    load();
    // of a step: the octet of tokens g and g + 8
    PqWords<4> octets[kAheadX][2] = {};
    int octet = first_octet;
    const auto load_x = [&](PqWords<4>(&to)[2]) {
#pragma unroll
        for (int i = 0; i < Octets; ++i) {
            const int token = g + 8 * i;
            if (token < m) to[i] = load_octet<Whole>(x + static_cast<int64_t>(token) * columns, octet * 8, columns);
        }
        octet += stride * 4;
    };
#pragma unroll
    for (int i = 0; i < kAheadX - 1; ++i) load_x(octets[i]);
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
            load_x(octets[(i + kAheadX - 1) % kAheadX]);
            if (step + i * stride < steps)
                multiply_few<T>(sums, codewords, codes[i], place, w.blocks, octets[i % kAheadX], zero);
            place.advance(by, pieces);
        }
    }

    // The table has been read: the sums of all warps, [warp][token][i][of 8 runs], take its place. A token's are a
    // quarter of the banks further than those of the one before.
    constexpr int kTokenWords = kOutputs + 8;
    __syncthreads();
    float* all = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int half = 0; half < Octets; ++half) {
        const int token = g + half * 8;
        if (token >= m) continue;
#pragma unroll
        for (int i = 0; i < Run; ++i)
            *reinterpret_cast<float2*>(all + (warp * m + token) * kTokenWords + i * 8 + 2 * t) =
                make_float2(sums[i][2 * half], sums[i][2 * half + 1]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < m * kOutputs; i += kThreads) {
        const int token = i / kOutputs, output = first_output + i % kOutputs, of_run = i % Run, run = i % kOutputs / Run;
        if (output >= w.n) continue;
        const float* of_warp = all + token * kTokenWords + of_run * 8 + run;
        float total = *of_warp;
#pragma unroll
        for (int other = 1; other < kWarps; ++other) total += of_warp[other * m * kTokenWords];
        const int64_t at = static_cast<int64_t>(token) * w.n + output;
        if (out.parts)
            out.parts[static_cast<int64_t>(blockIdx.y) * m * w.n + at] = total;
        else
            static_cast<T*>(out.y)[at] = from_float<T>(out.bias ? total + out.bias[output] : total);
    }
}

bool table_fits(const PqWeight& w) { return codeword_table(w, w.d % 8 ? 4 : 8, 0).rows > 0; }

// Adjacent outputs of a thread, an eighth of those of a block: fewer where more would leave multiprocessors idle, or
// registers short.
int run_of(const PqWeight& w) {
    const bool whole = w.n % 8 == 0 && w.columns() % 8 == 0;
    return whole && table_fits(w) && (w.n + 63) / 64 * 10 >= processors() * 9 ? 8 : 4;
}

template <typename T, typename Code, int Width, bool InShared, int Run>
cudaError_t launch_few(const T* x, const PqWeight& w, const CodewordTable& table, const PqOutput& out, int m,
                       cudaStream_t stream) {
    const int sums_bytes = kWarps * m * (8 * Run + 8) * 4;
    const int bytes = table.bytes > sums_bytes ? table.bytes : sums_bytes;
    const dim3 grid((w.n + 8 * Run - 1) / (8 * Run), out.splits);
    const auto of = [&](auto octets, auto whole) {
        return launch(pq_linear_few_kernel<T, Code, Width, InShared, Run, octets, whole>, grid, dim3(kThreads), bytes,
                      stream, x, w, table, out, m);
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    if constexpr (Run == 4)  // see run_of
        if (w.n % 4 != 0 || w.columns() % 8 != 0) return of(two, std::false_type());
    return m <= 8 ? of(one, std::true_type()) : of(two, std::true_type());
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
