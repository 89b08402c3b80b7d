// Scale and zero point of the quantizer over a range: a few operations for each of n ranges.
#include "common/affine.h"
#include "cpu/kernels.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

int quantization_parameters(const float* low, const float* high, int64_t n, const int64_t* bits, int symmetric,
                            float* scale, float* zero_point) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    for (int64_t i = 0; i < n; ++i) {
        const Affine quantizer = affine_over(low[i], high[i], top_code(*bits), symmetric != 0);
        scale[i] = quantizer.scale;
        zero_point[i] = quantizer.zero_point;
    }
    return QNK_OK;
}

}  // namespace QNK_ISA
}  // namespace qnk
