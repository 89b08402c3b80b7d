// Proxies of product-quantization noise, one pass: blocks of weights are noised together.
//
// Per element of fp32: 4 bytes read, 4 written. A chunk is copied (times `factor`) and then, still in cache,
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
void noise(const In* weight, Out* out, int64_t n_blocks, int64_t size, int kind, float factor, int32_t threshold,
           const int64_t* seed) {
    const int64_t fitting = kChunk / size / kDrawsPerCall * kDrawsPerCall;
    const int64_t per_chunk = fitting ? fitting : kDrawsPerCall;
    parallel_for(n_blocks, per_chunk, [&](int64_t begin, int64_t end) {
        alignas(64) uint8_t bitmap[kBitmapBytes];
        for (int64_t chunk = begin; chunk < end; chunk += per_chunk) {
            const int64_t count = end - chunk < per_chunk ? end - chunk : per_chunk;
            fill_noise(bitmap, chunk, count, seed, threshold);
            copy_scaled(weight + chunk * size, out + chunk * size, count * size, factor);
            for (int64_t b = 0; b < count; b += 8) {
                uint32_t bits = bitmap[b / 8];
                if (count - b < 8) bits &= (1u << (count - b)) - 1u;
                for (; bits; bits &= bits - 1) {
                    const int64_t first = (chunk + b + __builtin_ctz(bits)) * size;
                    const Out value = from_float<Out>(kind == QNK_MEAN ? mean(weight + first, size) : 0.0f);
                    for (int64_t i = 0; i < size; ++i) out[first + i] = value;
                }
            }
        }
    });
}

}  // namespace

int block_noise(const void* weight, int weight_dtype, void* out, int out_dtype, int64_t n_blocks,
                int64_t block_size, int kind, float factor, int32_t threshold, const int64_t* seed) {
    return by_dtypes(weight_dtype, out_dtype, [&](auto* in, auto* to) {
        using In = std::remove_pointer_t<decltype(in)>;
        using Out = std::remove_pointer_t<decltype(to)>;
        noise(static_cast<const In*>(weight), static_cast<Out*>(out), n_blocks, block_size, kind, factor, threshold,
              seed);
        return QNK_OK;
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
