// A step of Lloyd's k-means: the nearest centroid of each point, and sums of the points by centroid.
//
// Points are read once: n * d * 4 bytes. Operations: see nearest.h; the sums take a conversion to 64-bit fixed point and
// an addition per coordinate. Fixed-point sums do not depend on the order or the number of threads.
#include <stdlib.h>
#include <string.h>

#include "cpu/kernels.h"
#include "cpu/nearest.h"
#include "cpu/parallel.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

// round(value * unit), half to even
inline int64_t fixed_point(float value, double unit) {
    return static_cast<int64_t>(__builtin_llrint(static_cast<double>(value) * unit));
}

// Sums that do not fit wrap around, whatever their order.
inline void add_to(int64_t& to, int64_t term) {
    to = static_cast<int64_t>(static_cast<uint64_t>(to) + static_cast<uint64_t>(term));
}

struct Sums {
    int64_t* sums;  // [k, d]
    int64_t* mass;  // [k]
    int64_t d;
    double unit, weight_unit;

    void add(const float* x, int32_t code, float weight) const {
        int64_t* to = sums + code * d;
#if defined(__AVX512DQ__)
        const __m512d units = _mm512_set1_pd(unit);
        const __m256 factor = _mm256_set1_ps(weight);
        int64_t j = 0;
        for (; j + 8 <= d; j += 8) {
            const __m512i term = rounded(_mm256_mul_ps(_mm256_loadu_ps(x + j), factor), units);
            _mm512_storeu_si512(to + j, _mm512_add_epi64(_mm512_loadu_si512(to + j), term));
        }
        if (j == d) return;
        const __mmask8 lanes = static_cast<__mmask8>((1u << (d - j)) - 1u);
        const __m512i term = rounded(_mm256_mul_ps(_mm256_maskz_loadu_ps(lanes, x + j), factor), units);
        _mm512_mask_storeu_epi64(to + j, lanes, _mm512_add_epi64(_mm512_maskz_loadu_epi64(lanes, to + j), term));
#else
        for (int64_t j = 0; j < d; ++j) add_to(to[j], fixed_point(x[j] * weight, unit));
#endif
    }

#if defined(__AVX512DQ__)
    static __m512i rounded(__m256 term, __m512d units) {
        return _mm512_cvtpd_epi64(_mm512_mul_pd(_mm512_cvtps_pd(term), units));
    }
#endif

    void add_mass(int32_t code, const float* weight) const {
        add_to(mass[code], weight ? fixed_point(*weight, weight_unit) : 1);
    }
};

// The partial sums of each thread: [threads][k * (d + 1) + 1], the last being the objective.
class Partials {
  public:
    Partials(int64_t k, int64_t d, int threads) : k_(k), d_(d), threads_(threads) {
        data_ = static_cast<int64_t*>(calloc(static_cast<size_t>(threads) * size(), sizeof(int64_t)));
    }
    Partials(const Partials&) = delete;
    Partials& operator=(const Partials&) = delete;
    ~Partials() { free(data_); }

    explicit operator bool() const { return data_ != nullptr; }
    int64_t* sums(int thread) const { return data_ + thread * size(); }
    int64_t* mass(int thread) const { return sums(thread) + k_ * d_; }
    int64_t* objective(int thread) const { return mass(thread) + k_; }

    void total(int64_t* sums_out, int64_t* mass_out) const {
        for (int64_t i = 0; i < k_ * d_; ++i) sums_out[i] = over_threads(i);
        for (int64_t i = 0; i < k_; ++i) mass_out[i] = over_threads(k_ * d_ + i);
    }
    int64_t total_objective() const { return over_threads(k_ * (d_ + 1)); }

  private:
    int64_t size() const { return k_ * (d_ + 1) + 1; }
    int64_t over_threads(int64_t i) const {
        int64_t value = 0;
        for (int t = 0; t < threads_; ++t) add_to(value, data_[t * size() + i]);
        return value;
    }

    int64_t k_, d_;
    int threads_;
    int64_t* data_;
};

constexpr int64_t kRun = 8 * kTilePoints;  // points that are looked up, and then added up: each needs the cache for itself

// run(thread, first, count, codes, distances) for each run of points, with their nearest centroids.
template <typename Run>
int for_runs(const float* points, int64_t n, int64_t d, const float* centroids, int64_t k, const Run& run) {
    Codebook codebook;
    if (!codebook.prepare(centroids, k, static_cast<int>(d))) return QNK_NO_MEMORY;
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
        for (int64_t i = n * thread / team; i < n * (thread + 1) / team; ++i) {
            if (codes[i] < 0 || codes[i] >= k) {
                bad_index = true;
                return;
            }
            to.add(points + i * d, codes[i], weights ? weights[i] : 1.0f);
            to.add_mass(codes[i], weights ? weights + i : nullptr);
        }
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
            int64_t total = 0;
            if (!weights) {
                for (int64_t p = 0; p < count; ++p) {
                    to.add(points + (first + p) * d, run_codes[p], 1.0f);
                    ++to.mass[run_codes[p]];
                    add_to(total, fixed_point(distances[p], objective_unit));
                }
            } else {
                for (int64_t p = 0; p < count; ++p) {
                    const float* weight = weights + first + p;
                    to.add(points + (first + p) * d, run_codes[p], *weight);
                    to.add_mass(run_codes[p], weight);
                    add_to(total, fixed_point(distances[p] * *weight, objective_unit));
                }
            }
            add_to(*partials.objective(thread), total);
        });
    if (status != QNK_OK) return status;
    partials.total(sums, mass);
    *objective = partials.total_objective();
    return QNK_OK;
}

}  // namespace QNK_ISA
}  // namespace qnk
