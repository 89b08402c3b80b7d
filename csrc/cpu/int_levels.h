// Activations as 8-bit codes less their zero point, in words of 16 bits.
#pragma once

#include <string.h>

#include "common/affine.h"
#include "cpu/divider.h"
#include "cpu/extremes.h"

namespace qnk {
inline namespace QNK_ISA {

template <bool Fast, typename T>
void levels_run(const T* x, int64_t k, const Affine& q, int16_t* levels) {
    const Divider divider(q.scale);
    const Vec zero = splat(q.zero_point), top = splat(255.0f), none = splat(0.0f);
    by_batch(k, [&](int64_t i, int lanes, auto size) {
        each<size>([&](int v) {
            const Vec value = load_first(x + i + v * kLanes, lanes);
            const Vec quotient = Fast ? divider.fast(value) : divider.exact(value);
            store_first(levels + i + v * kLanes, round_even(min(top, max(none, quotient + zero))) - zero, lanes);
        });
    });
}

// levels [k] <- those of a row x, by the quantizer given or, null, that of its range. Returns the scale; NaN, with levels of
// 0, where the row has none.
template <typename T>
float quantize_levels(const T* x, int64_t k, const float* x_scale, const float* x_zero_point, int16_t* levels) {
    const Extremes range = extremes(x, k);
    const Affine q = x_scale ? Affine{*x_scale, *x_zero_point} : affine_over(range.low, range.high, 255.0f, false);
    if (range.low != range.low || q.scale - q.scale != 0.0f) {
        memset(levels, 0, static_cast<size_t>(k) * sizeof(int16_t));
        return bits_float(0x7fc00000u);
    }
    if (Divider::serves(q.scale))
        levels_run<true>(x, k, q, levels);
    else
        levels_run<false>(x, k, q, levels);
    return q.scale;
}

}  // namespace QNK_ISA
}  // namespace qnk
