// Fake quantization over the range of the data: of each sample of x [samples, inner], or a moving average.
//
// Of a sample that fits the cache memory sees one read and one write; of a larger one, two reads. Per 16 elements
// beside the range: 9 vector instructions to the nearest level, some 20 more to a random one, 14 of them of Philox.
#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/extremes.h"
#include "cpu/kernels.h"
#include "cpu/levels.h"
#include "cpu/parallel.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int64_t kGrain = 4096;  // elements: bounds of a thread's share

// Threads share samples, each of which is read twice by the same one.
template <typename In, typename Out>
void by_sample(const In* x, Out* y, int64_t samples, int64_t inner, float top, bool stochastic, int64_t seed) {
    parallel_for(samples, (kGrain + inner - 1) / inner, [&](int64_t begin, int64_t end) {
        Draws draws(seed);
        for (int64_t i = begin; i < end; ++i) {
            const Extremes range = extremes(x + i * inner, inner);
            const Affine q = affine_over(range.low, range.high, top, false);
            to_level(x, y, i * inner, inner, q, top, stochastic ? &draws : nullptr);
        }
    });
}

// Threads share each sample, of which there are fewer than threads.
template <typename In, typename Out>
void within_samples(const In* x, int dtype, Out* y, int64_t samples, int64_t inner, float top, bool stochastic,
                    int64_t seed) {
    for (int64_t i = 0; i < samples; ++i) {
        float low, high;
        minmax(x + i * inner, dtype, 1, 1, inner, &low, &high);
        const Affine q = affine_over(low, high, top, false);
        parallel_for(inner, kGrain, [&](int64_t begin, int64_t end) {
            Draws draws(seed);
            to_level(x, y, i * inner + begin, end - begin, q, top, stochastic ? &draws : nullptr);
        });
    }
}

}  // namespace

int dynamic_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t samples, int64_t inner,
                          const int64_t* bits, int stochastic, const int64_t* seed) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    const float top = top_code(*bits);
    return by_dtypes(x_dtype, y_dtype, [&](auto* in, auto* out) {
        const auto* from = static_cast<const std::remove_pointer_t<decltype(in)>*>(x);
        auto* to = static_cast<decltype(out)>(y);
        if (samples < max_threads() && inner > kGrain)
            within_samples(from, x_dtype, to, samples, inner, top, stochastic, *seed);
        else
            by_sample(from, to, samples, inner, top, stochastic, *seed);
        return QNK_OK;
    });
}

int moving_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t outer, int64_t channels,
                         int64_t inner, const int64_t* bits, float momentum, float* low, float* high, int64_t* step,
                         float* scale, float* zero_point) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    float *new_low = scale, *new_high = zero_point;  // which are written only after these were read
    if (const int status = minmax(x, x_dtype, outer, channels, inner, new_low, new_high)) return status;
    const bool first = (*step)++ == 0;
    for (int64_t c = 0; c < channels; ++c) {
        low[c] = first ? new_low[c] : low[c] + (new_low[c] - low[c]) * momentum;
        high[c] = first ? new_high[c] : high[c] + (new_high[c] - high[c]) * momentum;
    }
    quantization_parameters(low, high, channels, bits, 0, scale, zero_point);
    constexpr int32_t kAll = 65536;  // nothing is drawn, so that the seed is not read
    return fake_quantize(x, x_dtype, y, y_dtype, outer * channels * inner, scale, zero_point, channels, inner, bits, kAll,
                         nullptr, nullptr);
}

}  // namespace QNK_ISA
}  // namespace qnk
