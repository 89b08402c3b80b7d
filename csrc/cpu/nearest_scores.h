// The scores that nearest.h orders codewords by: in fp32, or in tiles of bf16 (nearest_pairs.h: in integers).
#pragma once

#include "cpu/nearest.h"

namespace qnk {
inline namespace QNK_ISA {

// least [blocks][points][16] <- least score of each group.
template <int D>
inline void Codebook::scores(const float* shifted, int count, float* least) const {
    constexpr int kTogether = D == 4 ? 4 : D == 8 ? 2 : 1;  // points that share the loads of a codeword
    const int d = D ? D : d_;
    for (int p = 0; p < count; p += kTogether) {
        Vec minus[kTogether][D ? D : kMaxDimension];
        for (int q = 0; q < kTogether; ++q)
            for (int j = 0; j < d; ++j) minus[q][j] = splat(-shifted[(p + q < count ? p + q : p) * d + j]);
        for (int64_t block = 0; block < blocks_; ++block)
            for (int v = 0; v < kRowVecs; ++v) {
                Vec lowest[kTogether];
                for (int q = 0; q < kTogether; ++q) lowest[q] = splat(kInfinity);
                const float* row = rows_ + block * kRow * (1 + d) * kRow + v * kLanes;
                for (int64_t t = 0; t < group_size(block); ++t, row += (1 + d) * kRow) {
                    Vec score[kTogether];
                    for (int q = 0; q < kTogether; ++q) score[q] = load(row);
                    for (int j = 0; j < d; ++j) {
                        const Vec c = load(row + (1 + j) * kRow);
                        for (int q = 0; q < kTogether; ++q) score[q] = fma(minus[q][j], c, score[q]);
                    }
                    for (int q = 0; q < kTogether; ++q) lowest[q] = min(score[q], lowest[q]);
                }
                for (int q = 0; q < kTogether && p + q < count; ++q)
                    store(least + (block * kTilePoints + p + q) * kRow + v * kLanes, lowest[q]);
            }
    }
}

#if defined(__AMX_TILE__)
inline void Codebook::tile_scores(const float* shifted, int count, void* work, float* least) const {
    uint16_t* operand = static_cast<uint16_t*>(work);                                 // [points][steps * 32]
    float* product = reinterpret_cast<float*>(operand + kTilePoints * 32 * steps_);   // [8][32 points][16]
    const int width = 32 * steps_;
    const __m512 scale = _mm512_set1_ps(scale_);
    for (int i = 0; i < kTilePoints * width; i += 32) _mm512_store_si512(operand + i, _mm512_setzero_si512());
    for (int p = 0; p < count; ++p) {
        uint16_t* row = operand + p * width;
        for (int j = 0; j < d_; j += 16) {
            const __mmask16 lanes = first_lanes(d_ - j < 16 ? d_ - j : 16);
            const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, shifted + p * d_ + j), scale);
            const __m256i high = (__m256i)_mm512_cvtneps_pbh(value);
            const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
            const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(value, back));
            _mm256_mask_storeu_epi16(row + j, lanes, high);
            _mm256_mask_storeu_epi16(row + d_ + j, lanes, low);
            _mm256_mask_storeu_epi16(row + 2 * d_ + j, lanes, high);
        }
    }
    constexpr int kProduct = kTilePoints * kRow;  // floats: scores of all points against one row of codewords
    for (int64_t block = 0; block < blocks_; ++block) {
        float* lowest = least + block * kTilePoints * kRow;
        const int tiles = static_cast<int>(group_size(block));
        for (int first = 0; first < tiles; first += 8) {
            const int together = tiles - first < 8 ? tiles - first : 8;
            for (int t = 0; t < together; t += 2) {
                const int64_t row = block * kRow + first + t;
                const uint16_t* codewords = tiles_ + row * steps_ * 512;
                // sums start at the half norms; a tile that was zeroed instead takes three times as long
                _tile_loadd(4, norms_ + row * kRow, 0);
                _tile_loadd(5, norms_ + row * kRow, 0);
                _tile_loadd(6, norms_ + (row + 1) * kRow, 0);
                _tile_loadd(7, norms_ + (row + 1) * kRow, 0);
                for (int step = 0; step < steps_; ++step) {
                    if (steps_ > 1 || row == 0) {  // else they are there already
                        _tile_loadd(0, operand + step * 32, width * 2);
                        _tile_loadd(1, operand + 16 * width + step * 32, width * 2);
                    }
                    _tile_loadd(2, codewords + step * 512, 64);
                    _tile_loadd(3, codewords + (steps_ + step) * 512, 64);
                    _tile_dpbf16ps(4, 0, 2);
                    _tile_dpbf16ps(5, 1, 2);
                    _tile_dpbf16ps(6, 0, 3);
                    _tile_dpbf16ps(7, 1, 3);
                }
                float* to = product + t * kProduct;
                _tile_stored(4, to, 64);
                _tile_stored(5, to + kProduct / 2, 64);
                _tile_stored(6, to + kProduct, 64);
                _tile_stored(7, to + kProduct * 3 / 2, 64);
            }
            for (int p = 0; p < kTilePoints; ++p) {
                __m512 low = first ? _mm512_load_ps(lowest + p * kRow) : _mm512_set1_ps(kInfinity);
                for (int t = 0; t < together; ++t) low = _mm512_min_ps(low, _mm512_load_ps(product + t * kProduct + p * kRow));
                _mm512_store_ps(lowest + p * kRow, low);
            }
        }
    }
}
#else
inline void Codebook::tile_scores(const float*, int, void*, float*) const {}
#endif

// The column of a codeword in the tiles of its row: pairs of values along the dimension that a product sums over.
inline void Codebook::write_tiles(const float* shifted, int64_t row, int lane) const {
    const auto set = [&](int i, bf16 value) {
        tiles_[((row * steps_ + i / 32) * 16 + i % 32 / 2) * 32 + 2 * lane + i % 2] = value.bits;
    };
    for (int j = 0; j < d_; ++j) {
        const float c = -shifted[j] * scale_;
        const bf16 upper = from_float<bf16>(c);
        set(j, upper);
        set(d_ + j, upper);
        set(2 * d_ + j, from_float<bf16>(c - to_float(upper)));
    }
}

}  // namespace QNK_ISA
}  // namespace qnk
