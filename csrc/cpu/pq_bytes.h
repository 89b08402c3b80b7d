// pq_linear of one token where AVX-512 looks up bytes: k <= 256 products of a block, in 16 bits, are two tables of bytes
// of four registers each, and two instructions look up 64 codes in each half of one.
//
// Products are rounded to multiples of a step that 64 blocks share, so the relative error of y is about 5e-5 for
// blocks of like size. A token whose blocks differ so much that it would be above kTolerance is refused.
// Per 64 codes: some 19 instructions, 10 cycles. Codes are read once: n * blocks bytes. Floor for 4096x4096, d = 8: 2.1 MB,
// and by instructions 25 us of look-ups and 10 of tables on 2 cores of Zen 5; measured 73 us with the call.
#pragma once

#include "cpu/parallel.h"
#include "cpu/pq.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512VBMI__)

constexpr bool kHasByteTables = true;
constexpr float kTolerance = 7e-5f;  // relative to the spread of y
constexpr int kSegment = 64;         // blocks that share a step; sums of as many bytes fit 16 bits
constexpr int kEntries = 256;        // of a table, padded
constexpr int kAhead = 8;            // blocks between a prefetch and its use
constexpr int kStrip = 2048;         // outputs that meet the tables of a segment one after another

struct ByteTables {
    const ProductQuantized& w;
    const float* codewords;  // [d][256], transposed and padded with zeros
    uint8_t* bytes;          // [blocks][2][256]: low and high bytes of the rounded products
    float* step;             // [segments]
    float* offset;           // [segments]: sum of the least products
    float* signal;           // [segments]: variance of the products, added up
    float* noise;            // [segments]: variance of their rounding

    int64_t segments() const { return (w.blocks + kSegment - 1) / kSegment; }
    int64_t end_of(int64_t segment) const { return (segment + 1) * kSegment < w.blocks ? (segment + 1) * kSegment : w.blocks; }

    // Tables of one segment; products: room for [kSegment][256], zeros past k.
    void build(const float* x, int64_t segment, float* products) const {
        switch (w.d) {
            case 4: return build_of<4>(x, segment, products);
            case 8: return build_of<8>(x, segment, products);
            case 16: return build_of<16>(x, segment, products);
            default: return build_of<0>(x, segment, products);
        }
    }

    template <int D>
    void build_of(const float* x, int64_t segment, float* products) const {
        const int d = D ? D : w.d;
        const int vectors = static_cast<int>((w.k + 15) / 16);
        const __mmask16 tail = first_lanes(static_cast<int>(w.k - 16 * (vectors - 1)));
        const float count = static_cast<float>(w.k);
        const int64_t begin = segment * kSegment, end = end_of(segment);
        float low[kSegment], widest = 0.0f, lowest = 0.0f, variance = 0.0f;
        for (int64_t b = begin; b < end; ++b) {
            float* to = products + (b - begin) * kEntries;
            __m512 least = _mm512_set1_ps(__builtin_inff()), most = _mm512_set1_ps(-__builtin_inff());
            __m512 total = _mm512_setzero_ps(), squares = total, value[D ? D : 1];
            for (int j = 0; j < D; ++j) value[j] = _mm512_set1_ps(x[b * d + j]);
            for (int v = 0; v < vectors; ++v) {
                __m512 sum = _mm512_setzero_ps();
                for (int j = 0; j < d; ++j)
                    sum = _mm512_fmadd_ps(D ? value[j] : _mm512_set1_ps(x[b * d + j]),
                                          _mm512_load_ps(codewords + j * kEntries + v * 16), sum);
                _mm512_store_ps(to + v * 16, sum);
                const __mmask16 lanes = v + 1 < vectors ? 0xffff : tail;
                least = _mm512_mask_min_ps(least, lanes, least, sum);
                most = _mm512_mask_max_ps(most, lanes, most, sum);
                total = _mm512_add_ps(total, sum);  // padding adds zeros
                squares = _mm512_fmadd_ps(sum, sum, squares);
            }
            const float mean = _mm512_reduce_add_ps(total) / count;
            const float spread = _mm512_reduce_add_ps(squares) / count - mean * mean;
            low[b - begin] = _mm512_reduce_min_ps(least);
            const float range = _mm512_reduce_max_ps(most) - low[b - begin];
            widest = range > widest ? range : widest;
            lowest += low[b - begin];
            variance += spread > 0.0f ? spread : 0.0f;
        }
        const bool flat = !(widest > 0.0f);
        step[segment] = flat ? 1.0f : widest / 65535.0f;
        offset[segment] = lowest;
        signal[segment] = variance;
        noise[segment] = flat ? 0.0f : step[segment] * step[segment] / 12.0f * static_cast<float>(end - begin);
        const __m512 inverse = _mm512_set1_ps(1.0f / step[segment]);
        const __m512i top = _mm512_set1_epi32(65535), bottom = _mm512_setzero_si512();
        for (int64_t b = begin; b < end; ++b) {
            const __m512 least = _mm512_set1_ps(low[b - begin]);
            for (int v = 0; v < kEntries; v += 16) {
                const __m512 product = _mm512_load_ps(products + (b - begin) * kEntries + v);
                const __m512i nearest = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(product, least), inverse));
                const __m512i whole = _mm512_max_epi32(bottom, _mm512_min_epi32(top, nearest));
                uint8_t* to = bytes + b * 2 * kEntries + v;
                _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(whole));
                _mm_store_si128(reinterpret_cast<__m128i*>(to + kEntries), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
            }
        }
    }

    // Whether the rounding is too little to be felt.
    bool precise() const {
        double all_noise = 0.0, all_signal = 0.0;
        for (int64_t s = 0; s < segments(); ++s) {
            all_noise += noise[s];
            all_signal += signal[s];
        }
        return all_noise <= static_cast<double>(kTolerance) * kTolerance * all_signal && all_signal < 1e30;
    }

    // Registers: a byte table of 64, 128 or 256 entries.
    template <int Registers>
    static __m512i look_up(const __m512i* table, __m512i codes, __mmask64 upper) {
        if (Registers == 1) return _mm512_permutexvar_epi8(codes, table[0]);
        const __m512i first = _mm512_permutex2var_epi8(table[0], codes, table[1]);
        if (Registers == 2) return first;
        return _mm512_mask_blend_epi8(upper, first, _mm512_permutex2var_epi8(table[2], codes, table[3]));
    }

    // total [64 * Groups] += sums of a segment for outputs from `first` on, as far as they lie below n; of each 64 the even
    // ones before the odd ones.
    template <int Registers, int Groups>
    void add(int64_t s, int64_t first, float* total) const {
        const uint8_t* codes = w.block<uint8_t>(0) + first;
        const __m512i even = _mm512_set1_epi16(0xff);
        __mmask64 inside[Groups];
        for (int g = 0; g < Groups; ++g) {
            const int64_t rest = w.n - first - 64 * g;
            inside[g] = rest >= 64 ? ~0ull : rest > 0 ? (1ull << rest) - 1 : 0;
        }
        __m512i sums[Groups][4];  // of low and high bytes of even and odd outputs
        for (int g = 0; g < Groups; ++g)
            for (int i = 0; i < 4; ++i) sums[g][i] = _mm512_setzero_si512();
        for (int64_t b = s * kSegment; b < end_of(s); ++b) {
            __m512i low_bytes[Registers], high_bytes[Registers];
            for (int r = 0; r < Registers; ++r) {
                low_bytes[r] = _mm512_load_si512(bytes + b * 2 * kEntries + 64 * r);
                high_bytes[r] = _mm512_load_si512(bytes + b * 2 * kEntries + kEntries + 64 * r);
            }
            // the codes of a block lie n bytes on, where no prefetcher looks
            for (int g = 0; g < Groups; ++g) __builtin_prefetch(codes + (b + kAhead) * w.n + 64 * g);
            for (int g = 0; g < Groups; ++g) {
                const __m512i index = _mm512_maskz_loadu_epi8(inside[g], codes + b * w.n + 64 * g);
                const __mmask64 upper = Registers == 4 ? _mm512_movepi8_mask(index) : 0;
                const __m512i a = look_up<Registers>(low_bytes, index, upper);
                const __m512i c = look_up<Registers>(high_bytes, index, upper);
                sums[g][0] = _mm512_add_epi16(sums[g][0], _mm512_and_si512(a, even));
                sums[g][1] = _mm512_add_epi16(sums[g][1], _mm512_srli_epi16(a, 8));
                sums[g][2] = _mm512_add_epi16(sums[g][2], _mm512_and_si512(c, even));
                sums[g][3] = _mm512_add_epi16(sums[g][3], _mm512_srli_epi16(c, 8));
            }
        }
        const __m512 unit = _mm512_set1_ps(step[s]), least = _mm512_set1_ps(offset[s]);
        for (int i = 0; i < 4 * Groups; ++i, total += 16) {
            const __m512i *low = sums[i / 4] + i % 4 / 2, *high = low + 2;
            const auto half = [&](const __m512i* of) {
                return _mm512_cvtepu16_epi32(i % 2 ? _mm512_extracti64x4_epi64(*of, 1) : _mm512_castsi512_si256(*of));
            };
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(half(low), _mm512_slli_epi32(half(high), 8)));
            _mm512_store_ps(total, _mm512_fmadd_ps(sum, unit, _mm512_add_ps(_mm512_load_ps(total), least)));
        }
    }

    // y of outputs first to first + count, count <= kStrip. (The tables of a segment stay in the first-level cache.)
    template <int Registers>
    void strip(int64_t first, int64_t count, const float* bias, float* y) const {
        constexpr int kGroups = 4;
        alignas(64) float total[kStrip];
        for (float& value : total) value = 0.0f;
        for (int64_t s = 0; s < segments(); ++s)
            for (int64_t at = 0; at < count; at += 64 * kGroups) add<Registers, kGroups>(s, first + at, total + at);
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (int64_t at = 0; at < count; at += 16) {
            const float* from = total + at / 64 * 64 + at % 64 / 32 * 16;
            const __mmask16 lanes = first_lanes(count - at < 16 ? static_cast<int>(count - at) : 16);
            __m512 value = _mm512_permutex2var_ps(_mm512_load_ps(from), at % 32 ? high : low, _mm512_load_ps(from + 32));
            if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, bias + first + at));
            _mm512_mask_storeu_ps(y + first + at, lanes, value);
        }
    }

    void add_all(int64_t begin, int64_t end, const float* bias, float* y) const {
        for (int64_t first = begin; first < end; first += kStrip) {
            const int64_t count = end - first < kStrip ? end - first : kStrip;
            if (w.k <= 64)
                strip<1>(first, count, bias, y);
            else if (w.k <= 128)
                strip<2>(first, count, bias, y);
            else
                strip<4>(first, count, bias, y);
        }
    }
};

// y [n] fp32 <- x [columns] fp32 . W^T + bias; false, with nothing written, if the token or the weight is not for this.
inline bool multiply_by_bytes(const float* x, const ProductQuantized& w, const float* bias, float* y) {
    const int64_t segments = (w.blocks + kSegment - 1) / kSegment, threads = max_threads(), scratch = kSegment * kEntries;
    const Buffer<float> floats(w.d * kEntries + 4 * segments);
    const PerThread<float> products(threads, scratch);
    const Buffer<uint8_t> bytes(w.blocks * 2 * kEntries);
    if (!floats || !products || !bytes) return false;
    float *codewords = floats.get(), *rest = codewords + w.d * kEntries;
    const ByteTables tables{w,    codewords,       bytes.get(),         rest, rest + segments, rest + 2 * segments,
                            rest + 3 * segments};
    for (int64_t c = 0; c < kEntries; ++c)
        for (int j = 0; j < w.d; ++j) codewords[j * kEntries + c] = c < w.k ? w.codebook[c * w.d + j] : 0.0f;
    parallel_for(segments, 1, [&](int64_t begin, int64_t end, int thread) {
        float* mine = products.of(thread);
        if (w.k < kEntries)
            for (int64_t i = 0; i < scratch; ++i) mine[i] = 0.0f;
        for (int64_t s = begin; s < end; ++s) tables.build(x, s, mine);
    });
    if (!tables.precise()) return false;
    parallel_for(w.n, 256, [&](int64_t begin, int64_t end) { tables.add_all(begin, end, bias, y); });
    return true;
}

#else

constexpr bool kHasByteTables = false;
inline bool multiply_by_bytes(const float*, const ProductQuantized&, const float*, float*) { return false; }

#endif

}  // namespace QNK_ISA
}  // namespace qnk
