// Smallest and largest value, with NaN propagating.
#pragma once

#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

struct Extremes {
    float low = bits_float(0x7f800000u), high = bits_float(0xff800000u);  // of nothing: inf, -inf

    void add(const Extremes& other) {  // a NaN on either side stays
        if (low == low && !(other.low >= low)) low = other.low;
        if (high == high && !(other.high <= high)) high = other.high;
    }

    void add(float value) {
        Extremes one;
        one.low = one.high = value;
        add(one);
    }
};

// Of n consecutive values.
template <typename T>
Extremes extremes(const T* x, int64_t n) {
    Extremes result;
    int64_t i = 0;
    if (n >= kLanes) {
        Vec low[4], high[4];
        for (int u = 0; u < 4; ++u) low[u] = high[u] = load(x);
        Mask nan = is_nan(low[0]);
        for (; i + 4 * kLanes <= n; i += 4 * kLanes)
            for (int u = 0; u < 4; ++u) {
                const Vec value = load(x + i + u * kLanes);
                low[u] = min(value, low[u]);
                high[u] = max(value, high[u]);
                nan |= is_nan(value);
            }
        for (; i + kLanes <= n; i += kLanes) {
            const Vec value = load(x + i);
            low[0] = min(value, low[0]);
            high[0] = max(value, high[0]);
            nan |= is_nan(value);
        }
        result.low = min_of(min(min(low[0], low[1]), min(low[2], low[3])));
        result.high = max_of(max(max(high[0], high[1]), max(high[2], high[3])));
        if (nan) result.low = result.high = bits_float(0x7fc00000u);
    }
    for (; i < n; ++i) result.add(to_float(x[i]));
    return result;
}

}  // namespace QNK_ISA
}  // namespace qnk
