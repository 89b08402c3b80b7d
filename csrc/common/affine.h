// The affine quantizer of one value, and the rounding it uses, for host and device.
#pragma once

#include "common/philox.h"

namespace qnk {
inline namespace QNK_ISA {

// Adding and subtracting 1.5 * 2^23 rounds 0 <= v < 2^22 to an integer, ties to even. NaN stays NaN.
constexpr float kRoundMagic = 12582912.0f;

// clamp(round(x / s + z), 0, top), in this order of roundings; clamping first is the same, as both ends
// are integers. NaN propagates: comparisons with it are false.
QNK_HD float quantize_code(float x, float scale, float zero_point, float top) {
    float v = x / scale + zero_point;
    v = v < 0.0f ? 0.0f : v;
    v = v > top ? top : v;
    return (v + kRoundMagic) - kRoundMagic;
}

QNK_HD float fake_quantize_value(float x, float scale, float zero_point, float top) {
    return (quantize_code(x, scale, zero_point, top) - zero_point) * scale;
}

struct Affine {
    float scale, zero_point;
};

// The quantizer with codes 0 to top over [low, high], which is widened to hold 0. NaN propagates to the scale.
QNK_HD Affine affine_over(float low, float high, float top, bool symmetric) {
    const float a = low > 0.0f ? 0.0f : low, b = high < 0.0f ? 0.0f : high;
    if (symmetric) {
        const float half = (top + 1.0f) / 2.0f, bound = -a > b || a != a ? -a : b, s = bound / (half - 1.0f);
        return {s == 0.0f ? 1.0f : s, half};
    }
    const float width = (b - a) / top, s = width == 0.0f ? 1.0f : width;
    return {s, quantize_code(-a, s, 0.0f, top)};
}

// Elements of a tensor, in order, that share one byte of `outside`: whether any of them lies outside the range.
constexpr int64_t kOutsideTile = 2048;

QNK_HD bool bits_valid(int64_t bits) { return bits >= 2 && bits <= 16; }

QNK_HD float top_code(int64_t bits) { return static_cast<float>((int64_t{1} << bits) - 1); }

}  // namespace QNK_ISA
}  // namespace qnk
