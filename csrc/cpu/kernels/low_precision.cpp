// The operands of a layer that trains in low precision, weight and input quantized in one call, and the gradient of that
// input.
//
// Threads are started twice: for the weight and the range of the input, and for the input. Of the input, which values
// lie outside its range is kept as bits: the backward reads them instead of the input, 32 times as much in fp32, and
// the gradient where there is one.
#include <string.h>

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
constexpr int kMaxThreads = 256;

// outside <- a bit for each of `lanes` values from a multiple of kLanes on.
inline void set_bits(uint8_t* outside, Mask mask, int lanes) {
    const uint32_t bits = lanes == kLanes ? static_cast<uint32_t>(mask) : mask & first_lanes(lanes);
    outside[0] = static_cast<uint8_t>(bits);
    if (kLanes == 16 && lanes > 8) outside[1] = static_cast<uint8_t>(bits >> 8);
}

template <typename T, typename Out>
void quantize_rows(const T* weight, Out* y, int64_t columns, int64_t begin, int64_t end, float top) {
    for (int64_t i = begin; i < end; ++i) {
        const Extremes range = extremes(weight + i * columns, columns);
        to_level(weight, y, i * columns, columns, affine_over(range.low, range.high, top, false), top, nullptr);
    }
}

// The range to quantize over: the one of x before any forward, else that of (*low, *high), moved first.
Extremes moved(const Extremes& x, float momentum, bool moves, float* low, float* high, int64_t* step) {
    Extremes range = x;
    if (*step) {
        range.low = moves ? *low + (x.low - *low) * momentum : *low;
        range.high = moves ? *high + (x.high - *high) * momentum : *high;
    }
    if (moves) {
        *low = range.low;
        *high = range.high;
        ++*step;
    }
    return range;
}

}  // namespace

int low_precision_operands(const void* x, int dtype, int64_t n, const void* weight, int weight_dtype, int64_t rows,
                           int64_t columns, const int64_t* bits, float momentum, int moves, float* low, float* high,
                           int64_t* step, void* x_out, uint8_t* outside, void* weight_out) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    const float top = top_code(*bits);
    return by_dtypes(dtype, weight_dtype, [&](auto* type, auto* weight_type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* values = static_cast<const T*>(x);
        const auto* weights = static_cast<const std::remove_pointer_t<decltype(weight_type)>*>(weight);
        T *y = static_cast<T*>(x_out), *weight_y = static_cast<T*>(weight_out);
        const int64_t pieces = (n + kGrain - 1) / kGrain, wanted = (n + rows * columns) / kGrain;
        Extremes partial[kMaxThreads];
        parallel(wanted < kMaxThreads ? wanted : kMaxThreads, [&](int thread, int threads) {
            const int64_t begin = pieces * thread / threads * kGrain, end = pieces * (thread + 1) / threads * kGrain;
            if (begin < n) partial[thread] = extremes(values + begin, (end < n ? end : n) - begin);
            quantize_rows(weights, weight_y, columns, rows * thread / threads, rows * (thread + 1) / threads, top);
        });
        Extremes own;
        for (const Extremes& one : partial) own.add(one);
        const Extremes range = moved(own, momentum, moves, low, high, step);
        const Affine q = affine_over(range.low, range.high, top, false);
        parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
            to_nearest(values + begin, y + begin, end - begin, q, top,
                       [&](int64_t i, int lanes, const Bounds& bounds, Vec value) {
                           set_bits(outside + (begin + i) / 8, bounds.outside(value), lanes);
                       });
        });
        return QNK_OK;
    });
}

int stop_gradient(void* grad, int dtype, int64_t n, const uint8_t* outside) {
    return by_dtype(dtype, [&](auto* type) {
        auto* values = static_cast<decltype(type)>(grad);
        parallel_for((n + 7) / 8, 16 * kGrain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i += 8) {
                uint64_t word = 0;
                memcpy(&word, outside + i, static_cast<size_t>(end - i < 8 ? end - i : 8));
                for (; word; word &= word - 1) values[8 * i + __builtin_ctzll(word)] = {};
            }
        });
        return QNK_OK;
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
