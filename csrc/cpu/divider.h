// Exact division by one scale, without a division in the loop.
#pragma once

#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

// Division by a scale that many values share. An instruction takes 16 cycles for 16 lanes; the product with the
// correctly rounded reciprocal is within one unit in the last place, and one fused correction of it gives the
// correctly rounded quotient (Markstein, "Computation of elementary functions on the IBM RISC System/6000
// processor", 1990, theorem 5), as long as nothing underflows on the way.
class Divider {
  public:
    explicit Divider(float s) : scale_(splat(s)), minus_scale_(splat(-s)), reciprocal_(splat(1.0f / s)) {}

    // Whether quotients that matter, those above 2^-3, are exact: remainders are then multiples of 2^-149.
    static bool serves(float s) { return kFusedMultiply && s > 0x1p-100f && s < 0x1p100f; }

    // Whether quotients down to 2^-40, below which a draw of 16 bits decides for the level below, are exact, too.
    static bool serves_small(float s) { return kFusedMultiply && s > 0x1p-60f && s < 0x1p60f; }

    Vec exact(Vec x) const { return x / scale_; }

    Vec fast(Vec x) const {
        // the bound keeps infinity out of the correction; it is far above any code
        const Vec estimate = min(bound_, max(minus_bound_, x * reciprocal_));
        return fma(fma(estimate, minus_scale_, x), reciprocal_, estimate);
    }

    // Of N values that are no more than 2^20 times the scale, in place.
    template <int N>
    void fast_inside(Vec (&x)[N]) const {
        Vec estimate[N];
        each<N>([&](int v) { estimate[v] = x[v] * reciprocal_; });
        each<N>([&](int v) { x[v] = fma(estimate[v], minus_scale_, x[v]); });
        each<N>([&](int v) { x[v] = fma(x[v], reciprocal_, estimate[v]); });
    }

  private:
    Vec scale_, minus_scale_, reciprocal_;
    Vec bound_ = splat(0x1p20f), minus_bound_ = splat(-0x1p20f);
};

}  // namespace QNK_ISA
}  // namespace qnk
