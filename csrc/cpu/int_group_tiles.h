// Product of bf16 tokens with 4-bit codes in groups of whole 64 bytes by tiles.
//
// A unit is 128 columns of 32 rows of the weight. It is decoded into the first-level cache, 12 instructions a row, and meets
// 32 tokens at a time in 16 tile instructions, whose sums are scaled and added to totals in fp32. Floor: 16 cycles for
// each of n * k * m / 8192 tile instructions; the next unit is decoded and the last sums are scaled in between.
#pragma once

#include "cpu/int_tile_products.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AMX_BF16__)

class GroupedTileProduct {
  public:
    explicit GroupedTileProduct(const Packed& w) : w_(w), units_(w.k / kUnit), units_per_group_(w.group_size() / kUnit) {}

    static bool serves(const Packed& w, int64_t tokens) {
        return w.bits == 4 && w.k > 0 && w.group_size() % kUnit == 0 && tokens >= kFewest;
    }

    // False in `representable` where sums of products may leave fp32's range; y [m, n] is then not whole.
    int multiply(const bf16* x, const float* bias, bf16* y, int64_t m, bool& representable) const {
        const int64_t fit = kCache / (2 * w_.k) > 16 ? kCache / (2 * w_.k) : 16, most = fit < kMostTokens ? fit : kMostTokens;
        const int64_t blocks = (m + most - 1) / most, block = (m + blocks * 16 - 1) / (blocks * 16) * 16;
        const int64_t packed_bytes = block * 2 * w_.k;
        const int threads = max_threads();
        const bool own = threads <= kOwnThreads;
        const Buffer<uint8_t> packed((own ? threads : 1) * packed_bytes);
        const Buffer<Scratch> scratch(threads);
        const Buffer<float> totals(threads * 32 * block);
        if (!packed || !scratch || !totals) return QNK_NO_MEMORY;
        for (int64_t first = 0; first < m; first += block) {
            const int64_t tokens = m - first < block ? m - first : block;
            const bf16* from = x + first * w_.k;
            representable = Bf16Form::holds(from, tokens, w_.k);
            if (!representable) return QNK_OK;
            const auto pack_tiles = [&](int64_t begin, int64_t end, uint8_t* to) {
                for (int64_t tile = begin; tile < end; ++tile) pack(from, tokens, tile, to);
            };
            if (!own)
                parallel_for((tokens + 15) / 16, 1 + 2048 / w_.k,
                             [&](int64_t begin, int64_t end) { pack_tiles(begin, end, packed.get()); });
            parallel_for(w_.n, 32, [&](int64_t begin, int64_t end, int thread) {
                const Tiles scope;
                uint8_t* tiles = packed.get() + (own ? thread * packed_bytes : 0);
                if (own) pack_tiles(0, (tokens + 15) / 16, tiles);
                Scratch& work = scratch.get()[thread];
                float* sums = totals.get() + thread * 32 * block;
                Side side = side_of();
                int64_t turn = 0;
                next_unit(side, work, turn, begin, end, 0, 0);
                side.decode(32);
                __asm__ volatile("" ::: "memory");  // (the compiler is not told that tiles are loaded from memory)
                for (int64_t o = begin; o < end; o += 32) {
                    multiply_units(side, tokens, tiles, o, end, work, turn, sums);
                    finish(tokens, bias, y + first * w_.n, o, end, sums);
                }
            });
        }
        return QNK_OK;
    }

  private:
    static constexpr int64_t kUnit = 128;  // columns, 64 bytes of codes
    static constexpr int64_t kSteps = 4;   // of a tile instruction in a unit: 32 of every 4th column
    static constexpr int64_t kUnitBytes = kSteps * 2 * kTileBytes;  // of 32 rows, decoded
    static constexpr int64_t kAhead = 4;           // units that are asked for before
    static constexpr int64_t kMostTokens = 256;    // of a block
    static constexpr int64_t kFewest = 4;          // tokens; fewer are faster by bytes, see int_grouped_rows.h
    static constexpr int64_t kCache = 1 << 20;     // bytes of its tokens

    // Codes 0 to 15 less each zero point (those of 16 and more are allowed, and exact in bf16), twice over.
    struct Tables {
        alignas(64) uint16_t values[256][32];

        Tables() {
            for (int zero = 0; zero < 256; ++zero) _mm512_store_si512(values[zero], Bf16Form::values_of(zero));
        }
    };

    struct alignas(64) Scratch {
        uint8_t codes[2][kUnitBytes];  // of a unit and the next one, [steps][32 rows][64]
        float scale[4][32];            // of those and the two before
        float sums[2][32 * 32];        // of a product and the one before, [32 rows][32 tokens], or [32][16]
    };

    // Tokens as [tiles / 2][units][steps][2][16][16 tokens][2 columns]; the last pair of tiles may be one tile.
    int64_t place(int64_t tile, int64_t unit, int64_t tiles) const {
        const int64_t in_pair = tiles - tile / 2 * 2 < 2 ? 1 : 2;
        return (tile / 2 * 2 * units_ + unit * in_pair) * kSteps * kTileBytes + tile % 2 * kTileBytes;
    }

    // Lane l of a row of decoded codes holds column 4 l + j in step j: lanes of two columns are those 4 apart.
    void pack(const bf16* x, int64_t tokens, int64_t tile, uint8_t* packed) const {
        const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
        const int64_t tiles = (tokens + 15) / 16, step_bytes = tiles - tile / 2 * 2 < 2 ? kTileBytes : 2 * kTileBytes;
        const int64_t here = tokens - tile * 16 < 16 ? tokens - tile * 16 : 16;
        for (int64_t unit = 0; unit < units_; ++unit)
            for (int64_t quarter = 0; quarter < 4; ++quarter) {
                const bf16* from = x + tile * 16 * w_.k + unit * kUnit + quarter * 32;
                __m512i row[16];
                for (int64_t i = 0; i < 16; ++i)
                    row[i] = i < here ? _mm512_shuffle_epi8(_mm512_loadu_si512(from + i * w_.k), pairs) : _mm512_setzero_si512();
                transpose(row);
                uint8_t* to = packed + place(tile, unit, tiles) + quarter * 4 * 64;
                for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i % 4 * step_bytes + i / 4 * 64, row[i]);
            }
    }

    // Sums of a product, which are to be scaled and added to totals.
    struct Pending {
        float* totals;  // null: there is nothing
        const float *sums, *scale;
        bool pair, first;
    };

    // What is done in between the steps of a product, a piece at each: the sums of the last product but one are scaled (those
    // of the last one are on their way from the tiles to memory), and the next unit is decoded. (Members are read once: the
    // compiler must assume that a store changes them.)
    struct Side {
        // The next unit: of its row r codes, scale and zero point, and where they go, `to` + 64 r and `scales` + r.
        const uint8_t *from = nullptr, *zero = nullptr;
        const float* scale = nullptr;
        int64_t row_bytes, groups, next_zero, ahead = 0;  // bytes from codes to those that are asked for
        const uint16_t (*values)[32];                      // of codes 0 to 15 less each zero point
        uint8_t* to = nullptr;
        float* scales = nullptr;
        int64_t row = 0, rows = 0, at_once = 0;
        Pending pending[2] = {};
        int64_t part = 0;

        void step() {
            if (pending[0].totals) rescale(part++ * 8);
            decode(at_once);
        }
        void push(const Pending& product) {
            pending[0] = pending[1];
            pending[1] = product;
            part = 0;
        }
        void finish_scaling() {
            for (int i = 0; i < 2; ++i, push({}))
                while (pending[0].totals && part < kSteps) rescale(part++ * 8);
        }

        void decode(int64_t count) {
            const int64_t end = row + count < rows ? row + count : rows, next = row_bytes, apart = groups, zero_apart = next_zero;
            const uint8_t *code = from + row * next, *level = zero + row * zero_apart;
            const float* factors = scale + row * apart;
            const uint16_t(*table)[32] = values;
            float* put = scales + row;
            uint8_t *place = to + row * 64, *stop = to + end * 64;
            const int64_t later = ahead;
            row = end;
            for (; place < stop; place += 64, code += next, level += zero_apart, factors += apart) {
                _mm_prefetch(reinterpret_cast<const char*>(code + later), _MM_HINT_T1);
                const __m512i value = _mm512_load_si512(table[*level]);
                __m512i bytes = _mm512_loadu_si512(code);
#pragma GCC unroll 4
                for (int j = 0; j < kSteps; ++j) {  // (of each lane five bits count)
                    _mm512_store_si512(place + j * 2 * kTileBytes, _mm512_permutexvar_epi16(bytes, value));
                    bytes = _mm512_srli_epi16(bytes, 4);
                }
                *put++ = *factors;
            }
        }

      private:
        // Of rows r to r + 8.
        void rescale(int64_t r) {
            if (pending[0].pair)
                pending[0].first ? rescale<true, 32>(r) : rescale<false, 32>(r);
            else
                pending[0].first ? rescale<true, 16>(r) : rescale<false, 16>(r);
        }

        template <bool First, int64_t Apart>
        void rescale(int64_t r) {
            const float *from = pending[0].sums + r * Apart, *by = pending[0].scale + r;
            float* total = pending[0].totals + r * Apart;
#pragma GCC unroll 8
            for (int64_t i = 0; i < 8; ++i)
#pragma GCC unroll 2
                for (int64_t j = i * Apart; j < (i + 1) * Apart; j += 16)
                    store(total + j, First ? load(from + j) * splat(by[i]) : fma(load(from + j), splat(by[i]), load(total + j)));
        }
    };

    Side side_of() const {
        static const Tables tables;
        static const uint8_t none = 8;
        Side side;
        side.row_bytes = w_.row_bytes();
        side.groups = w_.groups;
        side.values = tables.values;
        side.next_zero = w_.zero ? w_.groups : 0;
        side.zero = &none;
        return side;
    }

    // Has a unit of rows o to o + 32, as far as `end`, or past the last one the first of the next 32, decoded, so many rows at
    // once.
    void next_unit(Side& side, Scratch& scratch, int64_t turn, int64_t o, int64_t end, int64_t unit, int64_t at_once) const {
        const int64_t later = unit + kAhead, later_row = o + later / units_ * 32;
        if (unit == units_) {
            unit = 0;
            o += 32;
        }
        const int64_t at = o * w_.groups + unit / units_per_group_;
        side.from = w_.row(o) + unit * 64;
        side.scale = w_.scale + at;
        if (w_.zero) side.zero = w_.zero + at;
        side.ahead = later_row < end ? w_.row(later_row) + later % units_ * 64 - side.from : 0;
        side.to = scratch.codes[turn % 2];
        side.scales = scratch.scale[turn % 4];
        side.rows = end - o >= 32 ? 32 : end > o ? end - o : 0;
        side.row = 0;
        side.at_once = at_once;
    }

    // totals [tiles / 2][32][32], the last one [32][16] where tiles are odd, of rows o to o + 32 of the weight; of which the
    // first unit, the `turn`-th of all, is decoded in scratch already, as that of the next 32 is afterwards.
    void multiply_units(Side& side, int64_t tokens, const uint8_t* packed, int64_t o, int64_t end, Scratch& scratch, int64_t& turn,
                        float* totals) const {
        const int64_t tiles = (tokens + 15) / 16, steps = kSteps * ((tiles + 1) / 2);
        float *sums = scratch.sums[0], *other = scratch.sums[1];
        for (int64_t unit = 0; unit < units_; ++unit, ++turn) {
            next_unit(side, scratch, turn + 1, o, end, unit + 1, (32 + steps - 1) / steps);
            for (int64_t tile = 0; tile < tiles; tile += 2) {
                const bool pair = tile + 1 < tiles;
                const uint8_t *a = scratch.codes[turn % 2], *b = packed + place(tile, unit, tiles);
                if (pair)
                    tile_product<Bf16Form, 2>(a, b, reinterpret_cast<int32_t*>(sums), 32, kSteps, true, side, {});
                else
                    tile_product<Bf16Form, 1>(a, b, reinterpret_cast<int32_t*>(sums), 16, kSteps, true, side, {});
                side.push({totals + tile * 512, sums, scratch.scale[turn % 4], pair, unit == 0});
                float* last = sums;
                sums = other;
                other = last;
            }
        }
        side.finish_scaling();
    }

    // y [tokens, n] from the totals of rows o to o + 32 as far as `end`.
    void finish(int64_t tokens, const float* bias, bf16* y, int64_t o, int64_t end, const float* totals) const {
        const int64_t tiles = (tokens + 15) / 16;
        const auto value = [&](int64_t r, int64_t t) {
            const int64_t tile = t / 16, apart = tiles - tile / 2 * 2 < 2 ? 16 : 32;
            return load(totals + tile / 2 * 1024 + r * apart + tile % 2 * 16);
        };
        finish_rows(w_, tokens, true, true, nullptr, bias, y, o, end, nullptr, value, Bf16Form::put<bf16>);
    }

    const Packed& w_;
    int64_t units_, units_per_group_;
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
