// Scalar quantization noise, one pass: y = (clamp(round(x / s + z), 0, 2^bits - 1) - z) * s where noised.
//
// Per element of fp32: 4 bytes read, 4 written. Per 16 elements: 15 vector instructions of Philox (a quarter of
// 10 rounds of 6) and 13 of the quantizer, 14 cycles on two 512-bit ports (a division would add 16).
// Backward: 8 bytes read, 4 written (in place: 4 read); draws are made only where a value lies outside the range.
#include <type_traits>

#include "common/affine.h"
#include "cpu/by_dtype.h"
#include "cpu/divider.h"
#include "cpu/kernels.h"
#include "cpu/noise_bits.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int64_t kGrain = 4096;  // elements: bounds of a thread's share

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

// vector(offset, count, bits) for each vector of [first, first + count), with its bits of the mask. Draws are made
// where they are used, so that the latencies of the one hide in the work of the other.
template <typename Vector>
inline void by_vector(int64_t first, int64_t count, Noise& noise, const Vector& vector) {
    for (int64_t i = 0; i < count;) {
        const int64_t block = (first + i) / kWord, skip = (first + i) % kWord;
        const int64_t stop = i + kWord - skip < count ? i + kWord - skip : count;
        const uint64_t bits = noise.word(block) >> skip;
        if (stop - i == kWord) {
            for (int v = 0; v < kWord; v += kLanes) vector(i + v, kLanes, static_cast<uint32_t>(bits >> v));
        } else {
            for (int64_t j = i; j < stop; j += kLanes)
                vector(j, stop - j < kLanes ? static_cast<int>(stop - j) : kLanes, static_cast<uint32_t>(bits >> (j - i)));
        }
        i = stop;
    }
}

// Bits of the mask from element i on, as many as there are lanes.
inline uint64_t mask_at(Noise& noise, int64_t i) {
    const int64_t block = i / kWord, skip = i % kWord;
    uint64_t bits = noise.word(block) >> skip;
    if (skip + kLanes > kWord) bits |= noise.word(block + 1) << (kWord - skip);
    return bits;
}

template <bool Fast, typename In, typename Out>
void forward_run(const In* x, Out* y, int64_t first, int64_t count, float s, float z, float top, Noise& noise) {
    const Vec scale = splat(s), zero = splat(z), limit = splat(top), none = splat(0.0f);
    const Divider divider(s);
    auto noised = [&](Vec value, uint32_t bits) {
        const Vec quotient = Fast ? divider.fast(value) : divider.exact(value);
        const Vec clamped = min(limit, max(none, quotient + zero));
        return select(static_cast<Mask>(bits), (round_even(clamped) - zero) * scale, value);
    };
    by_vector(first, count, noise, [&](int64_t i, int lanes, uint32_t bits) {
        if (lanes == kLanes)
            store(y + i, noised(load(x + i), bits));
        else
            store_first(y + i, noised(load_first(x + i, lanes), bits), lanes);
    });
}

template <typename In, typename Out>
void forward(const In* x, Out* y, int64_t n, const Quantizer& q, int32_t threshold, const int64_t* seed) {
    parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
        Noise noise(seed, threshold);
        by_scale(q, begin, end, [&](int64_t first, int64_t last, float s, float z) {
            if (Divider::serves(s))
                forward_run<true>(x + first, y + first, first, last - first, s, z, q.top, noise);
            else
                forward_run<false>(x + first, y + first, first, last - first, s, z, q.top, noise);
        });
    });
}

// Straight-through gradient of one stretch: draws are made only where a value lies outside the range.
template <typename Grad, typename In>
void backward_run(const Grad* grad, const In* x, In* grad_x, int64_t first, int64_t count, float s, float z,
                  float top, Noise& noise) {
    const Vec low = splat((0.0f - z) * s), high = splat((top - z) * s), none = splat(0.0f);
    auto stopped = [&](Vec value, int64_t i) {
        Mask outside = less(value, low) | less(high, value);
        if (outside) outside &= static_cast<Mask>(mask_at(noise, first + i));
        return outside;
    };
    int64_t i = 0;
    if (static_cast<const void*>(grad) == static_cast<const void*>(grad_x)) {
        for (; i + kLanes <= count; i += kLanes)
            if (const Mask mask = stopped(load(x + i), i))
                store(grad_x + i, select(mask, none, load(grad_x + i)));
    }
    for (; i + kLanes <= count; i += kLanes)
        store(grad_x + i, select(stopped(load(x + i), i), none, load(grad + i)));
    if (const int rest = static_cast<int>(count - i)) {
        // lanes past the end hold 0, which may lie outside the range: they are not stored
        const Mask mask = stopped(load_first(x + i, rest), i);
        store_first(grad_x + i, select(mask, none, load_first(grad + i, rest)), rest);
    }
}

template <typename Grad, typename In>
void backward(const Grad* grad, const In* x, In* grad_x, int64_t n, const Quantizer& q, int32_t threshold,
              const int64_t* seed) {
    parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
        Noise noise(seed, threshold);
        by_scale(q, begin, end, [&](int64_t first, int64_t last, float s, float z) {
            backward_run(grad + first, x + first, grad_x + first, first, last - first, s, z, q.top, noise);
        });
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
