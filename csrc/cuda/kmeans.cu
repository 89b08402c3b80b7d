// A step of Lloyd's k-means: the nearest centroid of each point (nearest.h), sums of the points by centroid
// (fixed_sums.h), or both in one pass over the points.
//
// Estimated for n = 2.1 M, d = 8, K = 256 on an H100 (132 multiprocessors, 1.7 GHz), not measured:
//   floor of memory      75 MB of points and codes at 3.35 TB/s: 23 us
//   fp32 multiply-adds   8 and a maximum for each of 5.4e8 pairs, 9.6 issue slots per 32 of them: 0.18 ms at best, and
//                        the index and the sums on top, which is why the scores are taken by tensor cores
//   scores here          118 instructions of a warp per 64 points and 32 codewords, of which 64 on the integer unit at
//                        half rate: 4 cycles of a multiprocessor a point, 38 us; the products beside them 3.3 cycles
//   the rest of a point  8 distances (2 cycles of shared memory), d + 1 sums (2 or 3): 60 to 95 us for a whole step
// 126 registers and no spills, 16 warps a multiprocessor (25 % occupancy), 92 KiB of shared memory for a step. Of random
// points 0.2 % have all codewords compared, and 0.9 % more than one group (counted in the emulator).
#include <math.h>

#include <algorithm>

#include "cuda/fixed_sums.h"
#include "cuda/nearest.h"
#include "cuda/status.h"

namespace qnk {
namespace {

constexpr int kUpdateThreads = 512;

struct Points {
    const float* x;  // [n, d]
    int64_t n;
    int d;
    bool pieces;           // rows can be read by 16 bytes
    const float* weights;  // [n] or null
};

struct Found {
    int32_t* codes;      // [n]
    float* distances;    // [n] or null
    FixedSums sums;      // where wanted
    bool wanted;         // sums and objective
    int64_t* objective;  // []
    double unit;         // of the objective
};

// The codebook in shared memory, from after its Facts to its end, or two tiles of it.
template <int D>
struct Tile {
    static constexpr int kBiasBytes = Nearest<D>::kTileSections * Codebook<D>::kStarts * 4;
    static constexpr int kBytes = kBiasBytes + Nearest<D>::kTileSections * Codebook<D>::kHalves * 4;

    // Starts to copy the sections from `first` on; returns how many there are in the tile.
    __device__ static int fetch(const Codebook<D>& codebook, int first, unsigned char* to) {
        const int64_t left = codebook.sections - first;
        const int count = left < Nearest<D>::kTileSections ? static_cast<int>(left) : Nearest<D>::kTileSections;
        copy(to, codebook.bias() + static_cast<int64_t>(first) * Codebook<D>::kStarts, count * Codebook<D>::kStarts * 4);
        copy(to + kBiasBytes, codebook.halves() + static_cast<int64_t>(first) * Codebook<D>::kHalves,
             count * Codebook<D>::kHalves * 4);
        return count;
    }

    __device__ static void copy(unsigned char* to, const void* from, int64_t bytes) {
        for (int64_t i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
            cp_async_16(to + i, static_cast<const unsigned char*>(from) + i);
        cp_async_commit();
    }
};

// Point i with coordinates x [d] has been found; by its four lanes.
__device__ __forceinline__ void keep(const Points& points, const Found& found, int64_t i, const float* x, int32_t code,
                                     float distance, int64_t& objective) {
    const bool leader = threadIdx.x % 4 == 0;
    if (leader) {
        found.codes[i] = code;
        if (found.distances) found.distances[i] = distance;
    }
    if (!found.wanted) return;
    const bool weighted = points.weights != nullptr;
    const float weight = weighted ? points.weights[i] : 1.0f;
    found.sums.add_point(x, code, weighted, weight);
    if (leader) objective += fixed_point(weighted ? distance * weight : distance, found.unit);
}

// Each warp takes Nearest<D>::kRows points at a time. Resident: the whole codebook is in shared memory, and warps go their
// own ways; otherwise tiles of it are read in turn by all warps of the block.
// Shared memory: codebook or two tiles; Scratch of each warp; the table of sums.
template <int D, bool Resident>
__global__ void __launch_bounds__(Nearest<D>::kWarps * 32, 1)
    kmeans_search_kernel(Points points, Codebook<D> codebook, int64_t k, Found found) {
    using Search = Nearest<D>;
    QNK_SHARED_MEMORY(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t codebook_bytes = Resident ? codebook.sections * Codebook<D>::kSectionBytes : 2 * Tile<D>::kBytes;
    if (found.wanted) found.sums.open();
    auto& scratch = reinterpret_cast<typename Search::Scratch*>(memory + codebook_bytes)[warp];
    for (int i = lane; i < Search::kRows * Search::kStride; i += 32) scratch.x[i] = 0.0f;  // also beyond d
    const float* bias = reinterpret_cast<const float*>(memory);
    const uint32_t* halves = reinterpret_cast<const uint32_t*>(bias + codebook.sections * Codebook<D>::kStarts);
    typename Search::Rows rows{codebook.rows(), k};
    if (Resident) {
        Tile<D>::copy(memory, codebook.bias(), codebook_bytes);
        cp_async_wait<0>();
        rows.rows = reinterpret_cast<const float*>(halves + codebook.sections * Codebook<D>::kHalves);
    }
    __syncthreads();

    int64_t objective = 0;
    const int64_t together = static_cast<int64_t>(warps) * Search::kRows;  // points of the block
    for (int64_t at = blockIdx.x * together; at < points.n; at += gridDim.x * together) {
        const int64_t first = at + warp * Search::kRows, left = points.n - first;
        const int count = left < 0 ? 0 : left < Search::kRows ? static_cast<int>(left) : Search::kRows;
        if (Resident && count == 0) break;
        Search::load(points.x + first * points.d, count, points.d, points.pieces, scratch);
        if (k <= kGroup) {
            Search::only_group(scratch);
        } else if (Resident) {
            Search::groups(codebook.facts(), scratch, [&](const auto& tile) {
                const int sections = static_cast<int>(codebook.sections);
                for (int s = 0; s < sections; s += Search::kTileSections)
                    tile(s, min(sections - s, Search::kTileSections), bias + s * Codebook<D>::kStarts,
                         halves + s * Codebook<D>::kHalves);
            });
        } else {
            Search::groups(codebook.facts(), scratch, [&](const auto& tile) {
                int count_here = Tile<D>::fetch(codebook, 0, memory), buffer = 0;
                for (int s = 0; s < codebook.sections; s += Search::kTileSections, buffer ^= 1) {
                    cp_async_wait<0>();
                    __syncthreads();  // all of the tile is there, and all are done with the other
                    const unsigned char* here = memory + buffer * Tile<D>::kBytes;
                    const int count_scanned = count_here, next = s + Search::kTileSections;
                    if (next < codebook.sections)
                        count_here = Tile<D>::fetch(codebook, next, memory + (buffer ^ 1) * Tile<D>::kBytes);
                    tile(s, count_scanned, reinterpret_cast<const float*>(here),
                         reinterpret_cast<const uint32_t*>(here + Tile<D>::kBiasBytes));
                }
                __syncthreads();
            });
        }
        for (int slot = 0; slot < Search::kSlots; ++slot) {
            const uint64_t key = Search::nearest(scratch, slot, rows);
            const int row = slot * 8 + lane / 4;
            if (row < count)
                keep(points, found, first + row, scratch.x + row * Search::kStride, static_cast<int32_t>(key & 0xffffffffu),
                     __uint_as_float(static_cast<uint32_t>(key >> 32)), objective);
        }
        __syncwarp();
    }
    if (!found.wanted) return;
    for (int step = 16; step > 0; step /= 2) objective += __shfl_xor_sync(0xffffffffu, objective, step);
    if (lane == 0 && objective != 0)
        atomicAdd(reinterpret_cast<unsigned long long*>(found.objective), static_cast<unsigned long long>(objective));
    __syncthreads();
    found.sums.close();
}

// sums, masses of points by the given codes, of which those outside [0, k) are left out.
__global__ void __launch_bounds__(kUpdateThreads)
    kmeans_update_kernel(Points points, const int32_t* __restrict__ codes, FixedSums sums) {
    sums.open();
    __syncthreads();
    const int64_t stride = static_cast<int64_t>(gridDim.x) * (kUpdateThreads / 4);
    for (int64_t i = blockIdx.x * static_cast<int64_t>(kUpdateThreads / 4) + threadIdx.x / 4; i < points.n; i += stride) {
        const int32_t code = codes[i];
        if (code < 0 || code >= sums.k) continue;
        const bool weighted = points.weights != nullptr;
        sums.add_point(points.x + i * points.d, code, weighted, weighted ? points.weights[i] : 1.0f);
    }
    __syncthreads();
    sums.close();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A table per block pays where many points are added to each of its entries.
bool table_pays(int64_t n, int64_t k) { return n >= 16 * k; }

template <int D>
int search(const Points& points, const float* centroids, int64_t k, void* work, Found found, cudaStream_t stream) {
    using Search = Nearest<D>;
    const Codebook<D> codebook(work, k);
    cudaError_t error = launch(kmeans_mean_kernel, D, kMeanThreads, 0, stream, centroids, k, points.d,
                               codebook.facts());
    if (error != cudaSuccess) return cuda_status(error);
    Cleared cleared{};
    if (found.wanted) cleared = {{found.sums.sums, found.sums.mass, found.objective}, {k * points.d, k, 1}};
    const int64_t prepared = ceil_div(codebook.sections * kSection, kPrepareThreads);
    error = launch(kmeans_prepare_kernel<D>, static_cast<unsigned>(prepared), kPrepareThreads, 0, stream, centroids, k,
                   points.d, codebook, cleared);
    if (error != cudaSuccess || points.n == 0) return cuda_status(error);

    // all multiprocessors in as few rounds as kWarps on each need, and then no more warps than fill the rounds
    const int64_t tasks = ceil_div(points.n, Search::kRows), most = static_cast<int64_t>(processors()) * Search::kWarps;
    const int64_t warps = ceil_div(tasks, ceil_div(tasks, most) * processors());
    const int64_t grid = std::min<int64_t>(ceil_div(tasks, warps), processors());
    const int64_t limit = shared_memory_limit(), scratch = warps * static_cast<int64_t>(sizeof(typename Search::Scratch));
    const int64_t whole = codebook.sections * Codebook<D>::kSectionBytes, tiles = 2 * Tile<D>::kBytes;
    const int64_t sums = FixedSums::table_bytes(k, points.d);
    // what matters most first: the table, without which each point costs d + 1 atomics in the L2 cache
    const bool table = found.wanted && table_pays(points.n, k) && std::min(whole, tiles) + sums + scratch <= limit;
    const bool resident = whole + scratch + (table ? sums : 0) <= limit;
    const int64_t before = (resident ? whole : tiles) + scratch;
    if (table) found.sums.table = static_cast<int>(before);
    const auto kernel = resident ? kmeans_search_kernel<D, true> : kmeans_search_kernel<D, false>;
    error = launch(kernel, static_cast<unsigned>(grid), static_cast<unsigned>(warps) * 32,
                   static_cast<size_t>(before + (table ? sums : 0)), stream, points, codebook, k, found);
    return cuda_status(error);
}

int search_any(const Points& points, const float* centroids, int64_t k, void* work, const Found& found, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (points.d <= 8) return search<8>(points, centroids, k, work, found, on);
    if (points.d <= 16) return search<16>(points, centroids, k, work, found, on);
    if (points.d <= 32) return search<32>(points, centroids, k, work, found, on);
    return search<64>(points, centroids, k, work, found, on);
}

Points points_of(const float* x, const float* weights, int64_t n, int64_t d) {
    return {x, n, static_cast<int>(d), d % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0, weights};
}

FixedSums sums_of(int64_t* sums, int64_t* mass, int64_t d, int64_t k, int exponent, int weight_exponent) {
    return {sums, mass, k, static_cast<int>(d), ldexp(1.0, exponent), ldexp(1.0, weight_exponent),
            FixedSums::kNoTable};
}

}  // namespace
}  // namespace qnk

int qnk_cuda_kmeans_work_bytes(int64_t d, int64_t k) {
    const int64_t bytes = d <= 8    ? qnk::Codebook<8>::bytes(k)
                          : d <= 16 ? qnk::Codebook<16>::bytes(k)
                          : d <= 32 ? qnk::Codebook<32>::bytes(k)
                                    : qnk::Codebook<64>::bytes(k);
    return static_cast<int>(bytes);
}

int qnk_cuda_kmeans_assign(const float* points, int64_t n, int64_t d, const float* centroids, int64_t k, void* work,
                           int32_t* codes, float* distances, void* stream) {
    if (n == 0) return QNK_OK;
    qnk::Found found{};
    found.codes = codes, found.distances = distances;
    return qnk::search_any(qnk::points_of(points, nullptr, n, d), centroids, k, work, found, stream);
}

int qnk_cuda_kmeans_update(const float* points, const int32_t* codes, const float* weights, int64_t n, int64_t d, int64_t k,
                           int exponent, int weight_exponent, int64_t* sums, int64_t* mass, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    cudaError_t error = cudaMemsetAsync(sums, 0, static_cast<size_t>(8 * k * d), on);
    if (error == cudaSuccess) error = cudaMemsetAsync(mass, 0, static_cast<size_t>(8 * k), on);
    if (error != cudaSuccess || n == 0) return qnk::cuda_status(error);
    const int64_t bytes = qnk::FixedSums::table_bytes(k, d), limit = qnk::shared_memory_limit();
    const bool table = qnk::table_pays(n, k) && bytes <= limit;
    const int64_t blocks = qnk::processors() * (table ? std::min<int64_t>(limit / bytes, 4) : 4);
    const int64_t grid = std::min(blocks, qnk::ceil_div(n, qnk::kUpdateThreads / 4));
    qnk::FixedSums to = qnk::sums_of(sums, mass, d, k, exponent, weight_exponent);
    if (table) to.table = 0;
    return qnk::cuda_status(qnk::launch(qnk::kmeans_update_kernel, static_cast<unsigned>(grid), qnk::kUpdateThreads,
                                        static_cast<size_t>(table ? bytes : 0), on,
                                        qnk::points_of(points, weights, n, d), codes, to));
}

int qnk_cuda_kmeans_step(const float* points, const float* weights, int64_t n, int64_t d, const float* centroids, int64_t k,
                         int exponent, int weight_exponent, int objective_exponent, void* work, int32_t* codes,
                         int64_t* sums, int64_t* mass, int64_t* objective, void* stream) {
    qnk::Found found{};
    found.codes = codes, found.wanted = true, found.objective = objective;
    found.sums = qnk::sums_of(sums, mass, d, k, exponent, weight_exponent);
    found.unit = ldexp(1.0, objective_exponent);
    return qnk::search_any(qnk::points_of(points, weights, n, d), centroids, k, work, found, stream);
}
