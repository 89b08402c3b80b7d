// Product with 4-bit codes in groups of whole 64 bytes by tiles: of tokens in bf16, or as bytes of fixed point.
//
// A unit is 128 columns of 32 rows of the weight. It is decoded into the first-level cache, 12 instructions a row (7 for
// bytes), and meets 32 rows of activations at a time in 16 tile instructions (8), whose sums are scaled and added to totals
// in fp32. Floor: 16 cycles for each of n * k * m / 8192 tile instructions (3 n * k * m / 16384); the next unit is decoded
// and sums are scaled in between.
#pragma once

#include "cpu/int_tile_products.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AMX_BF16__)

// Where rows of activations of a unit lie, [tiles / 2][units][steps][2][16][16 rows][4 bytes], and totals of 32 rows of the
// weight, [tiles / 2][32][2][16]. The last pair of tiles may be one tile.
struct UnitPlaces {
    int64_t units, steps, tiles;

    int64_t in_pair(int64_t tile) const { return tiles - tile / 2 * 2 < 2 ? 1 : 2; }
    int64_t of(int64_t tile, int64_t unit) const {
        return (tile / 2 * 2 * units + unit * in_pair(tile)) * steps * kTileBytes + tile % 2 * kTileBytes;
    }
    // Where in totals activations from i on lie, as far as their pair of tiles goes.
    int64_t of_total(int64_t row, int64_t i) const { return i / 32 * 1024 + row * in_pair(i / 16) * 16 + i % 32; }
};

// Tokens in bf16. A step of a unit is 32 of every 4th column.
class Bf16Units {
  public:
    static constexpr bool kBytes = false, kSigned = true;
    static constexpr int64_t kSteps = 4, kParts = 1, kFewest = 4;  // fewer tokens are faster by int_grouped_rows.h

    Bf16Units(const Packed& w, const Segments&, int64_t) : k_(w.k) {}
    explicit operator bool() const { return true; }
    static bool serves(const Packed&) { return true; }

    bool take(const bf16* x, int64_t tokens) {
        x_ = x;
        tokens_ = tokens;
        return Bf16Form::holds(x, tokens, k_);
    }
    int64_t rows() const { return tokens_; }

    // Lane l of a row of decoded codes holds column 4 l + j in step j: lanes of two columns are those 4 apart.
    void pack(const UnitPlaces& places, int64_t tile, int64_t unit, uint8_t* packed) const {
        const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
        const int64_t here = tokens_ - tile * 16 < 16 ? tokens_ - tile * 16 : 16, step_bytes = places.in_pair(tile) * kTileBytes;
        for (int64_t quarter = 0; quarter < 4; ++quarter) {
            const bf16* from = x_ + tile * 16 * k_ + unit * 128 + quarter * 32;
            __m512i row[16];
            for (int64_t i = 0; i < 16; ++i)
                row[i] = i < here ? _mm512_shuffle_epi8(_mm512_loadu_si512(from + i * k_), pairs) : _mm512_setzero_si512();
            transpose(row);
            uint8_t* to = packed + places.of(tile, unit) + quarter * 4 * 64;
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i % 4 * step_bytes + i / 4 * 64, row[i]);
        }
    }

    class Decoder {
      public:
        // to [steps][2 KiB apart][64] <- 128 codes less their zero point. (Of each lane five bits count.)
        void decode(__m512i bytes, uint8_t zero, uint8_t* to) const {
            const __m512i values = _mm512_load_si512(values_[zero]);
#pragma GCC unroll 4
            for (int j = 0; j < kSteps; ++j) {
                _mm512_store_si512(to + j * 2 * kTileBytes, _mm512_permutexvar_epi16(bytes, values));
                bytes = _mm512_srli_epi16(bytes, 4);
            }
        }

      private:
        const uint16_t (*values_)[32] = tables().values;
    };

    static Vec sum_of(const float* sums) { return load(sums); }

    // The sums of tokens t to t + 16, t a multiple of 16, with row r of the weight.
    Vec result(const float* totals, const UnitPlaces& places, int64_t r, int64_t t) const {
        return load(totals + places.of_total(r, t));
    }

    static void put(bf16* to, Vec low, Vec high) { Bf16Form::put(to, low, high); }

  private:
    // Codes 0 to 15 less each zero point (those of 16 and more are allowed, and exact in bf16), twice over.
    struct Tables {
        alignas(64) uint16_t values[256][32];

        Tables() {
            for (int zero = 0; zero < 256; ++zero) _mm512_store_si512(values[zero], Bf16Form::values_of(zero));
        }
    };
    static const Tables& tables() {
        static const Tables all;
        return all;
    }

    int64_t k_, tokens_ = 0;
    const bf16* x_ = nullptr;
};

// Tokens in three bytes of fixed point (int_activations.h), each a row of activations, the first bytes of all tokens first.
// A step of a unit is 64 of every second column.
class ByteUnits {
  public:
    static constexpr bool kBytes = true, kSigned = true;
    static constexpr int64_t kSteps = 2, kParts = 3, kFewest = 3;

    ByteUnits(const Packed& w, const Segments& segments, int64_t capacity) : x_(w, segments, {3, nullptr, nullptr}, capacity) {}
    explicit operator bool() const { return static_cast<bool>(x_); }
    static bool serves(const Packed& w) { return w.zeros_are_codes(); }

    template <typename T>
    bool take(const T* x, int64_t tokens) {
        return x_.quantize(x, tokens);
    }
    int64_t rows() const { return x_.tokens() * kParts; }

    void pack(const UnitPlaces& places, int64_t tile, int64_t unit, uint8_t* packed) const {
        const int64_t here = rows() - tile * 16 < 16 ? rows() - tile * 16 : 16, step_bytes = places.in_pair(tile) * kTileBytes;
        for (int64_t j = 0; j < kSteps; ++j) {
            __m512i row[16];
            for (int64_t i = 0; i < 16; ++i)
                row[i] = i < here ? _mm512_load_si512(x_.row(tile * 16 + i) + (unit * kSteps + j) * 64) : _mm512_setzero_si512();
            transpose(row);
            uint8_t* to = packed + places.of(tile, unit) + j * step_bytes;
            for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, row[i]);
        }
    }

    struct Decoder {
        void decode(__m512i bytes, uint8_t zero, uint8_t* to) const {
            const __m512i nibble = _mm512_set1_epi8(15), level = _mm512_set1_epi8(static_cast<char>(zero));
            _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(bytes, nibble), level));
            bytes = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
            _mm512_store_si512(to + 2 * kTileBytes, _mm512_sub_epi8(bytes, level));
        }
    };

    static Vec sum_of(const float* sums) { return to_vec(_mm512_loadu_si512(sums)); }

    Vec result(const float* totals, const UnitPlaces& places, int64_t r, int64_t t) const {
        const Vec unit = load(x_.scale() + t);
        const auto part = [&](int64_t byte) {  // 16 of its rows, which may lie in two pairs of tiles
            const int64_t i = byte * x_.tokens() + t, here = 32 - i % 32;
            const Vec sums = load(totals + places.of_total(r, i));
            if (here >= 16 || i + here >= places.tiles * 16) return sums;
            const Vec others = load(totals + places.of_total(r, i + here) - here);
            return Vec{_mm512_mask_blend_ps(first_lanes(static_cast<int>(here)), others.v, sums.v)};
        };
        const Vec second = fma(part(1), splat(256.0f) * unit, part(2) * unit);
        return fma(part(0), splat(65536.0f) * unit, second);
    }

    template <typename T>
    static void put(T* to, Vec low, Vec high) {
        store(to, low);
        store(to + 16, high);
    }

  private:
    Activations x_;
};

// Form: Bf16Units or ByteUnits.
template <typename Form>
class GroupedTileProduct {
  public:
    GroupedTileProduct(const Packed& w, const Segments& segments)
        : w_(w), segments_(segments), units_(w.k / kUnit), units_per_group_(w.group_size() / kUnit) {}

    static bool serves(const Packed& w, int64_t tokens) {
        return w.bits == 4 && w.k > 0 && w.group_size() % kUnit == 0 && tokens >= Form::kFewest && Form::serves(w);
    }

    // False in `representable` where the form cannot hold x; y [m, n] is then not whole.
    template <typename T>
    int multiply(const T* x, const float* bias, T* y, int64_t m, bool& representable) const {
        const int64_t row_bytes = kSteps * 64 * units_;  // of activations
        const int64_t fit = kCache / row_bytes < kMostRows ? kCache / row_bytes : kMostRows;
        const int64_t most = fit / Form::kParts > 16 ? fit / Form::kParts / 16 * 16 : 16, blocks = (m + most - 1) / most;
        const int64_t block = (m + blocks * 16 - 1) / (blocks * 16) * 16;  // tokens
        const int64_t packed_bytes = block * Form::kParts * row_bytes, total_count = 32 * block * Form::kParts + 16;
        const int threads = max_threads();
        const bool own = threads <= kOwnThreads;
        Form form(w_, segments_, block);
        const Buffer<uint8_t> packed((own ? threads : 1) * packed_bytes);
        const Buffer<Scratch> scratch(threads);
        const Buffer<float> totals(threads * total_count);
        if (!form || !packed || !scratch || !totals) return QNK_NO_MEMORY;
        for (int64_t first = 0; first < m; first += block) {
            const int64_t tokens = m - first < block ? m - first : block;
            representable = form.take(x + first * w_.k, tokens);
            if (!representable) return QNK_OK;
            const UnitPlaces places{units_, kSteps, (form.rows() + 15) / 16};
            const auto pack_tiles = [&](int64_t begin, int64_t end, uint8_t* to) {
                for (int64_t tile = begin; tile < end; ++tile)
                    for (int64_t unit = 0; unit < units_; ++unit) form.pack(places, tile, unit, to);
            };
            if (!own)
                parallel_for(places.tiles, 1 + 2048 / w_.k,
                             [&](int64_t begin, int64_t end) { pack_tiles(begin, end, packed.get()); });
            parallel_for(w_.n, 32, [&](int64_t begin, int64_t end, int thread) {
                const Tiles scope;
                uint8_t* tiles = packed.get() + (own ? thread * packed_bytes : 0);
                if (own) pack_tiles(0, places.tiles, tiles);
                Scratch& work = scratch.get()[thread];
                float* sums = totals.get() + thread * total_count;
                Side side = side_of();
                side.y_apart = w_.n * static_cast<int64_t>(sizeof(T));
                side.lines_at_once = 1 + tokens / (kSteps * (places.tiles + 1) / 2 * units_);
                int64_t turn = 0;
                next_unit(side, work, turn, begin, end, 0, 0);
                side.decode(32);
                __asm__ volatile("" ::: "memory");  // (the compiler is not told that tiles are loaded from memory)
                for (int64_t o = begin; o < end; o += 32) {
                    side.y = reinterpret_cast<const uint8_t*>(y + first * w_.n + o);
                    side.lines = tokens;
                    multiply_units(side, places, tiles, o, end, work, turn, sums);
                    const auto value = [&](int64_t r, int64_t t) { return form.result(sums, places, r, t); };
                    const auto put = [](T* to, Vec low, Vec high) { Form::put(to, low, high); };
                    finish_rows(w_, tokens, true, true, nullptr, bias, y + first * w_.n, o, end, nullptr, value, put);
                }
            });
        }
        return QNK_OK;
    }

  private:
    static constexpr int64_t kSteps = Form::kSteps;  // of a tile instruction in a unit
    static constexpr int64_t kUnit = 128;            // columns, 64 bytes of codes
    static constexpr int64_t kUnitBytes = kSteps * 2 * kTileBytes;  // of 32 rows, decoded
    static constexpr int64_t kAhead = 4;           // units that are asked for before
    static constexpr int64_t kMostRows = 256;      // of activations in a block
    static constexpr int64_t kCache = 1 << 20;     // bytes of them

    struct alignas(64) Scratch {
        uint8_t codes[2][kUnitBytes];  // of a unit and the next one, [steps][32 rows][64]
        float scale[4][32];            // of those and the two before
        float sums[2][32 * 32];        // of a product and the one before, [32 rows][32 of activations], or [32][16]
    };

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
        uint8_t* to = nullptr;
        float* scales = nullptr;
        int64_t row = 0, rows = 0, at_once = 0;
        // Lines of y that these rows will be written to, of `lines` tokens.
        const uint8_t* y = nullptr;
        int64_t y_apart = 0, lines = 0, lines_at_once = 0;
        typename Form::Decoder decoder;
        Pending pending[2] = {};
        int64_t part = 0;

        void step() {
            if (pending[0].totals) rescale(part++ * kRows);
            decode(at_once);
            ask_for_y();
        }
        void push(const Pending& product) {
            pending[0] = pending[1];
            pending[1] = product;
            part = 0;
        }
        void finish_scaling() {
            for (int i = 0; i < 2; ++i, push({}))
                while (pending[0].totals && part < kSteps) rescale(part++ * kRows);
        }

        void decode(int64_t count) {
            const int64_t end = row + count < rows ? row + count : rows, next = row_bytes, apart = groups, zero_apart = next_zero;
            const uint8_t *code = from + row * next, *level = zero + row * zero_apart;
            const float* factors = scale + row * apart;
            float* put = scales + row;
            uint8_t *place = to + row * 64, *stop = to + end * 64;
            const int64_t later = ahead;
            const typename Form::Decoder form = decoder;
            row = end;
            for (; place < stop; place += 64, code += next, level += zero_apart, factors += apart) {
                _mm_prefetch(reinterpret_cast<const char*>(code + later), _MM_HINT_T1);
                form.decode(_mm512_loadu_si512(code), *level, place);
                *put++ = *factors;
            }
        }

      private:
        static constexpr int64_t kRows = 32 / kSteps;  // scaled in a step

        void ask_for_y() {
            for (int64_t i = 0; i < lines_at_once && lines; ++i, --lines, y += y_apart) __builtin_prefetch(y, 1, 3);
        }

        // Of rows r to r + kRows.
        void rescale(int64_t r) {
            if (pending[0].pair)
                pending[0].first ? rescale<true, 32>(r) : rescale<false, 32>(r);
            else
                pending[0].first ? rescale<true, 16>(r) : rescale<false, 16>(r);
        }

        template <bool First, int64_t Width>
        void rescale(int64_t r) {
            const float *from = pending[0].sums + r * Width, *by = pending[0].scale + r;
            float* total = pending[0].totals + r * Width;
#pragma GCC unroll 16
            for (int64_t i = 0; i < kRows; ++i, from += Width, total += Width)
#pragma GCC unroll 2
                for (int64_t j = 0; j < Width; j += 16) {
                    const Vec sum = Form::sum_of(from + j), scale = splat(by[i]);
                    store(total + j, First ? sum * scale : fma(sum, scale, load(total + j)));
                }
        }
    };

    Side side_of() const {
        static const uint8_t none = 8;
        Side side;
        side.row_bytes = w_.row_bytes();
        side.groups = w_.groups;
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

    // totals of rows o to o + 32 of the weight; of which the first unit, the `turn`-th of all, is decoded in scratch already,
    // as that of the next 32 is afterwards.
    void multiply_units(Side& side, const UnitPlaces& places, const uint8_t* packed, int64_t o, int64_t end, Scratch& scratch,
                        int64_t& turn, float* totals) const {
        const int64_t tiles = places.tiles, steps = kSteps * ((tiles + 1) / 2);
        float *sums = scratch.sums[0], *other = scratch.sums[1];
        for (int64_t unit = 0; unit < units_; ++unit, ++turn) {
            next_unit(side, scratch, turn + 1, o, end, unit + 1, (32 + steps - 1) / steps);
            for (int64_t tile = 0; tile < tiles; tile += 2) {
                const bool pair = tile + 1 < tiles;
                const uint8_t *a = scratch.codes[turn % 2], *b = packed + places.of(tile, unit);
                if (pair)
                    tile_product<Form, 2>(a, b, reinterpret_cast<int32_t*>(sums), 32, kSteps, true, side, {});
                else
                    tile_product<Form, 1>(a, b, reinterpret_cast<int32_t*>(sums), 16, kSteps, true, side, {});
                side.push({totals + tile * 512, sums, scratch.scale[turn % 4], pair, unit == 0});
                float* last = sums;
                sums = other;
                other = last;
            }
        }
        side.finish_scaling();
    }

    const Packed& w_;
    const Segments& segments_;
    int64_t units_, units_per_group_;
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
