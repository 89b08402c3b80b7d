// Clipping range of least squared error, from a 2048-bin histogram over [min(x, 0), max(x, 0)] of each channel.
//
// Both ends are shrunk together by k / 64, then the low end alone, then the high end alone: 192 trials over
// the bins that are not empty. Floor: two reads of x; the trials are 192 * 2048 quantizations a channel.
#include <stdlib.h>

#include <type_traits>

#include "common/affine.h"
#include "cpu/by_dtype.h"
#include "cpu/extremes.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int kBins = 2048, kShrinkSteps = 64;

struct Histogram {
    double count[kBins];  // of the bins that are not empty, after compress()
    float center[kBins];
    int64_t bins[kBins];
    int used;
};

template <typename T>
void fill(Histogram& h, const T* x, int64_t outer, int64_t channels, int64_t inner, int64_t channel, float low,
          float width) {
    for (int64_t& bin : h.bins) bin = 0;
    for (int64_t o = 0; o < outer; ++o) {
        const T* run = x + (o * channels + channel) * inner;
        for (int64_t i = 0; i < inner; ++i) {
            const float position = (to_float(run[i]) - low) / width;
            const int64_t bin = position > 0.0f ? static_cast<int64_t>(position < kBins ? position : kBins - 1) : 0;
            ++h.bins[bin < kBins ? bin : kBins - 1];
        }
    }
    h.used = 0;
    for (int b = 0; b < kBins; ++b)
        if (h.bins[b]) {
            h.count[h.used] = static_cast<double>(h.bins[b]);
            h.center[h.used++] = low + (static_cast<float>(b) + 0.5f) * width;
        }
}

// Sum of count * (centre - quantized centre)^2 with the quantizer over [low, high].
double squared_error(const Histogram& h, float low, float high, float top) {
    float scale = (high - low) / top;
    if (scale == 0.0f) scale = 1.0f;
    const float zero_point = quantize_code(-low, scale, 0.0f, top);
    double lane[8] = {};
    for (int i = 0; i < h.used; ++i) {
        const float error = fake_quantize_value(h.center[i], scale, zero_point, top) - h.center[i];
        lane[i % 8] += h.count[i] * (static_cast<double>(error) * static_cast<double>(error));
    }
    double total = 0;
    for (double part : lane) total += part;
    return total;
}

void search(const Histogram& h, float top, float& low, float& high) {
    for (int pass = 0; pass < 3; ++pass) {
        const bool shrink_low = pass != 2, shrink_high = pass != 1;
        const float from_low = low, from_high = high;
        double best = squared_error(h, from_low, from_high, top);
        for (int k = 1; k < kShrinkSteps; ++k) {
            const float factor = 1.0f - static_cast<float>(k) / kShrinkSteps;
            const float try_low = shrink_low ? from_low * factor : from_low;
            const float try_high = shrink_high ? from_high * factor : from_high;
            const double error = squared_error(h, try_low, try_high, top);
            if (error < best) best = error, low = try_low, high = try_high;
        }
    }
}

bool finite(float value) { return value - value == 0.0f; }

}  // namespace

int histogram_range(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner, const int64_t* bits,
                    float* low, float* high) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    const float top = top_code(*bits);
    if (const int status = minmax(x, dtype, outer, channels, inner, low, high)) return status;
    bool no_memory = false;
    const int status = by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        parallel_for(channels, 1, [&](int64_t begin, int64_t end) {
            Histogram* h = static_cast<Histogram*>(malloc(sizeof(Histogram)));
            if (!h) {
                no_memory = true;
                return;
            }
            for (int64_t c = begin; c < end; ++c) {
                low[c] = low[c] > 0.0f ? 0.0f : low[c];
                high[c] = high[c] < 0.0f ? 0.0f : high[c];
                if (!finite(low[c]) || !finite(high[c])) continue;
                float width = (high[c] - low[c]) / kBins;
                if (!(width > 0.0f)) width = 1.0f;
                fill(*h, static_cast<const T*>(x), outer, channels, inner, c, low[c], width);
                search(*h, top, low[c], high[c]);
            }
            free(h);
        });
        return QNK_OK;
    });
    return no_memory ? QNK_NO_MEMORY : status;
}

}  // namespace QNK_ISA
}  // namespace qnk
