// The innermost products of packed integer weights in tiles: by AMX, or by VNNI in the same layout.
//
// A tile instruction multiplies 16 rows of the weight by 16 rows of activations, 64 bytes of each: 16384 products of bytes
// or 8192 of bf16. See int_tiles.h for what a loop of them reaches.
#pragma once

#include "cpu/int_forms.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

// Up to so many threads pack tiles of tokens each for itself: half of what another one packed lies in the other's cache.
constexpr int kOwnThreads = 4;

// Rows of codes to ask for, row_bytes apart, a line of 64 bytes for 2^shift steps of a product.
struct Ahead {
    const uint8_t* from;
    int64_t row_bytes;
    int shift;
};

// How sums of whole segments become totals as they leave the registers.
struct Scaling {
    const float* factors;  // [segments][32 rows]; null: sums are stored as they are
    int64_t segments, rows;
    int64_t apart;  // bytes between the same tokens of two segments
    bool first;     // of a row
};

#if defined(__AMX_INT8__)
// A zeroed tile would be three times as slow in a product as one that was loaded.
alignas(64) inline const int32_t kZeros[16] = {};

// (tile numbers are part of the instruction)
#define QNK_TILE_PRODUCT(c, a, b)                                                              \
    do {                                                                                       \
        if constexpr (Form::kBytes && Form::kSigned)                                           \
            _tile_dpbssd(c, a, b);                                                             \
        else if constexpr (Form::kBytes)                                                       \
            _tile_dpbusd(c, a, b);                                                             \
        else                                                                                   \
            _tile_dpbf16ps(c, a, b);                                                           \
    } while (0)

// c [32 rows, `apart`] (+)= a [steps][2][16 rows][64] * b [steps][Tiles][16][16 tokens][4], bytes. feed.step() does in
// between what there is to do for the next product.
// A tile that is loaded anew waits for the product that reads it: each load has a product or two to hide behind. (Tokens
// stream from the second-level cache: they would take the place of codes in the first.)
template <typename Form, int Tiles, typename Feed>
inline void tile_product(const uint8_t* a, const uint8_t* b, int32_t* c, int64_t apart, int64_t steps, bool first,
                         Feed& feed, const Scaling&) {
    const int64_t stride = first ? 0 : apart * 4, second = first ? 0 : 16 * apart;
    const int32_t* from = first ? kZeros : c;
    _tile_loadd(0, a, 64);
    _tile_stream_loadd(2, b, 64);
    _tile_loadd(4, from, stride);
    _tile_loadd(1, a + kTileBytes, 64);
    _tile_loadd(6, from + second, stride);
    if (Tiles == 2) {
        _tile_stream_loadd(3, b + kTileBytes, 64);
        _tile_loadd(5, first ? from : from + 16, stride);
        _tile_loadd(7, first ? from : from + second + 16, stride);
    }
    for (int64_t step = 0;; ++step) {
        feed.step();
        QNK_TILE_PRODUCT(4, 0, 2);
        QNK_TILE_PRODUCT(6, 1, 2);
        if (step + 1 == steps) break;
        a += 2 * kTileBytes;
        b += Tiles * kTileBytes;
        _tile_stream_loadd(2, b, 64);
        if (Tiles == 2) QNK_TILE_PRODUCT(5, 0, 3);
        _tile_loadd(0, a, 64);
        if (Tiles == 2) QNK_TILE_PRODUCT(7, 1, 3);
        _tile_loadd(1, a + kTileBytes, 64);
        if (Tiles == 2) _tile_stream_loadd(3, b + kTileBytes, 64);
    }
    if (Tiles == 2) {
        QNK_TILE_PRODUCT(5, 0, 3);
        QNK_TILE_PRODUCT(7, 1, 3);
    }
    _tile_stored(4, c, apart * 4);
    _tile_stored(6, c + 16 * apart, apart * 4);
    if (Tiles == 2) {
        _tile_stored(5, c + 16, apart * 4);
        _tile_stored(7, c + 16 * apart + 16, apart * 4);
    }
}
#undef QNK_TILE_PRODUCT

// The same with a [32 rows, row_bytes] in 8-bit codes as they lie; the third tile of b is at b_third.
template <int Tiles>
inline void direct_product(const uint8_t* a, int64_t row_bytes, const uint8_t* b, const uint8_t* b_third, int32_t* c,
                           int64_t apart, int64_t steps) {
    const uint8_t* second = a + 16 * row_bytes;
    constexpr int64_t kPair = Tiles == 1 ? kTileBytes : 2 * kTileBytes;
    _tile_loadd(2, kZeros, 0);
    _tile_loadd(3, kZeros, 0);
    if (Tiles > 1) {
        _tile_loadd(4, kZeros, 0);
        _tile_loadd(5, kZeros, 0);
    }
    if (Tiles > 2) {
        _tile_loadd(6, kZeros, 0);
        _tile_loadd(7, kZeros, 0);
    }
    for (int64_t step = 0; step < steps; ++step) {
        const uint8_t* tokens = b + step * kPair;
        _tile_loadd(0, a + step * 64, row_bytes);
        _tile_loadd(1, tokens, 64);
        _tile_dpbusd(2, 0, 1);
        if (Tiles > 1) {
            _tile_loadd(1, tokens + kTileBytes, 64);
            _tile_dpbusd(4, 0, 1);
        }
        if (Tiles > 2) {
            _tile_loadd(1, b_third + step * kTileBytes, 64);
            _tile_dpbusd(6, 0, 1);
        }
        _tile_loadd(0, second + step * 64, row_bytes);
        if (Tiles > 2) {
            _tile_dpbusd(7, 0, 1);
            _tile_loadd(1, tokens + kTileBytes, 64);
        }
        if (Tiles > 1) {
            _tile_dpbusd(5, 0, 1);
            _tile_loadd(1, tokens, 64);
        }
        _tile_dpbusd(3, 0, 1);
    }
    _tile_stored(2, c, apart * 4);
    _tile_stored(3, c + 16 * apart, apart * 4);
    if (Tiles > 1) {
        _tile_stored(4, c + 16, apart * 4);
        _tile_stored(5, c + 16 * apart + 16, apart * 4);
    }
    if (Tiles > 2) {
        _tile_stored(6, c + 32, apart * 4);
        _tile_stored(7, c + 16 * apart + 32, apart * 4);
    }
}
constexpr bool kDirect = true, kScales = false;
#else
// c [Rows, `apart`] (+)= products of Rows rows of a 64 bytes apart, of each step 2 tiles; with factors c holds totals in
// fp32, and the sums of `steps` steps are multiplied by a factor before those of the next segment are added to them. (Not
// inlined: beside other code the compiler stores sums that would fit the registers.)
template <typename Form, int Rows, int Tiles>
__attribute__((noinline)) void row_products(const uint8_t* a, const uint8_t* b, int32_t* c, int64_t apart, int64_t steps,
                                            bool first, Ahead ahead, Scaling scaling) {
    __m512i total[Rows][Tiles];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < Tiles; ++i) total[r][i] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(c + r * apart + 16 * i);
    for (int64_t segment = 1, done = 0;; ++segment) {
        for (int64_t step = 0; step < steps; ++step, ++done, a += 2 * kTileBytes, b += (Tiles - 1) * kTileBytes) {
#pragma GCC unroll 1
            for (int quad = 0; quad < 16; ++quad, b += 64) {
                const uint8_t* line = ahead.from + quad * Rows / 16 * ahead.row_bytes + (done >> ahead.shift) * 64;
                _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
                __m512i x[Tiles];
#pragma GCC unroll 2
                for (int i = 0; i < Tiles; ++i) x[i] = _mm512_load_si512(b + i * kTileBytes);
#pragma GCC unroll 16
                for (int r = 0; r < Rows; ++r) {
                    int32_t four;
                    __builtin_memcpy(&four, a + r * 64 + quad * 4, 4);
                    const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 2
                    for (int i = 0; i < Tiles; ++i)
                        total[r][i] = Form::kBytes ? byte_products(total[r][i], codes, x[i])
                                                   : bf16_products(total[r][i], codes, x[i]);
                }
            }
        }
        if (segment >= scaling.segments) break;
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const Vec factor = splat(scaling.factors[r]);
#pragma GCC unroll 2
            for (int i = 0; i < Tiles; ++i)
                total[r][i] = _mm512_castps_si512((Vec{_mm512_castsi512_ps(total[r][i])} * factor).v);
        }
        scaling.factors += 32;
        b += scaling.apart - steps * Tiles * kTileBytes;
    }
    if (scaling.factors) {
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const Vec scale = splat(scaling.factors[r]);
#pragma GCC unroll 2
            for (int i = 0; i < Tiles; ++i) {
                float* to = reinterpret_cast<float*>(c + r * apart + 16 * i);
                const Vec value{_mm512_castsi512_ps(total[r][i])};
                store(to, scaling.first ? value * scale : fma(value, scale, load(to)));
            }
        }
        return;
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < Tiles; ++i) _mm512_storeu_si512(c + r * apart + 16 * i, total[r][i]);
}

template <typename Form, int Tiles, typename Feed>
inline void tile_product(const uint8_t* a, const uint8_t* b, int32_t* c, int64_t apart, int64_t steps, bool first,
                         Feed& feed, Scaling scaling) {
    constexpr int kRows = 16 / Tiles;
    for (int64_t step = 0; step < steps * (scaling.factors ? scaling.segments : 1); ++step) feed.step();
    Ahead ahead = feed.ahead();
    for (int row = 0; row < 32 && (!scaling.factors || scaling.rows > 0); row += kRows) {
        row_products<Form, kRows, Tiles>(a + row / 16 * kTileBytes + row % 16 * 64, b, c + row * apart, apart, steps, first, ahead,
                                         scaling);
        ahead.from += kRows * ahead.row_bytes;
        if (scaling.factors) scaling.factors += kRows, scaling.rows -= kRows;
    }
}
template <int Tiles>
inline void direct_product(const uint8_t*, int64_t, const uint8_t*, const uint8_t*, int32_t*, int64_t, int64_t) {}
constexpr bool kDirect = false, kScales = true;
#endif

#endif

}  // namespace QNK_ISA
}  // namespace qnk
