// Sums of points by centroid in 64-bit fixed point: they do not depend on the order or the number of threads.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/buffer.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

// round(value * unit), half to even
inline int64_t fixed_point(float value, double unit) {
    return static_cast<int64_t>(__builtin_llrint(static_cast<double>(value) * unit));
}

// Sums that do not fit wrap around, whatever their order.
inline void add_to(int64_t& to, int64_t term) {
    to = static_cast<int64_t>(static_cast<uint64_t>(to) + static_cast<uint64_t>(term));
}

#if defined(__AVX512DQ__)
inline __m512i fixed_points(__m256 values, __m512d units) {
    return _mm512_cvtpd_epi64(_mm512_mul_pd(_mm512_cvtps_pd(values), units));
}
#endif

// Sum of round(distances * weights * unit); without weights all are 1.
inline int64_t fixed_sum(const float* distances, const float* weights, int64_t count, double unit) {
    int64_t total = 0, p = 0;
#if defined(__AVX512DQ__)
    __m512i sum = _mm512_setzero_si512();
    const __m512d units = _mm512_set1_pd(unit);
    for (; p + 8 <= count; p += 8) {
        const __m256 term = _mm256_loadu_ps(distances + p);
        sum = _mm512_add_epi64(sum, fixed_points(weights ? _mm256_mul_ps(term, _mm256_loadu_ps(weights + p)) : term, units));
    }
    total = _mm512_reduce_add_epi64(sum);
#endif
    for (; p < count; ++p) add_to(total, fixed_point(weights ? distances[p] * weights[p] : distances[p], unit));
    return total;
}

struct Sums {
    int64_t* sums;  // [k, d]
    int64_t* mass;  // [k]
    int64_t d;
    double unit, weight_unit;

    // points [count, d] with their codes; without weights [count] all have 1.
    void add(const float* points, const int32_t* codes, const float* weights, int64_t count) const {
        if (weights)
            for (int64_t p = 0; p < count; ++p) add_to(mass[codes[p]], fixed_point(weights[p], weight_unit));
        else
            for (int64_t p = 0; p < count; ++p) ++mass[codes[p]];
#if defined(__AVX512DQ__)
        if (d == 8 && !weights) {
            const __m512d units = _mm512_set1_pd(unit);
            for (int64_t p = 0; p < count; ++p)
                add_vector(sums + codes[p] * 8, fixed_points(_mm256_loadu_ps(points + p * 8), units));
            return;
        }
#endif
        for (int64_t p = 0; p < count; ++p) add_point(points + p * d, codes[p], weights ? weights[p] : 1.0f);
    }

    // Of a point whose code was `from`, or -1 for none, and is `to`.
    void move(const float* x, int32_t from, int32_t to, const float* weight) const {
        const int64_t term = weight ? fixed_point(*weight, weight_unit) : 1;
        if (from >= 0) add_to(mass[from], -term);
        add_to(mass[to], term);
        for (int64_t j = 0; j < d; ++j) {
            const int64_t coordinate = fixed_point(weight ? x[j] * *weight : x[j], unit);
            if (from >= 0) add_to(sums[from * d + j], -coordinate);
            add_to(sums[to * d + j], coordinate);
        }
    }

  private:
    void add_point(const float* x, int32_t code, float weight) const {
        int64_t* to = sums + code * d;
#if defined(__AVX512DQ__)
        const __m512d units = _mm512_set1_pd(unit);
        const __m256 factor = _mm256_set1_ps(weight);
        int64_t j = 0;
        for (; j + 8 <= d; j += 8) add_vector(to + j, fixed_points(_mm256_mul_ps(_mm256_loadu_ps(x + j), factor), units));
        if (j == d) return;
        const __mmask8 lanes = static_cast<__mmask8>((1u << (d - j)) - 1u);
        const __m512i term = fixed_points(_mm256_mul_ps(_mm256_maskz_loadu_ps(lanes, x + j), factor), units);
        _mm512_mask_storeu_epi64(to + j, lanes, _mm512_add_epi64(_mm512_maskz_loadu_epi64(lanes, to + j), term));
#else
        for (int64_t j = 0; j < d; ++j) add_to(to[j], fixed_point(x[j] * weight, unit));
#endif
    }

#if defined(__AVX512DQ__)
    static void add_vector(int64_t* to, __m512i terms) {
        _mm512_storeu_si512(to, _mm512_add_epi64(_mm512_loadu_si512(to), terms));
    }
#endif
};

// The partial sums of each thread: [k * (d + 1) + 1], the last being the objective. Each thread's begin with a cache line,
// so that a point's sums are in one where d divides 8.
class Partials {
  public:
    Partials(int64_t k, int64_t d, int threads) : k_(k), d_(d), threads_(threads), data_(threads, size()) {
        for (int t = 0; data_ && t < threads; ++t) memset(sums(t), 0, static_cast<size_t>(size()) * sizeof(int64_t));
    }

    explicit operator bool() const { return static_cast<bool>(data_); }
    int64_t* sums(int thread) const { return data_.of(thread); }
    int64_t* mass(int thread) const { return sums(thread) + k_ * d_; }
    int64_t* objective(int thread) const { return mass(thread) + k_; }

    void total(int64_t* sums_out, int64_t* mass_out) const {
        for (int64_t i = 0; i < k_ * d_; ++i) sums_out[i] = over_threads(i);
        for (int64_t i = 0; i < k_; ++i) mass_out[i] = over_threads(k_ * d_ + i);
    }
    void add_total(int64_t* sums_out, int64_t* mass_out) const {
        for (int64_t i = 0; i < k_ * d_; ++i) add_to(sums_out[i], over_threads(i));
        for (int64_t i = 0; i < k_; ++i) add_to(mass_out[i], over_threads(k_ * d_ + i));
    }
    int64_t total_objective() const { return over_threads(k_ * (d_ + 1)); }

  private:
    int64_t size() const { return k_ * (d_ + 1) + 1; }
    int64_t over_threads(int64_t i) const {
        int64_t value = 0;
        for (int t = 0; t < threads_; ++t) add_to(value, sums(t)[i]);
        return value;
    }

    int64_t k_, d_;
    int threads_;
    PerThread<int64_t> data_;
};

}  // namespace QNK_ISA
}  // namespace qnk
