// AMX tiles as the kernels use them, eight of 16 rows of 64 bytes, and a transposition of as much.
#pragma once

#include <stdint.h>

#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512F__)
// Transposes 16 rows of 16 values of 32 bits.
__attribute__((always_inline)) inline void transpose(__m512i* row) {
    __m512i pair[16];
    for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    // row[4 i + j], lane l <- column 4 l + j of rows 4 i to 4 i + 3
    for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i even_low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
        row[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        row[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        row[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        row[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}
#endif

#if defined(__AMX_TILE__)
constexpr bool kHasTiles = true;

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// While it lives, this thread's tiles have their shape.
class Tiles {
  public:
    Tiles() {
        // (static: the compiler is told of the first bytes only, and might write others of a local after they are read)
        static const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
};
#else
constexpr bool kHasTiles = false;

class Tiles {
  public:
    Tiles() {}
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() {}
};
#endif

}  // namespace QNK_ISA
}  // namespace qnk
