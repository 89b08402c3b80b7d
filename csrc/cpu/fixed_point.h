// Fixed point of a row of activations: x = 2^unit * an integer of some bits and sign.
#pragma once

#include "cpu/extremes.h"

namespace qnk {
inline namespace QNK_ISA {

inline float power_of_two(int exponent) { return bits_float(static_cast<uint32_t>(exponent + 127) << 23); }

// unit <- the least exponent with which integers of up to `limit`, 2^(bits - 1) to 2^bits, hold all of x [k]. False where no
// fixed point serves: infinities, NaN, largest magnitudes of 2^-100 and less, and of 2^100 and more, whose sums may be
// infinite before they are scaled.
template <typename T>
bool fixed_point_unit(const T* x, int64_t k, int bits, float limit, int& unit) {
    const Extremes range = extremes(x, k);
    const float most = -range.low > range.high ? -range.low : range.high;  // NaN: both are
    if (!(most == 0.0f || (most > 0x1p-100f && most < 0x1p100f))) return false;
    // 2^(exponent - 1) <= most < 2^exponent
    const int exponent = most == 0.0f ? 0 : static_cast<int>(float_bits(most) >> 23) - 126;
    unit = exponent - bits;
    if (most * power_of_two(-unit) > limit) ++unit;
    return true;
}

// The same for numbers in two or three signed bytes: half a unit is at most 2^-14.99 of the row's largest magnitude, or
// 2^-22. (Three bytes hold no more than 2^22, so that sums of 32 products with 4-bit codes fit 32 bits.)
template <typename T>
bool byte_unit(const T* x, int64_t k, int bytes, int& unit) {
    return bytes == 2 ? fixed_point_unit(x, k, 15, 0x7f7f, unit) : fixed_point_unit(x, k, 22, 0x1p22f, unit);
}

}  // namespace QNK_ISA
}  // namespace qnk
