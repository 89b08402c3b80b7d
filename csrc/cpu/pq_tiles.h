// pq_linear of many tokens with AMX: codewords are decoded into tiles, 16 outputs by 32 columns, that multiply the
// tokens as bf16. fp32 is the sum of two bf16: W.x = Wh.xh + Wl.xh + Wh.xl, to a relative error of some 2^-17.
//
// Operations: 1 to 3 times 2 * m * n * columns at 1024 a cycle and core. A group of 32 outputs and kColumns columns is
// decoded into the first-level cache and meets up to kTokens tokens there; tokens and sums stay in the second.
#pragma once

#include "cpu/parallel.h"
#include "cpu/pq.h"
#include "cpu/tiles.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AMX_TILE__)

class TileProduct {
  public:
    TileProduct(const ProductQuantized& w, bool x_low) : w_(w), x_low_(x_low), steps_((w.columns() + 31) / 32) {}

    // d must divide 32; a step of 32 columns then holds whole codewords.
    static bool serves(const ProductQuantized& w) { return 32 % w.d == 0; }

    template <typename T>
    int multiply(const T* x, const float* bias, T* y, int64_t m) {
        const Buffer<uint16_t> codebook(w_.k * 2 * w_.d);
        if (!codebook) return QNK_NO_MEMORY;
        split_codebook(codebook.get());
        const int64_t block_tokens = m < kTokens ? (m + 31) / 32 * 32 : kTokens, tile_halves = 512;
        const int64_t tokens_tiles = block_tokens / 16, parts = 1 + (x_low_ ? 1 : 0);
        const Buffer<uint16_t> packed(steps_ * tokens_tiles * parts * tile_halves);
        const int threads = max_threads();
        const int64_t weight_size = kSteps * 4 * tile_halves, sums_size = kOutputs / 16 * tokens_tiles * 256;
        const PerThread<uint16_t> weights(threads, weight_size);
        const PerThread<float> sums(threads, sums_size);
        if (!packed || !weights || !sums) return QNK_NO_MEMORY;
        for (int64_t first = 0; first < m; first += block_tokens) {
            const int64_t count = m - first < block_tokens ? m - first : block_tokens;
            const int64_t tiles = (count + 31) / 32 * 2;
            parallel_for(steps_, 1, [&](int64_t begin, int64_t end) {
                for (int64_t step = begin; step < end; ++step)
                    pack(x + first * w_.columns(), count, tiles, step, packed.get());
            });
            parallel(w_.n / 32 + 1, [&](int thread, int team) {
                const Tiles scope;
                // shares are multiples of 32 outputs
                const int64_t groups = (w_.n + 31) / 32;
                const int64_t begin = groups * thread / team * 32, end = groups * (thread + 1) / team * 32;
                for (int64_t o = begin; o < end; o += kOutputs) {
                    const int64_t outputs = end - o < kOutputs ? end - o : kOutputs;
                    float* to = sums.of(thread);
                    multiply_group(packed.get(), tiles, o, outputs, codebook.get(), weights.of(thread), to);
                    write(to, tiles, o, outputs, bias, y + first * w_.n, count);
                }
            });
        }
        return QNK_OK;
    }

  private:
    static constexpr int64_t kTokens = 512;  // that share a decoding
    static constexpr int64_t kOutputs = 512;  // whose sums are kept at once
    static constexpr int64_t kSteps = 8;      // of 32 columns, decoded at once

    // codebook [k][high d, low d] bf16. With tokens in bf16 the high parts do, as if the weight were bf16, too.
    void split_codebook(uint16_t* codebook) {
        w_low_ = false;
        for (int64_t c = 0; c < w_.k; ++c)
            for (int j = 0; j < w_.d; ++j) {
                const float value = w_.codebook[c * w_.d + j];
                const bf16 high = from_float<bf16>(value);
                const bf16 low = from_float<bf16>(value - to_float(high));
                codebook[c * 2 * w_.d + j] = high.bits;
                codebook[c * 2 * w_.d + w_.d + j] = low.bits;
                if (x_low_ && (low.bits & 0x7fff)) w_low_ = true;
            }
    }

    // Where in packed tokens [steps / kSteps][tiles / 2][kSteps][2][parts][16 pairs of columns][16 tokens][2] a tile is:
    // what is multiplied in a row lies in a row.
    int64_t tile_at(int64_t step, int64_t tile, int64_t tiles) const {
        const int64_t run = step / kSteps, together = steps_ - run * kSteps < kSteps ? steps_ - run * kSteps : kSteps;
        const int64_t index = run * kSteps * tiles + (tile / 2 * together + step % kSteps) * 2 + tile % 2;
        return index * (1 + (x_low_ ? 1 : 0)) * 512;
    }

    // The tiles of one step of x.
    template <typename T>
    void pack(const T* x, int64_t count, int64_t tiles, int64_t step, uint16_t* packed) const {
        const int64_t columns = w_.columns(), begin = step * 32, width = columns - begin < 32 ? columns - begin : 32;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            __m512i high[16], low[16];
            for (int64_t i = 0; i < 16; ++i) {
                const int64_t token = tile * 16 + i;
                __m512 value[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                if (token < count) {
                    const T* from = x + token * columns + begin;
                    if (width == 32) {
                        value[0] = load(from).v;
                        value[1] = load(from + 16).v;
                    } else {
                        value[0] = load_first(from, static_cast<int>(width < 16 ? width : 16)).v;
                        if (width > 16) value[1] = load_first(from + 16, static_cast<int>(width - 16)).v;
                    }
                }
                high[i] = (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]);
                if (!x_low_) continue;
                for (int half = 0; half < 2; ++half) {
                    const __m512i bits = _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(high[i], 1)
                                                                    : _mm512_castsi512_si256(high[i]));
                    value[half] = _mm512_sub_ps(value[half], _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
                }
                low[i] = (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]);
            }
            uint16_t* to = packed + tile_at(step, tile, tiles);
            transpose(high);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, high[i]);
            if (!x_low_) continue;
            transpose(low);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 512 + i * 32, low[i]);
        }
    }

    // weights [2 tiles of 16 outputs][high, low][16][32] <- outputs o to o + 32, columns of one step
    template <int D, typename Code>
    void decode(int64_t o, int64_t step, const uint16_t* codebook, uint16_t* weights) const {
        constexpr int kPerStep = 32 / D;
        const int64_t rows = w_.n - o < 32 ? w_.n - o : 32;
        const int64_t blocks = w_.blocks - step * kPerStep < kPerStep ? w_.blocks - step * kPerStep : kPerStep;
        if (rows < 32 || blocks < kPerStep) __builtin_memset(weights, 0, 2048 * sizeof(uint16_t));
        // (the compiler must assume that what is stored below changes members)
        const bool low = w_low_;
        for (int64_t i = 0; i < blocks; ++i) {
            const Code* codes = w_.template block<Code>(step * kPerStep + i) + o;
            __builtin_prefetch(codes + kSteps * kPerStep * w_.n);  // of the next steps: n codes on, no prefetcher looks there
            for (int64_t tile = 0; tile < rows; tile += 16) {
                const int64_t count = rows - tile < 16 ? rows - tile : 16;
                uint16_t* to = weights + tile * 64 + i * D;
                if (low)
                    copy_codewords<D, true>(codes + tile, count, codebook, to);
                else
                    copy_codewords<D, false>(codes + tile, count, codebook, to);
            }
        }
    }

    // to [count][32 apart] <- codewords, and 512 further on their low parts
    template <int D, bool Low, typename Code>
    static void copy_codewords(const Code* codes, int64_t count, const uint16_t* codebook, uint16_t* to) {
        const auto copy = [&](int64_t r) {
            const uint16_t* codeword = codebook + static_cast<uint64_t>(codes[r]) * 2 * D;
            __builtin_memcpy(to + r * 32, codeword, 2 * D);
            if (Low) __builtin_memcpy(to + 512 + r * 32, codeword + D, 2 * D);
        };
        if (count == 16) {
#pragma GCC unroll 16
            for (int64_t r = 0; r < 16; ++r) copy(r);
        } else {
            for (int64_t r = 0; r < count; ++r) copy(r);
        }
    }

    template <typename Code>
    void decode_step(int64_t o, int64_t step, const uint16_t* codebook, uint16_t* weights) const {
        switch (w_.d) {
            case 1: return decode<1, Code>(o, step, codebook, weights);
            case 2: return decode<2, Code>(o, step, codebook, weights);
            case 4: return decode<4, Code>(o, step, codebook, weights);
            case 8: return decode<8, Code>(o, step, codebook, weights);
            case 16: return decode<16, Code>(o, step, codebook, weights);
            default: return decode<32, Code>(o, step, codebook, weights);
        }
    }

    // sums [outputs / 16][tiles][16 outputs][16 tokens]
    void multiply_group(const uint16_t* packed, int64_t tiles, int64_t o, int64_t outputs, const uint16_t* codebook,
                        uint16_t* weights, float* sums) const {
        alignas(64) static const float zeros[16] = {};
        const int64_t parts = 1 + (x_low_ ? 1 : 0);
        for (int64_t step = 0; step < steps_; step += kSteps) {
            const int64_t together = steps_ - step < kSteps ? steps_ - step : kSteps;
            for (int64_t group = 0; group < outputs; group += 32) {
                for (int64_t s = 0; s < together; ++s) {
                    if (w_.code_bytes == 1)
                        decode_step<uint8_t>(o + group, step + s, codebook, weights + s * 2048);
                    else
                        decode_step<uint16_t>(o + group, step + s, codebook, weights + s * 2048);
                }
                for (int64_t tile = 0; tile < tiles; tile += 2) {
                    float* to[2] = {sums + ((group / 16) * tiles + tile) * 256, sums + ((group / 16 + 1) * tiles + tile) * 256};
                    // a zeroed tile would be three times as slow as one that was loaded
                    const int64_t stride = step ? 64 : 0;
                    _tile_loadd(4, step ? to[0] : zeros, stride);
                    _tile_loadd(5, step ? to[0] + 256 : zeros, stride);
                    _tile_loadd(6, step ? to[1] : zeros, stride);
                    _tile_loadd(7, step ? to[1] + 256 : zeros, stride);
                    const uint16_t* b = packed + tile_at(step, tile, tiles);
                    if (x_low_ && w_low_)
                        three_products(weights, b, together);
                    else
                        products(weights, b, together, parts);
                    _tile_stored(4, to[0], 64);
                    _tile_stored(5, to[0] + 256, 64);
                    _tile_stored(6, to[1], 64);
                    _tile_stored(7, to[1] + 256, 64);
                }
            }
        }
    }

    // A tile that is loaded anew waits for the product that reads it, and the product for the load: each load below has a
    // product or two of others to hide behind.

    // sums += Wh.xl + Wh.xh + Wl.xh over `count` steps of weights [2 tiles][high, low] and tokens [2 tiles][high, low].
    static void three_products(const uint16_t* a, const uint16_t* b, int64_t count) {
        _tile_loadd(0, a, 64);
        _tile_loadd(2, b + 512, 64);
        _tile_loadd(1, a + 1024, 64);
        _tile_loadd(3, b + 1536, 64);
        for (int64_t s = 0; s < count; ++s, a += 2048, b += 2048) {
            const int64_t next = s + 1 < count ? 2048 : 0;  // the last step loads its own once more
            _tile_dpbf16ps(4, 0, 2);
            _tile_dpbf16ps(6, 1, 2);
            _tile_loadd(2, b, 64);
            _tile_dpbf16ps(5, 0, 3);
            _tile_dpbf16ps(7, 1, 3);
            _tile_loadd(3, b + 1024, 64);
            _tile_dpbf16ps(4, 0, 2);
            _tile_dpbf16ps(6, 1, 2);
            _tile_dpbf16ps(5, 0, 3);
            _tile_loadd(0, a + 512, 64);
            _tile_dpbf16ps(7, 1, 3);
            _tile_loadd(1, a + 1536, 64);
            _tile_dpbf16ps(4, 0, 2);
            _tile_dpbf16ps(5, 0, 3);
            _tile_loadd(0, a + next, 64);
            _tile_dpbf16ps(6, 1, 2);
            _tile_loadd(2, b + next + 512, 64);
            _tile_dpbf16ps(7, 1, 3);
            _tile_loadd(1, a + next + 1024, 64);
            _tile_loadd(3, b + next + 1536, 64);
        }
    }

    // The same with tokens in one part, or with high parts of the weights only; `parts` of the tokens.
    void products(const uint16_t* a, const uint16_t* b, int64_t count, int64_t parts) const {
        for (int64_t s = 0; s < count; ++s, a += 2048, b += 2 * parts * 512) {
            for (int64_t low = 0; low < (w_low_ ? 2 : 1); ++low)
                for (int64_t part = 0; part < parts; ++part) {
                    _tile_loadd(0, a + low * 512, 64);
                    _tile_loadd(2, b + part * 512, 64);
                    _tile_loadd(3, b + (parts + part) * 512, 64);
                    _tile_dpbf16ps(4, 0, 2);
                    _tile_loadd(1, a + 1024 + low * 512, 64);
                    _tile_dpbf16ps(5, 0, 3);
                    _tile_dpbf16ps(6, 1, 2);
                    _tile_dpbf16ps(7, 1, 3);
                }
        }
    }

    template <typename T>
    void write(const float* sums, int64_t tiles, int64_t o, int64_t outputs, const float* bias, T* y, int64_t count) const {
        for (int64_t group = 0; group < outputs && o + group < w_.n; group += 16) {
            const int rest = static_cast<int>(w_.n - o - group < 16 ? w_.n - o - group : 16);
            const Vec shift = bias ? load_first(bias + o + group, rest) : splat(0.0f);
            for (int64_t first = 0; first < count; first += 16) {
                const float* from = sums + ((group / 16) * tiles + first / 16) * 256;
                __m512i row[16];
                for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(from + i * 16);
                transpose(row);
                for (int64_t t = 0; t < 16 && first + t < count; ++t) {
                    const Vec value = Vec{_mm512_castsi512_ps(row[t])} + shift;
                    T* to = y + (first + t) * w_.n + o + group;
                    if (rest == 16)
                        store(to, value);
                    else
                        store_first(to, value, rest);
                }
            }
        }
    }

    const ProductQuantized& w_;
    bool x_low_, w_low_ = true;
    int64_t steps_;
};

template <typename T>
inline int multiply_by_tiles(const T* x, const ProductQuantized& w, const float* bias, T* y, int64_t m) {
    return TileProduct(w, !std::is_same_v<T, bf16>).multiply(x, bias, y, m);
}
inline bool tiles_serve(const ProductQuantized& w) { return TileProduct::serves(w); }

#else

template <typename T>
inline int multiply_by_tiles(const T*, const ProductQuantized&, const float*, T*, int64_t) {
    return QNK_BAD_DTYPE;
}
inline bool tiles_serve(const ProductQuantized&) { return false; }

#endif

}  // namespace QNK_ISA
}  // namespace qnk
