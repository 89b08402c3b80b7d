// Product with packed integer weights in tiles of 16 rows of the weight by 16 rows of activations.
//
// Floor, with AMX, per 16384 products of bytes or 8192 of bf16: one tile instruction (4.7 ns on Sapphire Rapids; 5.7 in a
// loop that reads one operand from the first-level cache and the other from the second). A chunk of 32 rows of the
// weight is unpacked into the first-level cache and meets all tokens of a block there, while the next chunk is
// prefetched; activations and sums stay in the second-level cache. For few tokens tiles of 8-bit codes are read where
// they lie, which is as fast as memory.
#pragma once

#include "cpu/int_forms.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

// Where the next chunk of the weight lies: `rows` x `lines` of 64 bytes, a share of which each product prefetches.
struct Ahead {
    const uint8_t* from;
    int64_t row_bytes, rows;
    int shift;  // 2^shift steps a line

    void line(int64_t step) const {
        if (step & ((1 << shift) - 1)) return;
        const uint8_t* at = from + (step >> shift) * 64;
        for (int64_t r = 0; r < rows; ++r) _mm_prefetch(reinterpret_cast<const char*>(at + r * row_bytes), _MM_HINT_T1);
    }
};

#if defined(__AMX_INT8__)
// A zeroed tile would be three times as slow in a product as one that was loaded.
alignas(64) inline const int32_t kZeros[16] = {};

// (tile numbers are part of the instruction)
#define QNK_TILE_PRODUCT(c, a, b)                                                              \
    do {                                                                                       \
        if constexpr (Form::kBytes)                                                            \
            _tile_dpbusd(c, a, b);                                                             \
        else                                                                                   \
            _tile_dpbf16ps(c, a, b);                                                           \
    } while (0)

// c [32 rows, `apart`] (+)= a [steps][2][16 rows][64] * b [steps][Tiles][16][16 tokens][4], bytes.
// A tile that is loaded anew waits for the product that reads it: each load has a product or two to hide behind.
template <typename Form, int Tiles>
inline void tile_product(const uint8_t* a, const uint8_t* b, int32_t* c, int64_t apart, int64_t steps, bool first,
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
        QNK_TILE_PRODUCT(4, 0, 2);
        QNK_TILE_PRODUCT(6, 1, 2);
        if (step + 1 == steps) break;
        a += 2 * kTileBytes;
        b += Tiles * kTileBytes;
        _tile_loadd(2, b, 64);
        if (Tiles == 2) QNK_TILE_PRODUCT(5, 0, 3);
        _tile_loadd(0, a, 64);
        if (Tiles == 2) QNK_TILE_PRODUCT(7, 1, 3);
        _tile_loadd(1, a + kTileBytes, 64);
        if (Tiles == 2) _tile_loadd(3, b + kTileBytes, 64);
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
constexpr bool kDirect = true;
#else
template <typename Form, int Tiles>
inline void tile_product(const uint8_t* a, const uint8_t* b, int32_t* c, int64_t apart, int64_t steps, bool first,
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
            const uint8_t* tokens = b + step * Tiles * kTileBytes;
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
template <int Tiles>
inline void direct_product(const uint8_t*, int64_t, const uint8_t*, const uint8_t*, int32_t*, int64_t, int64_t) {}
constexpr bool kDirect = false;
#endif

// Form: ByteForm or Bf16Form.
template <typename Form>
class IntTileProduct {
  public:
    IntTileProduct(const Packed& w, const Segments& segments, const Quantization& how)
        : w_(w), segments_(segments), how_(how), width_(Form::width(w, segments)) {}

    // Whether `m` tokens of 8-bit codes are multiplied where the codes lie.
    static bool direct(const Packed& w, const Segments& segments, int bytes, int64_t m) {
        return Form::kBytes && kDirect && w.bits == 8 && segments.count() == 1 && w.k % 64 == 0 &&
               m * bytes + (bytes == 1 ? 1 : 0) <= kDirectRows;
    }

    // False in `representable` where the form cannot hold x; y [m, n] is then not written.
    template <typename T>
    int multiply(const T* x, const float* bias, T* y, int64_t m, bool& representable) {
        const int64_t parts = Form::parts(how_), fit = kCache / width_ > 16 ? kCache / width_ : 16;
        const int64_t most = fit < kMostRows ? fit : kMostRows, blocks = (m * parts + most - 1) / most;
        const int64_t block = (m + blocks * 16 - 1) / (blocks * 16) * 16;  // tokens
        direct_ = direct(w_, segments_, how_.bytes, m);
        const int64_t tiles = (block * parts + (direct_ ? ones() : 0) + 15) / 16;
        apart_ = tiles * 16 + 16;
        Form form(w_, segments_, how_, block);
        const Buffer<uint8_t> packed(tiles * 16 * width_);
        const int threads = max_threads();
        const Buffer<uint8_t> codes(threads * kSteps * 2 * kTileBytes);
        const Buffer<int32_t> sums(threads * 32 * apart_);
        const bool several = segments_.count() > 1;
        const Buffer<float> totals(several ? threads * 32 * block : 0);
        if (!form || !packed || !codes || !sums || !totals) return QNK_NO_MEMORY;
        for (int64_t first = 0; first < m; first += block) {
            const int64_t tokens = m - first < block ? m - first : block;
            representable = form.take(x + first * w_.k, tokens);
            if (!representable) return QNK_OK;
            const int64_t rows = tokens * parts + (direct_ ? ones() : 0);
            parallel_for((rows + 15) / 16, 65536 / width_ / 16 + 1, [&](int64_t begin, int64_t end) {
                for (int64_t tile = begin; tile < end; ++tile) pack(form, rows, tile, packed.get());
            });
            parallel_for(w_.n, 32, [&](int64_t begin, int64_t end, int thread) {
                const Tiles scope;
                Work work{codes.get() + thread * kSteps * 2 * kTileBytes, sums.get() + thread * 32 * apart_,
                          totals.get() + (several ? thread * 32 * block : 0), {}};
                for (int64_t o = begin; o < end; o += 32) {
                    if (w_.bits == 8)
                        multiply_rows<8>(form, rows, packed.get(), bias, y + first * w_.n, o, end, work);
                    else
                        multiply_rows<4>(form, rows, packed.get(), bias, y + first * w_.n, o, end, work);
                }
            });
        }
        return QNK_OK;
    }

  private:
    static constexpr int64_t kSteps = 8;         // of a chunk
    static constexpr int64_t kMostRows = 256;    // of activations in a block
    static constexpr int64_t kCache = 1 << 20;   // bytes of them
    static constexpr int64_t kDirectRows = 48;   // three tiles

    // A row of ones gives the sums of the weight's codes, where activations have zero points.
    int64_t ones() const { return Form::kBytes && how_.bytes == 1 ? 1 : 0; }

    // Where in packed rows [steps / run][tiles / 2][run][2][16][16 rows][4 bytes] those of a step of a segment lie: what is
    // multiplied in a row lies in a row. A run is a chunk; where the weight is not unpacked, it is the row. The last pair
    // of tiles may be one tile.
    int64_t place(const Form& form, const Segment& s, int64_t step, int64_t pair, int64_t tiles) const {
        const int64_t all = form.steps(s), run = direct_ ? all : kSteps, begin = step / run * run;
        const int64_t steps = all - begin < run ? all - begin : run, in_pair = tiles - 2 * pair < 2 ? 1 : 2;
        return ((form.first_step(s) + begin) * tiles + pair * 2 * steps + (step - begin) * in_pair) * kTileBytes;
    }

    void pack(const Form& form, int64_t rows, int64_t tile, uint8_t* packed) const {
        const int64_t tiles = (rows + 15) / 16, given = rows - (direct_ ? ones() : 0);
        for (int64_t k = 0; k < segments_.count(); ++k) {
            const Segment& s = segments_[k];
            for (int64_t step = 0; step < form.steps(s); ++step) {
                const auto columns = form.columns(form.first_step(s) + step);
                __m512i row[16];
                for (int64_t i = 0; i < 16; ++i) {
                    const int64_t index = tile * 16 + i;
                    row[i] = index < given ? form.row(index, columns) : _mm512_set1_epi8(index < rows ? 1 : 0);
                }
                transpose(row);
                uint8_t* to = packed + place(form, s, step, tile / 2, tiles) + tile % 2 * kTileBytes;
                for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, row[i]);
            }
        }
    }

    // y [tokens, n], rows o to o + 32 of the weight as far as `end`.
    template <int Bits, typename T>
    void multiply_rows(const Form& form, int64_t rows, const uint8_t* packed, const float* bias, T* y, int64_t o,
                       int64_t end, Work& work) const {
        if (direct_ && o + 32 <= end) {
            multiply_direct(form, rows, packed, o, work);
            form.finish(0, bias, y, o, end, apart_, work);
            return;
        }
        const int64_t tiles = (rows + 15) / 16, pairs = (tiles + 1) / 2, share = (32 + pairs - 1) / pairs;
        for (int64_t i = 0; i < segments_.count(); ++i) {
            const Segment& s = segments_[i];
            const int64_t all = form.steps(s);
            for (int r = 0; r < 32; ++r) work.code_sums[r] = 0;
            for (int64_t step = 0; step < all; step += kSteps) {
                const int64_t steps = all - step < kSteps ? all - step : kSteps;
                form.template unpack<Bits>(s, o, end, step, steps, work);
                Ahead ahead = next_chunk(i, step + steps, all, o);
                for (int64_t pair = 0; pair < pairs; ++pair) {
                    ahead.rows = pair * share < 32 ? share : 0;
                    int32_t* c = work.sums + pair * 32;
                    const uint8_t* b = packed + place(form, s, step, pair, tiles);
                    if (tiles - 2 * pair > 1)
                        tile_product<Form, 2>(work.codes, b, c, apart_, steps, step == 0, ahead);
                    else
                        tile_product<Form, 1>(work.codes, b, c, apart_, steps, step == 0, ahead);
                    ahead.from += share * ahead.row_bytes;
                }
            }
            form.finish(i, bias, y, o, end, apart_, work);
        }
    }

    // Sums of 32 rows of 8-bit codes, in one segment.
    void multiply_direct(const Form& form, int64_t rows, const uint8_t* packed, int64_t o, Work& work) const {
        const int64_t steps = width_ / 64;
        const uint8_t *a = w_.row(o), *third = packed + 2 * steps * kTileBytes;
        if (rows <= 16)
            direct_product<1>(a, w_.row_bytes(), packed, third, work.sums, apart_, steps);
        else if (rows <= 32)
            direct_product<2>(a, w_.row_bytes(), packed, third, work.sums, apart_, steps);
        else
            direct_product<3>(a, w_.row_bytes(), packed, third, work.sums, apart_, steps);
        if (ones())
            for (int r = 0; r < 32; ++r) work.code_sums[r] = work.sums[r * apart_ + form.tokens()];
    }

    // After `step` of `all` steps of segment i in rows from o on. (Past the last row nothing is read, only prefetched.)
    Ahead next_chunk(int64_t i, int64_t step, int64_t all, int64_t o) const {
        const int shift = Form::line_shift(w_.bits);
        const bool done = step >= all && i + 1 == segments_.count();
        const int64_t column = done ? 0 : segments_[i].column * w_.bits / 8 + (step >> shift) * 64;
        return {w_.codes + (o + (done ? 32 : 0)) * w_.row_bytes() + column, w_.row_bytes(), 0, shift};
    }

    const Packed& w_;
    const Segments& segments_;
    Quantization how_;
    int64_t width_, apart_ = 0;
    bool direct_ = false;
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
