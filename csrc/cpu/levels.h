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

    Mask outside(Vec x) const { return qnk::outside(x, low, high); }
};

// A magnitude below which every value lies within the bounds; 0 where there is none.
inline float inner_bound(const Affine& q, float top) {
    const float below = q.zero_point * q.scale, above = (top - q.zero_point) * q.scale;
    const float least = below < above ? below : above;
    return least > 0.0f ? least : 0.0f;
}

// Whether levels are found without a division, exactly: zero points of quantizers are integers up to their top.
inline bool fast(const Affine& q) {
    return Divider::serves(q.scale) && q.zero_point >= 0.0f && q.zero_point < 65536.0f &&
           q.zero_point == static_cast<float>(static_cast<int>(q.zero_point));
}

// x -> (clamp(round(x / s + z), 0, top) - z) * s. Fast, x is clamped instead of the code: what lies outside the bounds
// has an outermost code within 0.02, as their ends have. What rounding adds is taken away together with z.
template <bool Fast>
class Nearest {
  public:
    Nearest(const Affine& q, float top)
        : bounds_(q, top), divider_(q.scale), scale_(splat(q.scale)), zero_(splat(q.zero_point)), top_(splat(top)),
          magic_and_zero_(round_magic() + zero_) {}

    const Bounds& bounds() const { return bounds_; }

    // Inside: no x lies outside the bounds.
    template <bool Inside = false, int N>
    __attribute__((always_inline)) void apply(Vec (&x)[N]) const {
        if (Fast) {
            if (!Inside) each<N>([&](int v) { x[v] = min(bounds_.high, max(bounds_.low, x[v])); });
            divider_.fast_inside(x);
            each<N>([&](int v) { x[v] = x[v] + zero_; });
            each<N>([&](int v) { x[v] = x[v] + round_magic(); });
            each<N>([&](int v) { x[v] = (x[v] - magic_and_zero_) * scale_; });
        } else {
            each<N>([&](int v) { x[v] = min(top_, max(splat(0.0f), divider_.exact(x[v]) + zero_)); });
            each<N>([&](int v) { x[v] = (round_even(x[v]) - zero_) * scale_; });
        }
    }

  private:
    Bounds bounds_;
    Divider divider_;
    Vec scale_, zero_, top_, magic_and_zero_;
};

// y_i <- the level nearest to x_i, of `count` elements. seen(i, lanes, bounds, x) is called with each vector of them.
template <bool Fast, typename In, typename Out, typename Seen>
void nearest_run(const In* x, Out* y, int64_t count, const Affine& q, float top, const Seen& seen) {
    const Nearest<Fast> nearest(q, top);
    by_batch(count, [&](int64_t i, int lanes, auto size) __attribute__((always_inline)) {
        Vec value[size];
        each<size>([&](int v) {
            value[v] = load_first(x + i + v * kLanes, lanes);
            seen(i + v * kLanes, lanes, nearest.bounds(), value[v]);
        });
        nearest.apply(value);
        each<size>([&](int v) { store_first(y + i + v * kLanes, value[v], lanes); });
    });
}

template <typename In, typename Out, typename Seen>
void to_nearest(const In* x, Out* y, int64_t count, const Affine& q, float top, const Seen& seen) {
    if (fast(q))
        nearest_run<true>(x, y, count, q, top, seen);
    else
        nearest_run<false>(x, y, count, q, top, seen);
}

// x, within the range of the quantizer, -> the level below x / s + z, or the next one where draw + 1/2 is below 2^16 of
// what lies between.
template <bool Fast>
class Random {
  public:
    Random(const Affine& q, float top)
        : divider_(q.scale), scale_(splat(q.scale)), zero_(splat(q.zero_point)), top_(splat(top)) {}

    template <int N>
    __attribute__((always_inline)) void apply(Vec (&x)[N], const Vec (&draw)[N]) const {
        const Vec none = splat(0.0f), one = splat(1.0f), units = splat(65536.0f), minus_half = splat(-0.5f);
        Vec whole[N];
        if (Fast)
            divider_.fast_inside(x);
        else
            each<N>([&](int v) { x[v] = divider_.exact(x[v]); });
        each<N>([&](int v) { x[v] = x[v] + zero_; });
        each<N>([&](int v) { whole[v] = floor(x[v]); });
        each<N>([&](int v) {  // both operations of the fused one are exact
            const Mask up = less(draw[v], fma(x[v] - whole[v], units, minus_half));
            x[v] = select(up, whole[v] + one, whole[v]);
        });
        each<N>([&](int v) { x[v] = (min(top_, max(none, x[v])) - zero_) * scale_; });
    }

  private:
    Divider divider_;
    Vec scale_, zero_, top_;
};

// y_i <- a random one of the levels next to x_i. first: number of the first element, of which the draw is.
template <bool Fast, typename In, typename Out>
void random_run(const In* x, Out* y, int64_t first, int64_t count, const Affine& q, float top, Draws& draws) {
    const Random<Fast> random(q, top);
    for (int64_t i = 0; i < count;) {
        const int64_t left = kDrawn - (first + i) % kDrawn, here = left < count - i ? left : count - i;
        const uint16_t* drawn = draws.from(first + i);
        by_batch(here, [&](int64_t j, int lanes, auto size) __attribute__((always_inline)) {
            Vec value[size], draw[size];
            each<size>([&](int v) {
                value[v] = load_first(x + i + j + v * kLanes, lanes);
                draw[v] = load_first(drawn + j + v * kLanes, lanes);
            });
            random.apply(value, draw);
            each<size>([&](int v) { store_first(y + i + j + v * kLanes, value[v], lanes); });
        });
        i += here;
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
