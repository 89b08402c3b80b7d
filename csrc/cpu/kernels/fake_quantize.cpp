// Scalar quantization noise, one pass: y = (clamp(round(x / s + z), 0, 2^bits - 1) - z) * s where noised.
//
// Per element of fp32: 4 bytes read, 4 written; a tenth of a Philox round of 6 vector instructions a lane and
// about 10 for the quantizer, that is 14 cycles per 16 elements on two 512-bit ports. Backward: 8 bytes read,
// 4 written; draws are made only for chunks that hold a value outside the range.
#include <type_traits>

#include "common/affine.h"
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/noise_bits.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

struct Quantizer {
    const float* scale;       // [channels]
    const float* zero_point;  // [channels]
    int64_t channels, inner;
    float top;  // 2^bits - 1
};

// run(begin, end, s, z) for each stretch of [begin, end) with one scale.
template <typename Run>
inline void by_scale(const Quantizer& q, int64_t begin, int64_t end, const Run& run) {
    int64_t stretch = begin / q.inner, channel = stretch % q.channels;
    while (begin < end) {
        const int64_t stop = (stretch + 1) * q.inner < end ? (stretch + 1) * q.inner : end;
        run(begin, stop, q.scale[channel], q.zero_point[channel]);
        begin = stop;
        ++stretch;
        if (++channel == q.channels) channel = 0;
    }
}

template <typename In, typename Out>
void forward_run(const In* x, Out* y, int64_t count, float s, float z, float top, const uint8_t* bitmap,
                 int64_t offset) {
    const Vec scale = splat(s), zero = splat(z), limit = splat(top), none = splat(0.0f);
    auto noised = [&](Vec value, uint32_t bits) {
        const Vec clamped = min(limit, max(none, value / scale + zero));
        return select(static_cast<Mask>(bits), (round_even(clamped) - zero) * scale, value);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, noised(load(x + i), bits_at(bitmap, offset + i)));
    if (const int rest = static_cast<int>(count - i))
        store_first(y + i, noised(load_first(x + i, rest), bits_at(bitmap, offset + i)), rest);
}

template <typename In, typename Out>
void forward(const In* x, Out* y, int64_t n, const Quantizer& q, int32_t threshold, const int64_t* seed) {
    parallel_for(n, kChunk, [&](int64_t begin, int64_t end) {
        alignas(64) uint8_t bitmap[kBitmapBytes];
        for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
            const int64_t count = end - chunk < kChunk ? end - chunk : kChunk;
            fill_noise(bitmap, chunk, count, seed, threshold);
            by_scale(q, chunk, chunk + count, [&](int64_t first, int64_t last, float s, float z) {
                forward_run(x + first, y + first, last - first, s, z, q.top, bitmap, first - chunk);
            });
        }
    });
}

// Straight-through gradient of one stretch; `draw` fills the bitmap of the chunk when it is first needed.
template <typename Grad, typename In, typename Draw>
void backward_run(const Grad* grad, const In* x, In* grad_x, int64_t count, float s, float z, float top,
                  const uint8_t* bitmap, int64_t offset, const Draw& draw) {
    const Vec low = splat((0.0f - z) * s), high = splat((top - z) * s);
    auto stopped = [&](Vec value, int64_t i) {
        const Mask outside = less(value, low) | less(high, value);
        if (!outside) return outside;
        draw();
        return static_cast<Mask>(outside & bits_at(bitmap, offset + i));
    };
    const Vec none = splat(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        store(grad_x + i, select(stopped(load(x + i), i), none, load(grad + i)));
    if (const int rest = static_cast<int>(count - i))
        store_first(grad_x + i, select(stopped(load_first(x + i, rest), i), none, load_first(grad + i, rest)), rest);
}

template <typename Grad, typename In>
void backward(const Grad* grad, const In* x, In* grad_x, int64_t n, const Quantizer& q, int32_t threshold,
              const int64_t* seed) {
    parallel_for(n, kChunk, [&](int64_t begin, int64_t end) {
        alignas(64) uint8_t bitmap[kBitmapBytes];
        for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
            const int64_t count = end - chunk < kChunk ? end - chunk : kChunk;
            bool drawn = false;
            auto draw = [&] {
                if (!drawn) fill_noise(bitmap, chunk, count, seed, threshold);
                drawn = true;
            };
            by_scale(q, chunk, chunk + count, [&](int64_t first, int64_t last, float s, float z) {
                backward_run(grad + first, x + first, grad_x + first, last - first, s, z, q.top, bitmap,
                             first - chunk, draw);
            });
        }
    });
}

}  // namespace

int fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t n, const float* scale,
                  const float* zero_point, int64_t channels, int64_t inner, const int64_t* bits,
                  int32_t threshold, const int64_t* seed) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    const Quantizer quantizer{scale, zero_point, channels, inner, top_code(*bits)};
    return by_dtypes(x_dtype, y_dtype, [&](auto* in, auto* out) {
        using In = std::remove_pointer_t<decltype(in)>;
        using Out = std::remove_pointer_t<decltype(out)>;
        forward(static_cast<const In*>(x), static_cast<Out*>(y), n, quantizer, threshold, seed);
        return QNK_OK;
    });
}

int fake_quantize_backward(const void* grad, int grad_dtype, const void* x, void* grad_x, int x_dtype, int64_t n,
                           const float* scale, const float* zero_point, int64_t channels, int64_t inner,
                           const int64_t* bits, int32_t threshold, const int64_t* seed) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    const Quantizer quantizer{scale, zero_point, channels, inner, top_code(*bits)};
    return by_dtypes(grad_dtype, x_dtype, [&](auto* out, auto* in) {
        using Grad = std::remove_pointer_t<decltype(out)>;
        using In = std::remove_pointer_t<decltype(in)>;
        backward(static_cast<const Grad*>(grad), static_cast<const In*>(x), static_cast<In*>(grad_x), n, quantizer,
                 threshold, seed);
        return QNK_OK;
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
