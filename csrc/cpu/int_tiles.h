// Product with packed integer weights in tiles of 16 rows of the weight by 16 rows of activations.
//
// Floor, with AMX, per 16384 products of bytes or 8192 of bf16: one tile instruction (4.7 ns on Sapphire Rapids; 5.7 in a
// loop that reads one operand from the first-level cache and the other from the second). A chunk of 32 rows of the
// weight is unpacked into the first-level cache and meets all tokens of a block there, while the next chunk is unpacked
// and the one after it prefetched; activations and sums stay in the second-level cache. For few tokens tiles of 8-bit
// codes are read where they lie, which is as fast as memory.
#pragma once

#include "cpu/int_tile_products.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)

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
        chunk_ = segments_.count() == 1 && width_ <= kWholeRow * 64 ? kWholeRow : kSteps;
        Form form(w_, segments_, how_, block);
        const int threads = max_threads();
        const bool own = threads <= kOwnThreads;
        const int64_t packed_bytes = tiles * 16 * width_;
        const Buffer<uint8_t> packed((own ? threads : 1) * packed_bytes);
        const PerThread<uint8_t> codes(threads, 2 * kChunkBytes);
        const PerThread<int32_t> sums(threads, 32 * apart_);
        const PerThread<float> totals(threads, segments_.count() > 1 ? 32 * block : 0);
        if (!form || !packed || !codes || !sums || !totals) return QNK_NO_MEMORY;
        for (int64_t first = 0; first < m; first += block) {
            const int64_t tokens = m - first < block ? m - first : block;
            representable = form.take(x + first * w_.k, tokens);
            if (!representable) return QNK_OK;
            const int64_t rows = tokens * parts + (direct_ ? ones() : 0);
            const auto pack_tiles = [&](int64_t begin, int64_t end, uint8_t* to) {
                for (int64_t tile = begin; tile < end; ++tile) pack(form, rows, tile, to);
            };
            if (!own)
                parallel_for((rows + 15) / 16, 65536 / width_ / 16 + 1,
                             [&](int64_t begin, int64_t end) { pack_tiles(begin, end, packed.get()); });
            parallel_for(w_.n, 32, [&](int64_t begin, int64_t end, int thread) {
                const Tiles scope;
                const Sums work{sums.of(thread), totals.of(thread), nullptr};
                T* to = y + first * w_.n;
                uint8_t* x_tiles = packed.get() + (own ? thread * packed_bytes : 0);
                if (own) pack_tiles(0, (rows + 15) / 16, x_tiles);
                int64_t o = begin;
                for (; direct_ && o + 32 <= end; o += 32) multiply_direct(form, rows, x_tiles, bias, to, o, work);
                if (o == end) return;
                uint8_t* unpacked = codes.of(thread);
                if (w_.bits == 8)
                    multiply_chunks<8>(form, rows, x_tiles, bias, to, o, end, unpacked, work);
                else
                    multiply_chunks<4>(form, rows, x_tiles, bias, to, o, end, unpacked, work);
            });
        }
        return QNK_OK;
    }

  private:
    static constexpr int64_t kSteps = kHasTiles ? 8 : 16;  // of a chunk
    static constexpr int64_t kWholeRow = 24;     // steps of a row that is one chunk: its sums need not be stored in between
    static constexpr int64_t kMostRows = 256;    // of activations in a block
    static constexpr int64_t kCache = kHasTiles ? 1 << 20 : 1 << 21;  // bytes of them
    static constexpr int64_t kDirectRows = 48;   // three tiles
    static constexpr int64_t kChunkBytes = kWholeRow * 2 * kTileBytes;
    static constexpr int64_t kMostSegments = 4;  // of a chunk
    // Of two scales of a row, for sums to be multiplied by the quotient: three of them leave sums of 256 columns below 2^127.
    static constexpr float kMostFactor = 8.0f;

    // A row of ones gives the sums of the weight's codes, where activations have zero points.
    int64_t ones() const { return Form::kBytes && how_.bytes == 1 ? 1 : 0; }

    // Where in packed rows [steps / run][tiles / 2][run][2][16][16 rows][4 bytes] those of a step of a segment lie: what is
    // multiplied in a row lies in a row. A run is a chunk; where the weight is not unpacked, it is the row. The last pair
    // of tiles may be one tile.
    int64_t place(const Form& form, const Segment& s, int64_t step, int64_t pair, int64_t tiles) const {
        const int64_t all = form.steps(s), run = direct_ ? all : chunk_, begin = step / run * run;
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

    // What is unpacked at once of 32 rows of the weight, from o on: steps [step, step + steps) of segment i, or several whole
    // segments where they are short.
    struct Chunk {
        int64_t o, i = 0, step = 0, steps = 0, segments = 1;
        int turn = 0;  // which changes with the segment
    };

    void measure(const Form& form, Chunk& chunk) const {
        const int64_t all = form.steps(segments_[chunk.i]), rest = all - chunk.step;
        chunk.steps = rest < chunk_ ? rest : chunk_;
        chunk.segments = 1;
        if (chunk.step || all * 2 > chunk_) return;
        for (int64_t next = chunk.i + 1; next < segments_.count(); ++next, ++chunk.segments) {
            const int64_t more = form.steps(segments_[next]);
            if (chunk.steps + more > chunk_ || chunk.segments == kMostSegments) break;
            chunk.steps += more;
        }
    }

    // The next one; false past the last row.
    bool advance(const Form& form, int64_t end, Chunk& chunk) const {
        chunk.step += chunk.steps;
        if (chunk.segments > 1 || chunk.step == form.steps(segments_[chunk.i])) {
            chunk.step = 0;
            chunk.turn ^= 1;
            chunk.i += chunk.segments;
            if (chunk.i == segments_.count()) {
                chunk.i = 0;
                chunk.o += 32;
            }
        }
        measure(form, chunk);
        return chunk.o < end;
    }

    // Unpacks a chunk row by row, as many rows in a step as it takes to be done after `slots` steps, and prefetches the
    // rows of a later one (without tile instructions: lets products do so, between which more fit).
    template <int Bits>
    struct Feed {
        const IntTileProduct& product;
        const Form& form;
        const Chunk *chunk, *later;  // null: there is none
        int64_t end;
        uint8_t* codes;
        int32_t (*code_sums)[kMostSegments][32];  // of both turns
        int64_t slots, due = 0, row = 0;
        int64_t line = -1;  // of the later chunk, for products to ask for; -1: that is done

        // Lines of the later chunk that are asked for while `step` of a product is multiplied.
        Ahead ahead() const {
            const int shift = Form::line_shift(Bits);
            if (!later || line < 0) return {codes, 0, shift};
            return {first_of(0) + (line >> shift) * 64, product.w_.row_bytes(), shift};
        }
        void step() {
            for (due += 32; due >= slots; due -= slots) next();
        }
        void finish() {
            while (row < 32) next();
        }

      private:
        void next() {
            const int64_t r = row++;
            if (r >= 32 || !chunk || chunk->o + r >= end) return;
            uint8_t* to = codes + r / 16 * kTileBytes + r % 16 * 64;
            for (int64_t k = 0; k < chunk->segments; ++k) {
                const Segment& s = product.segments_[chunk->i + k];
                const int64_t steps = chunk->segments > 1 ? form.steps(s) : chunk->steps;
                form.template unpack<Bits>(s, chunk->o + r, chunk->step, steps, to, code_sums[chunk->turn][k][r]);
                to += steps * 2 * kTileBytes;
            }
            if (!kHasTiles || !later || later->o + r >= end) return;
            const int shift = Form::line_shift(Bits);
            const uint8_t* from = first_of(r);
            for (int64_t line = 0; line <= (later->steps - 1) >> shift; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(from + line * 64), _MM_HINT_T1);
        }

        const uint8_t* first_of(int64_t r) const {
            return product.w_.row(later->o + r) + product.segments_[later->i].column * Bits / 8 +
                   (later->step >> Form::line_shift(Bits)) * 64;
        }
    };

    // y [tokens, n], rows begin to end of the weight. unpacked: two chunks.
    template <int Bits, typename T>
    void multiply_chunks(const Form& form, int64_t rows, const uint8_t* packed, const float* bias, T* y, int64_t begin,
                         int64_t end, uint8_t* unpacked, Sums work) const {
        alignas(64) int32_t code_sums[2][kMostSegments][32] = {};
        alignas(64) float factors[kMostSegments * 32];
        const int64_t tiles = (rows + 15) / 16;
        Chunk now{begin};
        measure(form, now);
        Chunk next = now;
        bool more = advance(form, end, next);
        Feed<Bits>{*this, form, &now, more ? &next : nullptr, end, unpacked, code_sums, 1}.finish();
        for (int64_t parity = 0;; parity ^= kChunkBytes) {
            Chunk later = next;
            const bool further = more && advance(form, end, later);
            const int64_t slots = (tiles + 1) / 2 * now.steps;
            Feed<Bits> feed{*this, form, more ? &next : nullptr, further ? &later : nullptr, end,
                            unpacked + (parity ^ kChunkBytes), code_sums, slots};
            const uint8_t* codes = unpacked + parity;
            int64_t done = 0;
            for (int64_t k = 0, together; k < now.segments; k += together) {
                const Segment& s = segments_[now.i + k];
                const int64_t steps = now.segments > 1 ? form.steps(s) : now.steps;
                const Scaling scaling = scaling_of(form, now.o, now.i + k, now.segments - k, end, tiles, factors);
                together = scaling.factors ? scaling.segments : 1;
                const int64_t apart = scaling.factors ? tiles * 16 : apart_;
                for (int64_t pair = 0; pair * 2 < tiles; ++pair) {
                    const uint8_t* b = packed + place(form, s, now.step, pair, tiles);
                    int32_t* c = (scaling.factors ? reinterpret_cast<int32_t*>(work.totals) : work.products) + pair * 32;
                    feed.line = pair == 0 ? done : -1;
                    if (tiles - 2 * pair > 1)
                        tile_product<Form, 2>(codes, b, c, apart, steps, now.step == 0, feed, scaling);
                    else
                        tile_product<Form, 1>(codes, b, c, apart, steps, now.step == 0, feed, scaling);
                }
                codes += together * steps * 2 * kTileBytes;
                done += together * steps;
                if (scaling.factors) {
                    if constexpr (!Form::kBytes)
                        if (now.i + k + together == segments_.count()) form.finish_totals(bias, y, now.o, end, work);
                } else if (now.step + steps == form.steps(s)) {
                    work.of_codes = code_sums[now.turn][k];
                    form.finish(now.i + k, bias, y, now.o, end, apart_, work);
                }
            }
            feed.finish();
            if (!more) return;
            now = next;
            next = later;
            more = further;
        }
    }

    // How sums of rows from o on are scaled at once, where a row has several segments and each is within a chunk: those of
    // segment i, and, as far as scales do not differ too much, of those after it, up to `most`. factors: [most][32].
    Scaling scaling_of(const Form& form, int64_t o, int64_t i, int64_t most, int64_t end, int64_t tiles, float* factors) const {
        if (Form::kBytes || !kScales || segments_.count() == 1 || form.steps(segments_[i]) > chunk_) return {};
        const int64_t rows = end - o < 32 ? end - o : 32, steps = form.steps(segments_[i]);
        const auto scale = [&](int64_t r, int64_t k) { return w_.scale[(o + r) * w_.groups + segments_[i + k].group]; };
        int64_t count = 1;
        for (; count < most && form.steps(segments_[i + count]) == steps; ++count) {
            float* to = factors + (count - 1) * 32;
            bool near = true;
            for (int64_t r = 0; r < rows; ++r) {
                to[r] = scale(r, count - 1) / scale(r, count);
                near &= to[r] >= 1.0f / kMostFactor && to[r] <= kMostFactor;
            }
            if (!near) break;
        }
        for (int64_t r = 0; r < rows; ++r) factors[(count - 1) * 32 + r] = scale(r, count - 1);
        for (int64_t k = 0; k < count; ++k)
            for (int64_t r = rows; r < 32; ++r) factors[k * 32 + r] = 0.0f;
        return {factors, count, end - o, steps * tiles * kTileBytes, i == 0};
    }

    // y of 32 rows of 8-bit codes from o on, in one segment.
    template <typename T>
    void multiply_direct(const Form& form, int64_t rows, const uint8_t* packed, const float* bias, T* y, int64_t o,
                         Sums work) const {
        const int64_t steps = width_ / 64;
        const uint8_t *a = w_.row(o), *third = packed + 2 * steps * kTileBytes;
        if (rows <= 16)
            direct_product<1>(a, w_.row_bytes(), packed, third, work.products, apart_, steps);
        else if (rows <= 32)
            direct_product<2>(a, w_.row_bytes(), packed, third, work.products, apart_, steps);
        else
            direct_product<3>(a, w_.row_bytes(), packed, third, work.products, apart_, steps);
        int32_t code_sums[32];
        if (ones())
            for (int r = 0; r < 32; ++r) code_sums[r] = work.products[r * apart_ + form.tokens()];
        work.of_codes = code_sums;
        form.finish(0, bias, y, o, o + 32, apart_, work);
    }

    const Packed& w_;
    const Segments& segments_;
    Quantization how_;
    int64_t width_, apart_ = 0, chunk_ = kSteps;
    bool direct_ = false;
};

#endif

}  // namespace QNK_ISA
}  // namespace qnk
