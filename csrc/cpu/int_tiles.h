// Integer product in tiles of 16 rows of the weight by 16 rows of activations, by AMX or, without it, VNNI.
//
// Floor, per 16384 products of bytes: one tile instruction (4.7 ns on Sapphire Rapids; 5.7 in a loop that reads one
// operand from the first-level cache and the other from the second). A chunk of 32 rows of the weight by up to 512
// columns is unpacked into the first-level cache and meets all tokens of a block there, while the next chunk is
// prefetched; activations and sums stay in the second-level cache.
#pragma once

#include "cpu/int_rows.h"
#include "cpu/tiles.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

constexpr int64_t kTileBytes = 1024;

// Where the next chunk of the weight lies: `rows` x `lines` of 64 bytes, a share of which each product prefetches.
struct Ahead {
    const uint8_t* from;
    int64_t row_bytes, rows, steps_a_line;

    void line(int64_t step) const {
        const uint8_t* at = from + step / steps_a_line * 64;
        for (int64_t r = 0; r < rows; ++r) _mm_prefetch(reinterpret_cast<const char*>(at + r * row_bytes), _MM_HINT_T1);
    }
};

// c [32 rows, `apart`] (+)= a [steps][2][16 rows][64] * b [steps][Tiles][16 quads of columns][16 tokens][4].
#if defined(__AMX_INT8__)
// A zeroed tile would be three times as slow in a product as one that was loaded.
alignas(64) inline const int32_t kZeros[16] = {};

// A tile that is loaded anew waits for the product that reads it: each load has a product or two to hide behind.
template <int Tiles>
inline void tile_product(const uint8_t* a, const int8_t* b, int32_t* c, int64_t apart, int64_t steps, bool first,
                         const Ahead& ahead) {
    const int64_t stride = first ? 0 : apart * 4, second = first ? 0 : 16 * apart;
    const int32_t* from = first ? kZeros : c;
    _tile_loadd(0, a, 64);
    _tile_loadd(2, b, 64);
    _tile_loadd(4, from, stride);
    _tile_loadd(1, a + kTileBytes, 64);
    _tile_loadd(6, from + second, stride);
    if (Tiles == 2) {
        _tile_loadd(3, b + kTileBytes, 64);
        _tile_loadd(5, first ? from : from + 16, stride);
        _tile_loadd(7, first ? from : from + second + 16, stride);
    }
    for (int64_t step = 0;; ++step) {
        ahead.line(step);
        _tile_dpbusd(4, 0, 2);
        _tile_dpbusd(6, 1, 2);
        if (step + 1 == steps) break;
        a += 2 * kTileBytes;
        b += Tiles * kTileBytes;
        _tile_loadd(2, b, 64);
        if (Tiles == 2) _tile_dpbusd(5, 0, 3);
        _tile_loadd(0, a, 64);
        if (Tiles == 2) _tile_dpbusd(7, 1, 3);
        _tile_loadd(1, a + kTileBytes, 64);
        if (Tiles == 2) _tile_loadd(3, b + kTileBytes, 64);
    }
    if (Tiles == 2) {
        _tile_dpbusd(5, 0, 3);
        _tile_dpbusd(7, 1, 3);
    }
    _tile_stored(4, c, apart * 4);
    _tile_stored(6, c + 16 * apart, apart * 4);
    if (Tiles == 2) {
        _tile_stored(5, c + 16, apart * 4);
        _tile_stored(7, c + 16 * apart + 16, apart * 4);
    }
}
#else
template <int Tiles>
inline void tile_product(const uint8_t* a, const int8_t* b, int32_t* c, int64_t apart, int64_t steps, bool first,
                         const Ahead& ahead) {
    constexpr int kRows = 8;
    for (int64_t step = 0; step < steps; ++step) ahead.line(step);
    for (int row = 0; row < 32; row += kRows) {
        __m512i total[kRows][Tiles];
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < Tiles; ++i)
                total[r][i] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(c + (row + r) * apart + 16 * i);
        for (int64_t step = 0; step < steps; ++step) {
            const uint8_t* codes = a + (step * 2 + row / 16) * kTileBytes + row % 16 * 64;
            const int8_t* tokens = b + step * Tiles * kTileBytes;
            for (int quad = 0; quad < 16; ++quad) {
                __m512i x[Tiles];
                for (int i = 0; i < Tiles; ++i) x[i] = _mm512_load_si512(tokens + i * kTileBytes + quad * 64);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    int32_t four;
                    __builtin_memcpy(&four, codes + r * 64 + quad * 4, 4);
                    for (int i = 0; i < Tiles; ++i)
                        total[r][i] = _mm512_dpbusd_epi32(total[r][i], _mm512_set1_epi32(four), x[i]);
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < Tiles; ++i) _mm512_storeu_si512(c + (row + r) * apart + 16 * i, total[r][i]);
    }
}
#endif

class IntTileProduct {
  public:
    IntTileProduct(const Packed& w, const Segments& segments, const Quantization& how)
        : w_(w), segments_(segments), how_(how) {}

    // False in `representable` where Activations::quantize gives it; y [m, n] is then not written.
    template <typename T>
    int multiply(const T* x, const float* bias, T* y, int64_t m, bool& representable) {
        const int64_t width = segments_.width(), bytes = how_.bytes;
        const int64_t fit = kCache / width > 16 ? kCache / width : 16, most = fit < kMostRows ? fit : kMostRows;
        const int64_t blocks = (m * bytes + most - 1) / most;
        const int64_t block = (m + blocks * 16 - 1) / (blocks * 16) * 16;  // tokens
        const int64_t tiles = (block * bytes + 15) / 16;
        apart_ = tiles * 16 + 16;
        Activations activations(w_, segments_, how_, block);
        const Buffer<int8_t> packed(tiles * 16 * width);
        const int threads = max_threads();
        const Buffer<uint8_t> codes(threads * kSteps * 2 * kTileBytes);
        const Buffer<int32_t> sums(threads * 32 * apart_);
        const bool several = segments_.count() > 1;
        const Buffer<float> totals(several ? threads * 32 * block : 0);
        if (!activations || !packed || !codes || !sums || !totals) return QNK_NO_MEMORY;
        for (int64_t first = 0; first < m; first += block) {
            const int64_t tokens = m - first < block ? m - first : block;
            if (!activations.quantize(x + first * w_.k, tokens)) {
                representable = false;
                return QNK_OK;
            }
            const int64_t rows = tokens * bytes;
            parallel_for((rows + 15) / 16, 4, [&](int64_t begin, int64_t end) {
                for (int64_t tile = begin; tile < end; ++tile) pack(activations, rows, tile, packed.get());
            });
            parallel_for(w_.n, 32, [&](int64_t begin, int64_t end, int thread) {
                const Tiles scope;
                Work work{codes.get() + thread * kSteps * 2 * kTileBytes, sums.get() + thread * 32 * apart_,
                          totals.get() + (several ? thread * 32 * block : 0), {}};
                for (int64_t o = begin; o < end; o += 32) {
                    if (w_.bits == 8)
                        multiply_rows<8>(activations, packed.get(), bias, y + first * w_.n, o, end, work);
                    else
                        multiply_rows<4>(activations, packed.get(), bias, y + first * w_.n, o, end, work);
                }
            });
        }
        return QNK_OK;
    }

  private:
    static constexpr int64_t kSteps = 8;          // of a chunk
    static constexpr int64_t kMostRows = 256;     // of activations in a block
    static constexpr int64_t kCache = 1 << 20;    // bytes of them

    struct Work {
        uint8_t* codes;   // [kSteps][2][1024]
        int32_t* sums;    // [32][apart]
        float* totals;    // [32][block], where a row has several segments
        alignas(64) int32_t code_sums[32];
    };

    // packed [rows / 32][steps][2][16 quads of columns][16 rows][4], less a second tile that would be empty.
    static void pack(const Activations& x, int64_t rows, int64_t tile, int8_t* packed) {
        const int64_t width = x.row(1) - x.row(0), tiles = rows - tile / 2 * 32 > 16 ? 2 : 1;
        int8_t* to = packed + tile / 2 * 32 * width + tile % 2 * kTileBytes;
        for (int64_t at = 0; at < width; at += 64, to += tiles * kTileBytes) {
            __m512i row[16];
            for (int64_t i = 0; i < 16; ++i)
                row[i] = tile * 16 + i < rows ? _mm512_load_si512(x.row(tile * 16 + i) + at) : _mm512_setzero_si512();
            transpose(row);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, row[i]);
        }
    }

    // Steps of 32 rows from `o` on, of which those before `end` are read: `units` units of a segment from `unit` on.
    template <int Bits, bool Sums>
    void unpack(const Segment& s, int64_t o, int64_t end, int64_t unit, int64_t units, Work& work) const {
        const int64_t whole = Unit<Bits>::whole(s), rest = Unit<Bits>::rest(s);
        const int64_t stop = unit + units < whole ? unit + units : whole;
        for (int64_t r = 0; r < 32 && o + r < end; ++r) {
            const uint8_t* from = w_.row(o + r) + s.column * Bits / 8;
            uint8_t* to = work.codes + r / 16 * kTileBytes + r % 16 * 64;
            __m512i total = _mm512_setzero_si512();
            const auto put = [&](const Unit<Bits>& codes, int steps) {
                for (int i = 0; i < steps; ++i, to += 2 * kTileBytes) {
                    _mm512_store_si512(to, codes.codes[i]);
                    if (Sums) total = _mm512_dpbusd_epi32(total, codes.codes[i], _mm512_set1_epi8(1));
                }
            };
            for (int64_t u = unit; u < stop; ++u) put(Unit<Bits>(from + u * 64), Unit<Bits>::kSteps);
            if (rest && unit + units > whole) put(Unit<Bits>(from + whole * 64, rest), Unit<Bits>::steps(rest));
            if (Sums) work.code_sums[r] += _mm512_reduce_add_epi32(total);
        }
    }

    // y [tokens, n], rows o to o + 32 of the weight as far as `end`.
    template <int Bits, typename T>
    void multiply_rows(const Activations& x, const int8_t* packed, const float* bias, T* y, int64_t o, int64_t end,
                       Work& work) const {
        const int64_t rows = x.tokens() * x.bytes(), pairs = (rows + 31) / 32;
        for (int64_t i = 0; i < segments_.count(); ++i) {
            const Segment& s = segments_[i];
            __builtin_memset(work.code_sums, 0, sizeof work.code_sums);
            for (int64_t step = 0; step < s.steps; step += kSteps) {
                const int64_t steps = s.steps - step < kSteps ? s.steps - step : kSteps;
                const int64_t unit = step / Unit<Bits>::kSteps, units = kSteps / Unit<Bits>::kSteps;
                if (x.bytes() == 1)
                    unpack<Bits, true>(s, o, end, unit, units, work);
                else
                    unpack<Bits, false>(s, o, end, unit, units, work);
                const int64_t share = (32 + pairs - 1) / pairs;
                Ahead ahead = next_chunk<Bits>(i, step + steps, o);
                for (int64_t pair = 0; pair < pairs; ++pair) {
                    ahead.rows = pair * share < 32 ? share : 0;
                    int32_t* c = work.sums + pair * 32;
                    const int8_t* b = packed + pair * 32 * segments_.width();
                    if (rows - pair * 32 > 16)
                        tile_product<2>(work.codes, b + (s.step + step) * 2 * kTileBytes, c, apart_, steps, step == 0, ahead);
                    else
                        tile_product<1>(work.codes, b + (s.step + step) * kTileBytes, c, apart_, steps, step == 0, ahead);
                    ahead.from += share * ahead.row_bytes;
                }
            }
            switch (x.bytes()) {
                case 1: finish<1>(x, i, bias, y, o, end, work); break;
                case 2: finish<2>(x, i, bias, y, o, end, work); break;
                default: finish<3>(x, i, bias, y, o, end, work);
            }
        }
    }

    // After `step` steps of segment i in rows from o on. (Past the last row nothing is read, only prefetched.)
    template <int Bits>
    Ahead next_chunk(int64_t i, int64_t step, int64_t o) const {
        const Segment& s = segments_[i];
        int64_t column = s.column * Bits / 8 + step / Unit<Bits>::kSteps * 64;
        if (step >= s.steps && i + 1 == segments_.count()) {
            column = 0;
            o += 32;
        }
        return {w_.row(o) + column, w_.row_bytes(), 0, Unit<Bits>::kSteps};
    }

    // Sums of segment i into y, or into the totals while there are segments to come.
    template <int Bytes, typename T>
    void finish(const Activations& x, int64_t i, const float* bias, T* y, int64_t o, int64_t end, Work& work) const {
        const int64_t tokens = x.tokens(), group = segments_[i].group, block = (tokens + 15) / 16 * 16;
        const bool first = i == 0, last = i + 1 == segments_.count();
        for (int64_t half = 0; half < 32 && o + half < end; half += 16) {
            const int count = static_cast<int>(end - o - half < 16 ? end - o - half : 16);
            for (int64_t t = 0; t < tokens; t += 16) {
                __m512i out[16];
                for (int r = 0; r < count; ++r) {
                    const int64_t row = o + half + r;
                    const __m512i zero = _mm512_set1_epi32(w_.zero_point(row, group));
                    const auto part = [&](int b) {
                        __m512i sum = load_int(work.sums + (half + r) * apart_ + b * tokens + t);
                        if (Bytes == 1)
                            sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(work.code_sums[half + r]),
                                                                           load_int(x.zero() + t)));
                        return _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, load_int(x.sums(i, b) + t)));
                    };
                    Vec value = joined<Bytes>(part) * splat(w_.scale[row * w_.groups + group]);
                    float* total = work.totals + (half + r) * block + t;
                    if (!first) value = load(total) + value;
                    if (last) {
                        value = value * load(x.scale() + t);
                        if (bias) value = value + splat(bias[row]);
                        out[r] = _mm512_castps_si512(value.v);
                    } else {
                        store(total, value);
                    }
                }
                if (!last) continue;
                for (int r = count; r < 16; ++r) out[r] = _mm512_setzero_si512();
                transpose(out);
                for (int64_t j = 0; j < 16 && t + j < tokens; ++j) {
                    const Vec value{_mm512_castsi512_ps(out[j])};
                    T* to = y + (t + j) * w_.n + o + half;
                    if (count == 16)
                        store(to, value);
                    else
                        store_first(to, value, count);
                }
            }
        }
    }

    const Packed& w_;
    const Segments& segments_;
    Quantization how_;
    int64_t apart_ = 0;
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
