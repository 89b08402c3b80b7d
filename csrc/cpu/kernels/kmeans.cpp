// A step of Lloyd's k-means: the nearest centroid of each point, and sums of the points by centroid.
//
// Points are read once: n * d * 4 bytes. Operations: see nearest.h; the sums take a conversion to 64-bit fixed point and
// an addition per coordinate. Fixed-point sums do not depend on the order or the number of threads.
#include <stdlib.h>
#include <string.h>

#include "cpu/kernels.h"
#include "cpu/kmeans_sums.h"
#include "cpu/nearest.h"
#include "cpu/nearest_bounds.h"
#include "cpu/parallel.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int64_t kRun = 8 * kTilePoints;  // points that are looked up, and then added up: each needs the cache for itself

// run(thread, first, count, codes, distances) for each run of points, with their nearest centroids.
template <typename Run>
int for_runs(const float* points, int64_t n, int64_t d, const float* centroids, int64_t k, const Run& run) {
    Codebook codebook;
    float sample[kSample * kMaxDimension];
    const int sampled = sample_of(points, n, d, sample);
    if (!codebook.prepare(centroids, k, static_cast<int>(d), sample, sampled)) return QNK_NO_MEMORY;
    bool no_memory = false;
    parallel_for(n, kTilePoints, [&](int64_t begin, int64_t end, int thread) {
        void* work = aligned_alloc(64, static_cast<size_t>(codebook.work_bytes()));
        if (!work) {
            no_memory = true;
            return;
        }
        const Tiles scope;
        int32_t codes[kRun];
        float distances[kRun];
        for (int64_t first = begin; first < end; first += kRun) {
            const int64_t count = end - first < kRun ? end - first : kRun;
            for (int64_t at = 0; at < count; at += kTilePoints)
                codebook.nearest(points + (first + at) * d, static_cast<int>(count - at < kTilePoints ? count - at : kTilePoints),
                                 work, codes + at, distances + at);
            run(thread, first, count, codes, distances);
        }
        free(work);
    });
    return no_memory ? QNK_NO_MEMORY : QNK_OK;
}

}  // namespace

int kmeans_assign(const float* points, int64_t n, int64_t d, const float* centroids, int64_t k, int32_t* codes,
                  float* distances) {
    return for_runs(points, n, d, centroids, k,
                     [&](int, int64_t first, int64_t count, const int32_t* run_codes, const float* run_distances) {
                         memcpy(codes + first, run_codes, sizeof(int32_t) * static_cast<size_t>(count));
                         memcpy(distances + first, run_distances, sizeof(float) * static_cast<size_t>(count));
                     });
}

int kmeans_update(const float* points, const int32_t* codes, const float* weights, int64_t n, int64_t d, int64_t k,
                  int exponent, int weight_exponent, int64_t* sums, int64_t* mass) {
    const int threads = max_threads();
    const Partials partials(k, d, threads);
    if (!partials) return QNK_NO_MEMORY;
    const double unit = __builtin_ldexp(1.0, exponent), weight_unit = __builtin_ldexp(1.0, weight_exponent);
    bool bad_index = false;
    parallel(threads, [&](int thread, int team) {
        const Sums to{partials.sums(thread), partials.mass(thread), d, unit, weight_unit};
        const int64_t begin = n * thread / team, end = n * (thread + 1) / team;
        for (int64_t i = begin; i < end; ++i)
            if (codes[i] < 0 || codes[i] >= k) {
                bad_index = true;
                return;
            }
        to.add(points + begin * d, codes + begin, weights ? weights + begin : nullptr, end - begin);
    });
    if (bad_index) return QNK_BAD_INDEX;
    partials.total(sums, mass);
    return QNK_OK;
}

int kmeans_step(const float* points, const float* weights, int64_t n, int64_t d, const float* centroids, int64_t k,
                int exponent, int weight_exponent, int objective_exponent, int32_t* codes, int64_t* sums,
                int64_t* mass, int64_t* objective) {
    const Partials partials(k, d, max_threads());
    if (!partials) return QNK_NO_MEMORY;
    const double unit = __builtin_ldexp(1.0, exponent), weight_unit = __builtin_ldexp(1.0, weight_exponent);
    const double objective_unit = __builtin_ldexp(1.0, objective_exponent);
    const int status = for_runs(
        points, n, d, centroids, k,
        [&](int thread, int64_t first, int64_t count, const int32_t* run_codes, const float* distances) {
            memcpy(codes + first, run_codes, sizeof(int32_t) * static_cast<size_t>(count));
            const Sums to{partials.sums(thread), partials.mass(thread), d, unit, weight_unit};
            const float* run_weights = weights ? weights + first : nullptr;
            to.add(points + first * d, run_codes, run_weights, count);
            add_to(*partials.objective(thread), fixed_sum(distances, run_weights, count, objective_unit));
        });
    if (status != QNK_OK) return status;
    partials.total(sums, mass);
    *objective = partials.total_objective();
    return QNK_OK;
}

int kmeans_bounded_step(const float* points, const float* weights, int64_t n, int64_t d, const float* centroids, int64_t k,
                        const int32_t* group_of, int64_t groups, const float* travelled, float unit, int exponent,
                        int weight_exponent, int objective_exponent, int32_t* codes, uint16_t* bounds, int64_t* sums,
                        int64_t* mass, int64_t* objective, int64_t* looks) {
    for (int64_t i = 0; i < k; ++i)
        if (group_of[i] < 0 || group_of[i] >= groups) return QNK_BAD_INDEX;
    BoundedCodebook codebook;
    const int threads = max_threads();
    const Partials partials(k, d, threads), looked(0, 0, threads);
    if (!partials || !looked || !codebook.prepare(centroids, k, static_cast<int>(d), group_of, groups, travelled, unit))
        return QNK_NO_MEMORY;
    const double unit_of_sums = __builtin_ldexp(1.0, exponent), weight_unit = __builtin_ldexp(1.0, weight_exponent);
    const double objective_unit = __builtin_ldexp(1.0, objective_exponent);
    bool no_memory = false, bad_index = false;
    parallel_for(n, kBoundTile, [&](int64_t begin, int64_t end) {  // before any of them changes
        for (int64_t p = begin; p < end; ++p)
            if (codes[p] < -1 || codes[p] >= k) bad_index = true;
    });
    if (bad_index) return QNK_BAD_INDEX;
    parallel_for(n, kBoundTile, [&](int64_t begin, int64_t end, int thread) {
        void* work = aligned_alloc(64, static_cast<size_t>((codebook.work_bytes() + 63) / 64 * 64));
        if (!work) {
            no_memory = true;
            return;
        }
        const Sums to{partials.sums(thread), partials.mass(thread), d, unit_of_sums, weight_unit};
        int32_t before[kBoundTile];
        float distances[kBoundTile];
        for (int64_t first = begin; first < end; first += kBoundTile) {
            const int64_t count = end - first < kBoundTile ? end - first : kBoundTile;
            memcpy(before, codes + first, sizeof(int32_t) * static_cast<size_t>(count));
            *looked.objective(thread) += codebook.nearest(points + first * d, static_cast<int>(count), work, codes + first,
                                                          bounds + first * groups, distances);
            for (int64_t p = 0; p < count; ++p)
                if (codes[first + p] != before[p])
                    to.move(points + (first + p) * d, before[p], codes[first + p], weights ? weights + first + p : nullptr);
            const float* run_weights = weights ? weights + first : nullptr;
            add_to(*partials.objective(thread), fixed_sum(distances, run_weights, count, objective_unit));
        }
        free(work);
    });
    if (no_memory) return QNK_NO_MEMORY;
    partials.add_total(sums, mass);
    *objective = partials.total_objective();
    *looks = looked.total_objective();
    return QNK_OK;
}

}  // namespace QNK_ISA
}  // namespace qnk
