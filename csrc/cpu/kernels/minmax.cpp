// Smallest and largest value per parameter of x [outer, channels, inner]. Floor: one read of x.
#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/extremes.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int64_t kGrain = 16384;  // elements worth a thread
constexpr int kMaxThreads = 256;

template <typename T>
void of_tensor(const T* x, int64_t n, float* low, float* high) {
    Extremes partial[kMaxThreads];
    parallel((n + kGrain - 1) / kGrain < kMaxThreads ? (n + kGrain - 1) / kGrain : kMaxThreads,
             [&](int thread, int threads) {
                 const int64_t begin = n * thread / threads, end = n * (thread + 1) / threads;
                 partial[thread] = extremes(x + begin, end - begin);
             });
    Extremes all;
    for (const Extremes& one : partial) all.add(one);
    *low = all.low;
    *high = all.high;
}

// Channels that are consecutive elements (inner = 1): running extremes of all columns, row by row.
template <typename T>
void of_columns(const T* x, int64_t outer, int64_t channels, int64_t begin, int64_t end, float* low, float* high) {
    for (int64_t c = begin; c < end; ++c) low[c] = high[c] = to_float(x[c]);
    for (int64_t o = 1; o < outer; ++o)
        for (int64_t c = begin; c < end; ++c) {
            const float value = to_float(x[o * channels + c]);
            low[c] = value >= low[c] || low[c] != low[c] ? low[c] : value;
            high[c] = value <= high[c] || high[c] != high[c] ? high[c] : value;
        }
}

template <typename T>
void of_channels(const T* x, int64_t outer, int64_t channels, int64_t inner, float* low, float* high) {
    const int64_t size = outer * inner, grain = size < kGrain ? (kGrain + size - 1) / size : 1;
    parallel_for(channels, grain, [&](int64_t begin, int64_t end) {
        if (inner == 1) return of_columns(x, outer, channels, begin, end, low, high);
        for (int64_t c = begin; c < end; ++c) {
            Extremes all;
            for (int64_t o = 0; o < outer; ++o) all.add(extremes(x + (o * channels + c) * inner, inner));
            low[c] = all.low;
            high[c] = all.high;
        }
    });
}

}  // namespace

int minmax(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner, float* low, float* high) {
    return by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* values = static_cast<const T*>(x);
        if (channels == 1)
            of_tensor(values, outer * inner, low, high);
        else
            of_channels(values, outer, channels, inner, low, high);
        return QNK_OK;
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
