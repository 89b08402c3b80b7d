// A codebook laid out for the search of nearest.h: codewords less their mean, as tensor cores read them, and rows of the
// codewords themselves for exact distances. Two kernels, launched before each search; the floor is their launches.
//
// Scores are taken of the shifted, scaled c' = (c - shift) * scale, with scale the power of two that brings all |c'| to
// at most 1, rounded to fp16. Sums start at bias = kBias - |c'|^2 / 2. Because the c' have mean 0, some codeword has
// x.c' >= 0, whatever x: the best score is above kBias - 1/2, and scores can be compared as integers.
#pragma once

#include "cuda/device.h"

namespace qnk {

constexpr int kMaxDimension = 64;
constexpr int kSection = 32;  // codewords whose scores a warp takes together: 4 products of 8
constexpr int kGroup = 8;     // codewords of a section that one lane of each row sees, in a row
constexpr float kBias = 0.625f;
constexpr float kNoCodeword = -1e30f;  // bias of a column without a codeword
// Beyond these sizes of a codebook fp32 squares are too close to its limits: scale is NaN, and all points are looked up
// by their distances.
constexpr float kSmallest = 0x1p-48f, kLargest = 0x1p48f;

constexpr int64_t sections_of(int64_t k) { return (k + kSection - 1) / kSection; }

struct Facts {
    float shift[kMaxDimension];  // the mean codeword, 0 beyond d
    float reach[kMaxDimension];  // largest |c - shift| of each coordinate
    float scale;
    uint32_t longest;  // largest |c'|, the bits of a float
    uint32_t error;    // largest |c' - fp16(c')|, likewise
    uint32_t unused;   // fills 16 bytes
};

// D: dimension, padded with zeros to 8, 16, 32 or 64. In order, all multiples of 16 bytes:
//   Facts
//   bias    float    [sections][4 products][4 lanes][4]: where the sums of mma_m16n8k16 start
//   halves  uint32_t [sections][D / 8][32 lanes][4 products]: two fp16 each, its operand B. Column 2 a + e of product i is
//           codeword 8 a + 2 i + e, so that lane t sees codewords 8 t to 8 t + 7 of its rows.
//   rows    float    [sections * 32][D], with the pieces of 4 in the order of row_piece; infinite where no codeword is.
template <int D>
struct Codebook {
    unsigned char* memory;  // aligned to 16 bytes
    int64_t sections;

    Codebook(void* work, int64_t k) : memory(aligned(work)), sections(sections_of(k)) {}

    __host__ __device__ Facts* facts() const { return reinterpret_cast<Facts*>(memory); }
    __host__ __device__ float* bias() const { return reinterpret_cast<float*>(facts() + 1); }
    __host__ __device__ uint32_t* halves() const { return reinterpret_cast<uint32_t*>(bias() + sections * kStarts); }
    __host__ __device__ float* rows() const { return reinterpret_cast<float*>(halves() + sections * kHalves); }

    static constexpr int kStarts = 64, kHalves = D / 8 * 32 * 4;  // floats and words of a section
    static constexpr int64_t kSectionBytes = 4 * (kStarts + kHalves + kSection * D);
    // Of `work`, whatever its alignment.
    static constexpr int64_t bytes(int64_t k) {
        return static_cast<int64_t>(sizeof(Facts)) + sections_of(k) * kSectionBytes + 16;
    }

  private:
    static unsigned char* aligned(void* work) {
        return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(work) + 15) / 16 * 16);
    }
};

// Where piece `piece` (4 coordinates) of codeword k lies in its row. Eight lanes that read the same piece of a group, or
// of the halves of two groups, then meet in no bank.
template <int D>
__device__ __forceinline__ int row_piece(int k, int piece) {
    constexpr int kDrop = D == 8 ? 2 : D == 16 ? 1 : 0;
    return piece ^ ((k & 7) >> kDrop);
}

// Two fp16 in a word, the first in the low half.
__device__ __forceinline__ uint32_t pack_halves(f16 low, f16 high) {
    return static_cast<uint32_t>(__half_as_ushort(high)) << 16 | __half_as_ushort(low);
}

constexpr int kMeanThreads = 256;

// Facts but for their scale, of codewords [k, d]; block j takes coordinate j, and the last ones what pads them.
static __global__ void __launch_bounds__(kMeanThreads)
    kmeans_mean_kernel(const float* __restrict__ codewords, int64_t k, int d, Facts* facts) {
    QNK_SHARED(double, sums, [kMeanThreads / 32]);
    QNK_SHARED(float, reaches, [kMeanThreads / 32]);
    const int j = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (j >= d) {
        if (threadIdx.x == 0) facts->shift[j] = facts->reach[j] = 0.0f;
        return;
    }
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < k; i += kMeanThreads) sum += static_cast<double>(codewords[i * d + j]);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    double total = 0.0;
    for (int w = 0; w < kMeanThreads / 32; ++w) total += sums[w];
    const float shift = static_cast<float>(total / static_cast<double>(k));
    float reach = 0.0f;
    for (int64_t i = threadIdx.x; i < k; i += kMeanThreads) {
        const float distance = fabsf(codewords[i * d + j] - shift);
        if (!(distance <= reach)) reach = distance;  // a NaN stays
    }
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, reach, step);
        if (!(other <= reach)) reach = other;
    }
    if (lane == 0) reaches[warp] = reach;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < kMeanThreads / 32; ++w)
        if (!(reaches[w] <= reach)) reach = reaches[w];
    facts->shift[j] = shift;
    facts->reach[j] = reach;
    if (j == 0) facts->longest = facts->error = 0;
}

// The power of two that brings vectors within `reach` [d] to a length of at most 1; NaN outside the limits of size.
__device__ __forceinline__ float scale_of(const float* reach, int d) {
    float squared = 0.0f;
    for (int j = 0; j < d; ++j) squared = fmaf(reach[j], reach[j], squared);
    const float length = sqrtf(squared);
    if (!(length >= kSmallest && length <= kLargest)) return __uint_as_float(0x7fc00000u);
    const int exponent = static_cast<int>(__float_as_uint(length) >> 23) - 127;  // 2^exponent <= length
    return __uint_as_float(static_cast<uint32_t>(126 - exponent) << 23);
}

constexpr int kPrepareThreads = 128;

// Arrays that become zeros, of the given lengths.
struct Cleared {
    int64_t* values[3];
    int64_t count[3];
};

// The rest of the codebook, one thread per codeword.
template <int D>
__global__ void __launch_bounds__(kPrepareThreads)
    kmeans_prepare_kernel(const float* __restrict__ codewords, int64_t k, int d, Codebook<D> codebook,
                          Cleared cleared) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x;
    for (int array = 0; array < 3; ++array)
        for (int64_t i = first; i < cleared.count[array]; i += static_cast<int64_t>(gridDim.x) * kPrepareThreads)
            cleared.values[array][i] = 0;
    Facts* facts = codebook.facts();
    const float scale = scale_of(facts->reach, d);
    if (first == 0) facts->scale = scale;
    if (first >= codebook.sections * kSection) return;  // whole warps
    const bool real = first < k;
    const int column = static_cast<int>(first % kSection), lane = column / 8 * 8 + column % 2 * 4, product = column % 8 / 2;
    uint32_t* halves = codebook.halves() + first / kSection * Codebook<D>::kHalves + product;
    float4* row = reinterpret_cast<float4*>(codebook.rows() + first * D);
    float squared = 0.0f, lost = 0.0f;
    for (int piece = 0; piece < D / 4; ++piece) {
        float value[4];
        f16 rounded[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int j = piece * 4 + i;
            const float c = real && j < d ? codewords[first * d + j] : 0.0f;
            const float shifted = real && j < d ? (c - facts->shift[j]) * scale : 0.0f;
            rounded[i] = from_float<f16>(shifted);
            const float rest = shifted - to_float(rounded[i]);
            squared = fmaf(shifted, shifted, squared);
            lost = fmaf(rest, rest, lost);
            value[i] = real ? c : __uint_as_float(0x7f800000u);
        }
        row[row_piece<D>(static_cast<int>(first), piece)] = make_float4(value[0], value[1], value[2], value[3]);
        uint32_t* words = halves + (piece / 2 * 32 + lane + piece % 2 * 2) * 4;
        words[0] = pack_halves(rounded[0], rounded[1]);
        words[4] = pack_halves(rounded[2], rounded[3]);
    }
    float* bias = codebook.bias() + first / kSection * Codebook<D>::kStarts + product * 16 + column / 8 * 4 + column % 2;
    bias[0] = bias[2] = real ? kBias - 0.5f * squared : kNoCodeword;
    const uint32_t longest = __reduce_max_sync(0xffffffffu, __float_as_uint(sqrtf(squared)));
    const uint32_t error = __reduce_max_sync(0xffffffffu, __float_as_uint(sqrtf(lost)));
    if (threadIdx.x % 32 == 0) {
        atomicMax(&facts->longest, longest);
        atomicMax(&facts->error, error);
    }
}

}  // namespace qnk
