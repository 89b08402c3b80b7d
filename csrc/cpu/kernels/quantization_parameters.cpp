// Scale and zero point of the quantizer over a range: a few operations for each of n ranges.
#include "common/affine.h"
#include "cpu/kernels.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

int quantization_parameters(const float* low, const float* high, int64_t n, const int64_t* bits, int symmetric,
                            float* scale, float* zero_point) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    const float top = top_code(*bits), half = (top + 1.0f) / 2.0f;
    for (int64_t i = 0; i < n; ++i) {
        const float a = low[i] > 0.0f ? 0.0f : low[i];  // NaN stays
        const float b = high[i] < 0.0f ? 0.0f : high[i];
        if (symmetric) {
            const float bound = -a > b || a != a ? -a : b;
            const float s = bound / (half - 1.0f);
            scale[i] = s == 0.0f ? 1.0f : s;
            zero_point[i] = half;
        } else {
            const float s = (b - a) / top;
            scale[i] = s == 0.0f ? 1.0f : s;
            zero_point[i] = quantize_code(-a, scale[i], 0.0f, top);
        }
    }
    return QNK_OK;
}

}  // namespace QNK_ISA
}  // namespace qnk
