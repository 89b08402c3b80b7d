// Proxies of product-quantization noise, one pass: blocks of weights are noised together.
//
// Per element of fp32: 4 bytes read, 4 written. A run of blocks is copied (times `factor`) and then, still in cache,
// its noised blocks are overwritten: with 0, or with their mean, summed left to right.
#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/noise_bits.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int64_t kCached = 4096;  // elements

template <typename In, typename Out>
void copy_scaled(const In* x, Out* y, int64_t count, float factor) {
    const Vec times = splat(factor);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, load(x + i) * times);
    for (; i < count; ++i) y[i] = from_float<Out>(to_float(x[i]) * factor);
}

template <typename In>
float mean(const In* block, int64_t size) {
    float total = to_float(block[0]);
    for (int64_t i = 1; i < size; ++i) total += to_float(block[i]);
    return total / static_cast<float>(size);
}

template <typename In, typename Out>
void apply(const In* weight, Out* out, int64_t n_blocks, int64_t size, int kind, float factor, int32_t threshold,
           const int64_t* seed) {
    const int64_t fitting = kCached / size;
    const int64_t step = fitting < 1 ? 1 : fitting < kWord ? fitting : kWord;  // blocks handled while in cache
    parallel_for(n_blocks, kWord, [&](int64_t begin, int64_t end) {
        Noise noise(seed, threshold);
        for (int64_t first = begin; first < end;) {
            const int64_t word_end = (first / kWord + 1) * kWord;
            const int64_t bound = word_end < end ? word_end : end;
            const int64_t count = first + step < bound ? step : bound - first;
            uint64_t bits = noise.word(first / kWord) >> (first % kWord);
            if (count < kWord) bits &= (uint64_t{1} << count) - 1;
            copy_scaled(weight + first * size, out + first * size, count * size, factor);
            for (; bits; bits &= bits - 1) {
                const int64_t at = (first + __builtin_ctzll(bits)) * size;
                const Out value = from_float<Out>(kind == QNK_MEAN ? mean(weight + at, size) : 0.0f);
                for (int64_t i = 0; i < size; ++i) out[at + i] = value;
            }
            first += count;
        }
    });
}

}  // namespace

int block_noise(const void* weight, int weight_dtype, void* out, int out_dtype, int64_t n_blocks,
                int64_t block_size, int kind, float factor, int32_t threshold, const int64_t* seed) {
    return by_dtypes(weight_dtype, out_dtype, [&](auto* in, auto* to) {
        using In = std::remove_pointer_t<decltype(in)>;
        using Out = std::remove_pointer_t<decltype(to)>;
        apply(static_cast<const In*>(weight), static_cast<Out*>(out), n_blocks, block_size, kind, factor, threshold,
              seed);
        return QNK_OK;
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
