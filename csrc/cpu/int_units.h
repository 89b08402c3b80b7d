// Units of the product of int_group_tiles.h, 128 columns in 4-bit codes by tiles: the two forms that codes and tokens take.
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
            _mm512_store_si512(to + 2 * kTileBytes, _mm512_sub_epi8(upper_nibbles(bytes), level));
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

#endif

}  // namespace QNK_ISA
}  // namespace qnk
