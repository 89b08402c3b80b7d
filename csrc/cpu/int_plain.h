// Packed integer weights with plain loops, on any instruction set: decoded a row at a time, into cache.
#pragma once

#include "common/affine.h"
#include "cpu/int_decode.h"
#include "cpu/parallel.h"
#include "qnkernels.h"

namespace qnk {
inline namespace QNK_ISA {

// to [n] <- from [n] in fp32
template <typename T>
void widen(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    for (; i < n; ++i) to[i] = to_float(from[i]);
}

inline float dot(const float* a, const float* b, int64_t n) {
    Vec total[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int u = 0; u < 4; ++u)
            total[u] = fma(load(a + i + u * kLanes), load(b + i + u * kLanes), total[u]);
    for (; i + kLanes <= n; i += kLanes) total[0] = fma(load(a + i), load(b + i), total[0]);
    float result = sum((total[0] + total[1]) + (total[2] + total[3]));
    for (; i < n; ++i) result += a[i] * b[i];
    return result;
}

// y [m, n] = x [m, k] times the decoded weight.
template <typename T>
int multiply_decoded(const T* x, const Packed& w, const float* bias, T* y, int64_t m) {
    const Buffer<float> rows(m * w.k), decoded(max_threads() * w.k);
    if (!rows || !decoded) return QNK_NO_MEMORY;
    widen(x, m * w.k, rows.get());
    const Columns all(w, 0, w.k);
    parallel_for(w.n, 16, [&](int64_t begin, int64_t end, int thread) {
        float* row = decoded.get() + thread * w.k;
        for (int64_t r = begin; r < end; ++r) {
            decode(w, r, all, row);
            for (int64_t t = 0; t < m; ++t)
                y[t * w.n + r] = from_float<T>(dot(rows.get() + t * w.k, row, w.k) + (bias ? bias[r] : 0.0f));
        }
    });
    return QNK_OK;
}

// The same over 8-bit codes of x, less their zero points: exact sums in 32-bit integers.
class LevelProduct {
  public:
    explicit LevelProduct(const Packed& w) : w_(w) {}

    template <typename T>
    int multiply(const T* x, const float* x_scale, const float* x_zero_point, const float* bias, T* y, int64_t m) {
        const Buffer<int16_t> levels(m * w_.k), rows(max_threads() * w_.k);
        const Buffer<float> scales(m);
        if (!levels || !rows || !scales) return QNK_NO_MEMORY;
        parallel_for(m, (16384 + w_.k) / (w_.k + 1), [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t)
                scales.get()[t] = quantize(x + t * w_.k, x_scale, x_zero_point, levels.get() + t * w_.k);
        });
        parallel_for(w_.n, 16, [&](int64_t begin, int64_t end, int thread) {
            int16_t* row = rows.get() + thread * w_.k;
            for (int64_t r = begin; r < end; ++r) {
                for (int64_t i = 0; i < w_.k; ++i)
                    row[i] = static_cast<int16_t>(static_cast<int>(unpack_code(w_.row(r), i, w_.bits)) -
                                                  w_.zero_point(r, i / w_.group_size()));
                for (int64_t t = 0; t < m; ++t) {
                    const float value = sum(levels.get() + t * w_.k, row, r) * scales.get()[t];
                    y[t * w_.n + r] = from_float<T>(bias ? value + bias[r] : value);
                }
            }
        });
        return QNK_OK;
    }

  private:
    // Levels of a row, and its scale; NaN and zeros where it has no quantizer.
    template <typename T>
    float quantize(const T* x, const float* x_scale, const float* x_zero_point, int16_t* levels) const {
        Extremes range;
        for (int64_t i = 0; i < w_.k; ++i) range.add(to_float(x[i]));
        const Affine quantizer = x_scale ? Affine{*x_scale, *x_zero_point} : affine_over(range.low, range.high, 255.0f, false);
        const bool finite = range.low == range.low && quantizer.scale - quantizer.scale == 0.0f;
        for (int64_t i = 0; i < w_.k; ++i)
            levels[i] = finite ? static_cast<int16_t>(quantize_code(to_float(x[i]), quantizer.scale, quantizer.zero_point, 255.0f) -
                                                      quantizer.zero_point)
                               : int16_t{0};
        return finite ? quantizer.scale : bits_float(0x7fc00000u);
    }

    float sum(const int16_t* x, const int16_t* row, int64_t r) const {
        float total = 0.0f;
        for (int64_t g = 0; g < w_.groups; ++g)
            for (int64_t begin = g * w_.group_size(), end = begin + w_.group_size(); begin < end; begin += kExactColumns) {
                const int64_t stop = begin + kExactColumns < end ? begin + kExactColumns : end;
                int32_t exact = 0;
                for (int64_t i = begin; i < stop; ++i) exact += x[i] * row[i];
                total = total + static_cast<float>(exact) * w_.scale[r * w_.groups + g];
            }
        return total;
    }

    const Packed& w_;
};

}  // namespace QNK_ISA
}  // namespace qnk
