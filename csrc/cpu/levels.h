// Values to the levels of a quantizer: to the nearest one, or to a random one of the two next to each.
#pragma once

#include "common/affine.h"
#include "cpu/divider.h"
#include "cpu/noise_bits.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

// The values that have a level within half a step, as an interval: (0 - z) * s to (top - z) * s.
struct Bounds {
    Vec low, high;

    Bounds(const Affine& q, float top)
        : low(splat((0.0f - q.zero_point) * q.scale)), high(splat((top - q.zero_point) * q.scale)) {}

    Mask outside(Vec x) const { return less(x, low) | less(high, x); }
};

// y_i = (clamp(round(x_i / s + z), 0, top) - z) * s of `count` elements. seen(i, lanes, bounds, x) is called with each
// vector of them. Fast, without a division, x is clamped instead of the code: what lies outside the bounds has an
// outermost code within 0.01, as their ends have.
template <bool Fast, typename In, typename Out, typename Seen>
void nearest_run(const In* x, Out* y, int64_t count, const Affine& q, float top, const Seen& seen) {
    const Vec scale = splat(q.scale), zero = splat(q.zero_point), limit = splat(top), none = splat(0.0f);
    const Bounds bounds(q, top);
    const Divider divider(q.scale);
    auto quantized = [=](Vec value) {
        if (Fast) {
            const Vec inside = min(bounds.high, max(bounds.low, value));
            return (round_even(divider.fast_inside(inside) + zero) - zero) * scale;
        }
        const Vec clamped = min(limit, max(none, divider.exact(value) + zero));
        return (round_even(clamped) - zero) * scale;
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vec value = load(x + i);
        seen(i, kLanes, bounds, value);
        store(y + i, quantized(value));
    }
    if (const int rest = static_cast<int>(count - i)) {
        const Vec value = load_first(x + i, rest);
        seen(i, rest, bounds, value);
        store_first(y + i, quantized(value), rest);
    }
}

template <typename In, typename Out, typename Seen>
void to_nearest(const In* x, Out* y, int64_t count, const Affine& q, float top, const Seen& seen) {
    if (Divider::serves(q.scale))
        nearest_run<true>(x, y, count, q, top, seen);
    else
        nearest_run<false>(x, y, count, q, top, seen);
}

// The same, of x within the range of the quantizer, to the level below x_i / s + z, or to the next one where
// draw + 1/2 is below 2^16 of what lies between. `first`: number of the first element, of which the draw is.
template <bool Fast, typename In, typename Out>
void random_run(const In* x, Out* y, int64_t first, int64_t count, const Affine& q, float top, Draws& draws) {
    const Vec scale = splat(q.scale), zero = splat(q.zero_point), limit = splat(top), none = splat(0.0f);
    const Vec one = splat(1.0f), units = splat(65536.0f), minus_half = splat(-0.5f);
    const Divider divider(q.scale);
    // constants are captured by value: they stay in registers
    auto quantized = [=](Vec value, Vec draw) {
        const Vec code = (Fast ? divider.fast_inside(value) : divider.exact(value)) + zero, whole = floor(code);
        const Mask up = less(draw, fma(code - whole, units, minus_half));  // where both operations are exact
        return (min(limit, max(none, select(up, whole + one, whole))) - zero) * scale;
    };
    for (int64_t i = 0; i < count;) {
        const int64_t skip = (first + i) % kDrawn;
        const int64_t stop = i + kDrawn - skip < count ? i + kDrawn - skip : count;
        const uint16_t* drawn = draws.from(first + i);
        for (; i + kLanes <= stop; i += kLanes, drawn += kLanes)
            store(y + i, quantized(load(x + i), load(drawn)));
        if (const int rest = static_cast<int>(stop - i))
            store_first(y + i, quantized(load_first(x + i, rest), load_first(drawn, rest)), rest);
        i = stop;
    }
}

template <typename In, typename Out>
void to_random(const In* x, Out* y, int64_t first, int64_t count, const Affine& q, float top, Draws& draws) {
    if (Divider::serves_small(q.scale))
        random_run<true>(x, y, first, count, q, top, draws);
    else
        random_run<false>(x, y, first, count, q, top, draws);
}

// Elements first to first + count of x [..], within the range of q, at its levels: random ones where there are draws.
template <typename In, typename Out>
void to_level(const In* x, Out* y, int64_t first, int64_t count, const Affine& q, float top, Draws* draws) {
    if (draws)
        to_random(x + first, y + first, first, count, q, top, *draws);
    else
        to_nearest(x + first, y + first, count, q, top, [](auto&&...) {});
}

}  // namespace QNK_ISA
}  // namespace qnk
