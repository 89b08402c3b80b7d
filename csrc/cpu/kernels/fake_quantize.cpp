// Scalar quantization noise, one pass: y = (clamp(round(x / s + z), 0, 2^bits - 1) - z) * s where noised.
//
// Per element of fp32: 4 bytes read, 4 written. Per 16 elements with AVX-512: 14 vector instructions of Philox (a quarter
// of 8 rounds of 6, and of 7 for the other two) and 10 of the quantizer, 12 cycles on two 512-bit ports (a division
// would add 16); with AVX2 some 40 and 26. At p = 0.5 a sixteenth of Philox.
// Values are clamped only where one of four vectors comes near the end of the range; elsewhere integer units look, and
// neither clamp nor marks take any of the floating-point ones (Zen 4, in the cache: 7.4 cycles with a mask at hand, 8 at
// p = 0.5, 17 otherwise). Memory is asked for 4 KiB ahead: the next level of cache is 200 cycles away.
// Backward: 8 bytes read, 4 written (in place: 4 read); draws are made only where a value lies outside the range. A tile
// of which the forward found all values inside the range costs 4 read and 4 written (in place: nothing).
#include <type_traits>

#include "common/affine.h"
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/levels.h"
#include "cpu/noise_bits.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int64_t kGrain = 2 * kOutsideTile;  // elements: bounds of a thread's share

struct Quantizer {
    const float* scale;       // [channels]
    const float* zero_point;  // [channels]
    int64_t channels, inner;
    float top;  // 2^bits - 1
};

// run(begin, end, affine) for each stretch of [begin, end) with one scale.
template <typename Run>
inline void by_scale(const Quantizer& q, int64_t begin, int64_t end, const Run& run) {
    int64_t stretch = begin / q.inner, channel = stretch % q.channels;
    while (begin < end) {
        const int64_t stop = (stretch + 1) * q.inner < end ? (stretch + 1) * q.inner : end;
        run(begin, stop, Affine{q.scale[channel], q.zero_point[channel]});
        begin = stop;
        ++stretch;
        if (++channel == q.channels) channel = 0;
    }
}

// run(begin, end) for the part of each tile in [begin, end).
template <typename Run>
inline void by_tile(int64_t begin, int64_t end, const Run& run) {
    for (; begin < end; begin += kOutsideTile) run(begin, begin + kOutsideTile < end ? begin + kOutsideTile : end);
}

// Whether any of the values seen lies outside the bounds. NaN does not.
class Extent {
  public:
    // x, of which the first `lanes` count.
    void see(Vec x, int lanes) {
        if (lanes < kLanes) x = select(first_lanes(lanes), x, splat(__builtin_nanf("")));
        low_ = min(x, low_);
        high_ = max(x, high_);
    }
    bool outside(const Bounds& bounds) const { return (less(low_, bounds.low) | less(bounds.high, high_)) != 0; }

  private:
    Vec low_ = splat(__builtin_inff()), high_ = splat(-__builtin_inff());
};

// batch(i, lanes, Size<N>, bits) for N vectors of `lanes` elements at a time, from element i of [first, first + count)
// on, with their bits of the mask.
template <typename Batch>
inline void by_word(int64_t first, int64_t count, Noise& noise, const Batch& batch) {
    for (int64_t i = 0; i < count;) {
        const int64_t skip = (first + i) % kWord, here = kWord - skip < count - i ? kWord - skip : count - i;
        const uint64_t bits = noise.word((first + i) / kWord) >> skip;
        by_batch(here, [&](int64_t j, int lanes, auto size) __attribute__((always_inline)) {
            batch(i + j, lanes, size, static_cast<Masks>(bits >> j));
        });
        i += here;
    }
}

// Asks for the lines of memory that lie kAhead bytes after p [count], which need not exist. (A call that is not inlined
// early is dropped by GCC: it does nothing that a program could see.)
constexpr int64_t kAhead = 4096;
template <typename T>
inline __attribute__((always_inline)) void prefetch(const T* p, int64_t count) {
    const char* ahead = reinterpret_cast<const char*>(p) + kAhead;
    for (int64_t line = 0; line < count * static_cast<int64_t>(sizeof(T)); line += 64) __builtin_prefetch(ahead + line);
}

// Bits of the mask from element i on, as many as there are lanes.
inline uint64_t mask_at(Noise& noise, int64_t i) {
    const int64_t block = i / kWord, skip = i % kWord;
    uint64_t bits = noise.word(block) >> skip;
    if (skip + kLanes > kWord) bits |= noise.word(block + 1) << (kWord - skip);
    return bits;
}

// y [64] <- x [64] noised where `bits` say so, if all lie well inside the range; else false, and y is as it was.
#if defined(__AVX512F__)
inline __attribute__((always_inline)) bool inside_pairs(const bf16* x, bf16* y, const Nearest<true>& nearest, float inner,
                                                        uint64_t bits) {
    const Pairs low = load_pairs(x), high = load_pairs(x + 32);
    Vec level[kBatch] = {low.even(), low.odd(), high.even(), high.odd()};
    if (__builtin_expect(any_reaches(level, inner), 0)) return false;
    nearest.apply<true>(level);
    store_pairs(y, select(static_cast<uint32_t>(bits), round_pairs(level[0], level[1]), low));
    store_pairs(y + 32, select(static_cast<uint32_t>(bits >> 32), round_pairs(level[2], level[3]), high));
    return true;
}
#endif
template <typename... Any>
inline bool inside_pairs(const Any&...) {
    return false;
}

// Marked: returns whether any of the values lies outside the range.
template <bool Fast, bool Marked, typename In, typename Out>
bool forward_run(const In* x, Out* y, int64_t first, int64_t count, const Affine& q, float top, Noise& noise) {
    const Nearest<Fast> nearest(q, top);
    const float inner = inner_bound(q, top);
    Extent extent;
    by_word(first, count, noise, [&](int64_t i, int lanes, auto size, Masks bits) __attribute__((always_inline)) {
        Vec value[size], level[size];
        prefetch(x + i, size * kLanes);
        prefetch(y + i, size * kLanes);
        if (size == kBatch && inside_pairs(x + i, y + i, nearest, inner, bits)) return;
        each<size>([&](int v) { level[v] = value[v] = load_first(x + i + v * kLanes, lanes); });
        if (!Fast || __builtin_expect(any_reaches(value, inner), 0)) {
            if (Marked) each<size>([&](int v) { extent.see(value[v], lanes); });
            nearest.apply(level);
        } else {
            nearest.template apply<true>(level);
        }
        each<size>([&](int v) { store_first(y + i + v * kLanes, select(bits, v, level[v], value[v]), lanes); });
    });
    return Marked && extent.outside(nearest.bounds());
}

template <bool Marked, typename In, typename Out>
void forward(const In* x, Out* y, int64_t n, const Quantizer& q, int32_t threshold, const int64_t* seed,
             uint8_t* outside) {
    parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
        Noise noise(seed, threshold);
        auto stretches = [&](int64_t from, int64_t to) {
            bool any = false;
            by_scale(q, from, to, [&](int64_t first, int64_t last, const Affine& affine) {
                const auto run = fast(affine) ? forward_run<true, Marked, In, Out> : forward_run<false, Marked, In, Out>;
                any |= run(x + first, y + first, first, last - first, affine, q.top, noise);
            });
            return any;
        };
        if (Marked)
            by_tile(begin, end, [&](int64_t from, int64_t to) { outside[from / kOutsideTile] = stretches(from, to); });
        else
            stretches(begin, end);
    });
}

// Straight-through gradient of one stretch: draws are made only where a value lies outside the range.
template <typename Grad, typename In>
void backward_run(const Grad* grad, const In* x, In* grad_x, int64_t first, int64_t count, const Bounds& bounds,
                  Noise& noise) {
    const Vec none = splat(0.0f);
    const bool in_place = static_cast<const void*>(grad) == static_cast<const void*>(grad_x);
    auto stopped = [&](Mask outside, int64_t i) {
        return outside ? outside & static_cast<Mask>(mask_at(noise, first + i)) : outside;
    };
    by_batch(count, [&](int64_t i, int lanes, auto size) __attribute__((always_inline)) {
        // lanes past the end hold 0, which may lie outside the range: they are not stored
        Mask outside[size], any = 0;
        each<size>([&](int v) { any |= outside[v] = bounds.outside(load_first(x + i + v * kLanes, lanes)); });
        if (in_place && !any) return;
        each<size>([&](int v) {
            const int64_t at = i + v * kLanes;
            const Vec value = load_first(grad + at, lanes);
            store_first(grad_x + at, any ? select(stopped(outside[v], at), none, value) : value, lanes);
        });
    });
}

template <typename Grad, typename In>
void pass(const Grad* grad, In* grad_x, int64_t count) {
    by_batch(count, [&](int64_t i, int lanes, auto size) __attribute__((always_inline)) {
        each<size>([&](int v) { store_first(grad_x + i + v * kLanes, load_first(grad + i + v * kLanes, lanes), lanes); });
    });
}

template <typename Grad, typename In>
void backward(const Grad* grad, const In* x, In* grad_x, int64_t n, const Quantizer& q, int32_t threshold,
              const int64_t* seed, const uint8_t* outside) {
    const bool in_place = static_cast<const void*>(grad) == static_cast<const void*>(grad_x);
    parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
        Noise noise(seed, threshold);
        auto stretches = [&](int64_t from, int64_t to) {
            by_scale(q, from, to, [&](int64_t first, int64_t last, const Affine& affine) {
                const Bounds bounds(affine, q.top);
                backward_run(grad + first, x + first, grad_x + first, first, last - first, bounds, noise);
            });
        };
        if (!outside) return stretches(begin, end);
        by_tile(begin, end, [&](int64_t from, int64_t to) {
            if (outside[from / kOutsideTile])
                stretches(from, to);
            else if (!in_place)
                pass(grad + from, grad_x + from, to - from);
        });
    });
}

}  // namespace

int fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t n, const float* scale,
                  const float* zero_point, int64_t channels, int64_t inner, const int64_t* bits,
                  int32_t threshold, const int64_t* seed, uint8_t* outside) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    const Quantizer quantizer{scale, zero_point, channels, inner, top_code(*bits)};
    return by_dtypes(x_dtype, y_dtype, [&](auto* in, auto* out) {
        using In = std::remove_pointer_t<decltype(in)>;
        using Out = std::remove_pointer_t<decltype(out)>;
        const auto run = outside ? forward<true, In, Out> : forward<false, In, Out>;
        run(static_cast<const In*>(x), static_cast<Out*>(y), n, quantizer, threshold, seed, outside);
        return QNK_OK;
    });
}

int fake_quantize_backward(const void* grad, int grad_dtype, const void* x, void* grad_x, int x_dtype, int64_t n,
                           const float* scale, const float* zero_point, int64_t channels, int64_t inner,
                           const int64_t* bits, int32_t threshold, const int64_t* seed, const uint8_t* outside) {
    if (!bits_valid(*bits)) return QNK_BAD_BITS;
    const Quantizer quantizer{scale, zero_point, channels, inner, top_code(*bits)};
    return by_dtypes(grad_dtype, x_dtype, [&](auto* out, auto* in) {
        using Grad = std::remove_pointer_t<decltype(out)>;
        using In = std::remove_pointer_t<decltype(in)>;
        backward(static_cast<const Grad*>(grad), static_cast<const In*>(x), static_cast<In*>(grad_x), n, quantizer,
                 threshold, seed, outside);
        return QNK_OK;
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
