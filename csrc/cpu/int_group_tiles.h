// Product with 4-bit codes in groups of whole 64 bytes by tiles: of tokens in bf16, or as bytes of fixed point.
//
// A unit (int_units.h) is 128 columns of 32 rows of the weight. It is decoded into the first-level cache, 12 instructions a
// row (7 for bytes), and meets 32 rows of activations at a time in 16 tile instructions (8), whose sums are scaled and added
// to totals in fp32. Floor: 16 cycles for each of n * k * m / 8192 tile instructions (3 n * k * m / 16384); the next unit is
// decoded and sums are scaled in between. Measured, 4096x4096, 256 tokens in bf16, 2 shared cores: 7.1 to 14 ms, floor 1.9
// where an instruction takes 7.2 ns and 4.5 where it takes 17; F.linear in bf16, which has the same floor, 5.7 to 14.
#pragma once

#include "cpu/int_units.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AMX_BF16__)

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
        const PerThread<Scratch> scratch(threads, 1);
        const PerThread<float> totals(threads, total_count);
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
                Scratch& work = *scratch.of(thread);
                float* sums = totals.of(thread);
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
