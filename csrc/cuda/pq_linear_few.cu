// pq_linear for up to 16 tokens in bf16 or f16: the whole depth of 64 (or 32) outputs in one block of 16 warps.
//
// A warp takes every 16th step of 32 columns: a thread reads the codes of 8 (or 4) adjacent outputs for its octet,
// their codewords from the table, and its part of x; tensor cores multiply, so that 16 tokens cost little more than
// one. The sums of the warps are added in their order, and where there are few outputs, blocks share the depth too.
//
// 8192x8192, d = 8, K = 256 on H100 (132 multiprocessors, 1.7 GHz), 8.4 M codes:
//   codes from memory                       8.4 MB                                    2.5 us
//   codewords from shared memory            134 MB, 128 bytes a cycle                 4.7 us   the bound
//   products                                8 of a step up to 4 tokens, 16 from 5 on: 16 cycles (A100) or 13 for 8
//                                           of them                                   2.4 or 1.9 us, or twice that
//   instructions                            45 of a step and warp (61 for 8 tokens, 65 for 16), 4 a cycle: 1.7 us
//   x from the second level                 16 KiB per block and token, 128 blocks    0.4 us a token
// Measured on H200: 11.9 us, 16.2 us for 16 tokens (with 16 products and 144 instructions a step for one token, two
// products of an output waiting for each other: 15.3 and 22). What else there is: a table of
// products x . codeword takes one 4-byte look-up per code, but random ones collide (3.5 cycles of 32 lanes where
// 16-byte ones of 8 lanes take 4): 4.2 us for one token, as much again for each further one. Products by plain
// threads: 19 instructions a code, 5.5 us for one token, 8 more a token. Up to 128 registers and, for d = 8 or less
// and K up to 256, 33 KiB (sums of 16 tokens: 64 KiB): one block of 512 threads a multiprocessor.
#include "cuda/pq_fragments.cuh"

namespace qnk {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kMinSteps = 2 * kWarps;

// What a warp reads for its steps. Even: n is a multiple of Run, the columns are of 8, and a thread's octets have the
// same place in their blocks. Then nothing needs a check but the number of steps.
template <typename T, typename Code, int Width, int Run, int Tokens, bool Even>
struct FewReader {
    static constexpr int kRows = Tokens == 16 ? 2 : 1;

    const PqWeight& w;
    OctetPlace<Width> place, by;  // place: of the next codes
    int first_output, columns, octet, octets_by;
    const T* rows[kRows];  // of x: tokens g and g + 8, or g / 2
    const Code* codes_at[8 / Width];
    int64_t codes_by;

    __device__ FewReader(const PqWeight& w, const T* x, int m, int first_octet, int octets_by, int first_output)
        : w(w),
          place(first_octet, w.d / Width),
          by(octets_by, w.d / Width),
          first_output(first_output),
          columns(w.columns()),
          octet(first_octet),
          octets_by(octets_by) {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int token = Tokens == 4 ? g / 2 : g + 8 * i;
            // past the last: that one, whose products nobody reads
            rows[i] = x + static_cast<int64_t>(token < m ? token : m - 1) * columns;
            if (Even) rows[i] += octet * 8 + (Tokens == 4 ? g % 2 * 2 : 0);
        }
        if (!Even) return;
        const int output = first_output < w.n ? first_output : w.n - Run;
#pragma unroll
        for (int h = 0; h < 8 / Width; ++h)
            codes_at[h] = static_cast<const Code*>(w.codes) + static_cast<int64_t>(place.block[h]) * w.n + output;
        codes_by = static_cast<int64_t>(by.block[0]) * w.n;
    }

    // Of step `step` from here. Even: where it exists; otherwise codes come step by step.
    __device__ __forceinline__ void load(OctetCodes<Code, Width, Run>& codes, int step, bool exists) {
        if constexpr (Even) {
#pragma unroll
            for (int h = 0; h < 8 / Width; ++h) {
                using Words = decltype(codes.run[h].codes);
                const Code* at = codes_at[h] + codes_by * step;
                if (exists) codes.run[h].codes = *reinterpret_cast<const Words*>(at);
            }
        } else {
            codes.load(w, place, first_output);
            place.advance(by, w.d / Width);
        }
    }
    __device__ __forceinline__ void load(FewX<Tokens>& x, int step, bool exists) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if constexpr (Even) {
                if (exists) read(x, i, rows[i] + static_cast<int64_t>(octets_by * 8) * step);
            } else {
                x.octet[i] = load_octet(rows[i], (octet + octets_by * step) * 8, columns);
            }
        }
    }
    __device__ __forceinline__ void advance(int steps) {
        if constexpr (Even) {
#pragma unroll
            for (int h = 0; h < 8 / Width; ++h) codes_at[h] += codes_by * steps;
#pragma unroll
            for (int i = 0; i < kRows; ++i) rows[i] += static_cast<int64_t>(octets_by * 8) * steps;
        }
        octet += octets_by * steps;
    }

  private:
    static __device__ __forceinline__ void read(FewX<Tokens>& x, int i, const T* from) {
        if constexpr (Tokens == 4) {
            x.word[0] = *reinterpret_cast<const uint32_t*>(from);
            x.word[1] = *reinterpret_cast<const uint32_t*>(from + 4);
        } else {
            x.octet[i] = *reinterpret_cast<const PqWords<4>*>(from);
        }
    }
};

// Tokens: up to 4, 8 or 16. rounds: the steps of a warp. Even: those that every warp has; one more, which comes first,
// is for those that have it.
template <typename T, typename Code, int Width, bool InShared, int Run, int Tokens, bool Even>
__global__ void __launch_bounds__(kThreads, 1)
    pq_linear_few_kernel(const T* __restrict__ x, PqWeight w, CodewordTable table, PqOutput out, int m, int rounds) {
    constexpr int kOutputs = 8 * Run, kParts = 8 / Width;
    // steps whose codes are under way, up to 64 bytes of a thread (32 from 5 tokens on), and whose x is
    constexpr int kCodes = (Tokens == 4 ? 64 : 32) / sizeof(OctetCodes<Code, Width, Run>);
    constexpr int kAhead = kCodes > 8 ? 8 : kCodes < 2 ? 2 : kCodes;
    constexpr int kAheadX = Tokens == 4 && kAhead > 2 ? 4 : 2;
    QNK_SHARED_MEMORY(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_output = blockIdx.x * kOutputs;
    const int pieces = w.d / Width;
    const int stride = kWarps * gridDim.y, steps = (w.columns() + 31) / 32;
    const uint32_t zero = gridDim.z - 1;  // see multiply_few

    using Reader = FewReader<T, Code, Width, Run, Tokens, Even>;
    Reader reader(w, x, m, (blockIdx.y * kWarps + warp) * 4 + t, stride * 4, first_output + g * Run);
    OctetPlace<Width> place = reader.place;
    OctetCodes<Code, Width, Run> codes[kAhead], rest_codes = {};
    FewX<Tokens> octets[kAheadX], rest_x = {};
    const bool rest = Even && rounds * stride < steps;
    bool inside = false;
    if constexpr (Even) {
        if (rest) {
            inside = reader.octet + reader.octets_by * rounds < w.columns() / 8;
            reader.load(rest_codes, rounds, inside);
            reader.load(rest_x, rounds, inside);
        }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) reader.load(codes[i], i, i < rounds);
#pragma unroll
    for (int i = 0; i < kAheadX; ++i) reader.load(octets[i], i, i < rounds);
    Codewords<Width, InShared>::fill(w, table, shared);
    __syncthreads();

    const Codewords<Width, InShared> codewords(w, table, shared);
    typename Codewords<Width, InShared>::Source from[kParts];
    const auto find = [&](auto inside) {
#pragma unroll
        for (int h = 0; h < kParts; ++h) from[h] = codewords.source(place.piece[h], inside(place.block[h]));
    };
    float sums[Run][4] = {};
    if constexpr (Even) {
        if (rest) {
            find([&](int) { return inside; });
            multiply_few<T, false>(sums, codewords, from, rest_codes, rest_x, zero);
        }
        find([](int) { return true; });
    }
    const auto multiply_rounds = [&] {
        for (int left = rounds;; left -= kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (i >= left) return;
                if constexpr (!Even) find([&](int block) { return block < w.blocks; });
                multiply_few<T, Even>(sums, codewords, from, codes[i], octets[i % kAheadX], zero);
                // into the registers just used: none has to be moved
                reader.load(codes[i], i + kAhead, i + kAhead < left);
                reader.load(octets[i % kAheadX], i + kAheadX, i + kAheadX < left);
                if constexpr (!Even) place.advance(reader.by, pieces);
            }
            reader.advance(kAhead);
        }
    };
    multiply_rounds();

    // The table has been read: the sums of all warps, [warp][token][i][of 8 runs], take its place. A token's are a
    // quarter of the banks further than those of the one before.
    constexpr int kTokenWords = kOutputs + 8;
    __syncthreads();
    float* all = reinterpret_cast<float*>(shared);
    if constexpr (Tokens == 4) {
        if (t < m) {
#pragma unroll
            for (int i = 0; i < Run; ++i) all[(warp * m + t) * kTokenWords + i * 8 + g] = sums[i][0] + sums[i][3];
        }
    } else {
#pragma unroll
        for (int half = 0; half < Tokens / 8; ++half) {
            const int token = g + half * 8;
            if (token >= m) continue;
#pragma unroll
            for (int i = 0; i < Run; ++i)
                *reinterpret_cast<float2*>(all + (warp * m + token) * kTokenWords + i * 8 + 2 * t) =
                    make_float2(sums[i][2 * half], sums[i][2 * half + 1]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < m * kOutputs; i += kThreads) {
        const int token = i / kOutputs, output = first_output + i % kOutputs;
        const int of_run = i % Run, run = i % kOutputs / Run;
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

// Whether a thread's octets, every 64th or a multiple of that, have the same place in their blocks, and all runs are
// whole.
bool even(const PqWeight& w, int run) {
    const int width = w.d % 8 ? 4 : 8;
    return w.n % run == 0 && w.columns() % 8 == 0 && kWarps * 4 * (8 / width) % (w.d / width) == 0;
}

// Adjacent outputs of a thread, an eighth of those of a block: fewer where more would leave multiprocessors idle, or
// registers short.
int run_of(const PqWeight& w) {
    return even(w, 8) && table_fits(w) && (w.n + 63) / 64 * 10 >= processors() * 9 ? 8 : 4;
}

template <typename T, typename Code, int Width, bool InShared, int Run>
cudaError_t launch_few(const T* x, const PqWeight& w, const CodewordTable& table, const PqOutput& out, int m,
                       cudaStream_t stream) {
    const int sums_bytes = kWarps * m * (8 * Run + 8) * 4;
    const int bytes = table.bytes > sums_bytes ? table.bytes : sums_bytes;
    const dim3 grid((w.n + 8 * Run - 1) / (8 * Run), out.splits);
    const int steps = (w.columns() + 31) / 32, stride = kWarps * out.splits;
    const auto of = [&](auto tokens, auto even) {
        return launch(pq_linear_few_kernel<T, Code, Width, InShared, Run, tokens, even>, grid, dim3(kThreads), bytes,
                      stream, x, w, table, out, m, even ? w.columns() / 32 / stride : (steps + stride - 1) / stride);
    };
    const std::integral_constant<int, 4> four;
    const std::integral_constant<int, 8> eight;
    const std::integral_constant<int, 16> sixteen;
    if constexpr (Run == 4)  // see run_of
        if (!even(w, Run)) return of(sixteen, std::false_type());
    if (m <= 4) return of(four, std::true_type());
    return m <= 8 ? of(eight, std::true_type()) : of(sixteen, std::true_type());
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
