// Fake quantization over the range of the data: of each sample of x [samples, inner], or a moving average.
//
// Of a sample that fits the cache memory sees one read and one write; of a larger one, two reads. Per 16 elements
// beside the range: 13 vector instructions to the nearest level (as fake_quantize), 23 more to a random one, 15 of
// them of Philox.
#include <type_traits>

#include "common/affine.h"
#include "cpu/by_dtype.h"
#include "cpu/divider.h"
#include "cpu/extremes.h"
#include "cpu/kernels.h"
#include "cpu/noise_bits.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int64_t kGrain = 4096;  // elements: bounds of a thread's share

// y_i = (clamp(code(x_i / s + z)) - z) * s of `count` elements, the first being number `first` of all.
template <typename In, typename Out, typename Quotient>
void to_nearest(const In* x, Out* y, int64_t count, const Affine& q, float top, const Quotient& quotient) {
    const Vec scale = splat(q.scale), zero = splat(q.zero_point), limit = splat(top), none = splat(0.0f);
    auto quantized = [&](Vec value) {
        const Vec clamped = min(limit, max(none, quotient(value) + zero));
        return (round_even(clamped) - zero) * scale;
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, quantized(load(x + i)));
    if (const int rest = static_cast<int>(count - i)) store_first(y + i, quantized(load_first(x + i, rest)), rest);
}

// The same to the level below x_i / s + z, or to the next one where the draw is below what lies between.
template <typename In, typename Out, typename Quotient>
void to_random(const In* x, Out* y, int64_t first, int64_t count, const Affine& q, float top, Draws& draws,
               const Quotient& quotient) {
    const Vec scale = splat(q.scale), zero = splat(q.zero_point), limit = splat(top), none = splat(0.0f);
    const Vec one = splat(1.0f), half = splat(0.5f), units = splat(65536.0f);
    auto quantized = [&](Vec value, Vec draw) {
        const Vec code = quotient(value) + zero;
        const Vec nearest = round_even(code);
        const Vec whole = nearest - select(less(code, nearest), one, none);
        const Vec up = select(less(draw + half, (code - whole) * units), one, none);
        return (min(limit, max(none, whole + up)) - zero) * scale;
    };
    for (int64_t i = 0; i < count;) {
        const int64_t skip = (first + i) % kWord;
        const int64_t stop = i + kWord - skip < count ? i + kWord - skip : count;
        const uint16_t* drawn = draws.word((first + i) / kWord) + skip;
        for (; i + kLanes <= stop; i += kLanes, drawn += kLanes) store(y + i, quantized(load(x + i), load(drawn)));
        if (const int rest = static_cast<int>(stop - i))
            store_first(y + i, quantized(load_first(x + i, rest), load_first(drawn, rest)), rest);
        i = stop;
    }
}

template <typename In, typename Out>
void to_level(const In* x, Out* y, int64_t first, int64_t count, const Affine& q, float top, Draws* draws) {
    const Divider divider(q.scale);
    auto with = [&](const auto& quotient) {
        if (draws)
            to_random(x + first, y + first, first, count, q, top, *draws, quotient);
        else
            to_nearest(x + first, y + first, count, q, top, quotient);
    };
    if (draws ? Divider::serves_small(q.scale) : Divider::serves(q.scale))
        with([&](Vec value) { return divider.fast(value); });
    else
        with([&](Vec value) { return divider.exact(value); });
}

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
                         nullptr);
}

}  // namespace QNK_ISA
}  // namespace qnk
