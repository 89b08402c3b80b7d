// The scores that nearest.h orders codewords by: in fp32, in pairs of 16-bit integers, or in tiles of bf16.
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

#if defined(__AVX512VNNI__)
inline void Codebook::prepare_pairs() {
    const int pairs = (d_ + 1) / 2;
    const int64_t rows = (blocks_ - 1) * kRow + last_tiles_;
    float largest = 0.0f;
    for (int64_t row = 0; row < rows; ++row)
        for (int i = kRow; i < (1 + d_) * kRow; ++i) {
            const float magnitude = __builtin_fabsf(rows_[row * (1 + d_) * kRow + i]);
            largest = magnitude > largest ? magnitude : largest;
        }
    const bool usable = largest > 1e-15f && largest < 1e15f;
    const float root = __builtin_sqrtf(static_cast<float>(d_));
    // a product is at most |x| |c| <= root * kPairReach * largest * norm: below 2^30, and half norms are below 2^28
    const float c_bits = 16383.0f / largest, x_bits = 0x1p30f / (root * kPairReach * largest * norm_ * c_bits) * 0.999f;
    const float x_most = 32766.0f / (kPairReach * largest);
    c_unit_ = usable ? c_bits : 0.0f;
    x_unit_ = usable ? (x_bits < x_most ? x_bits : x_most) : 0.0f;
    root_reach_ = root * x_unit_ * norm_ * c_unit_;  // times a coordinate of x: the largest product
    float widest = 0.0f;
    for (int64_t row = 0; row < rows; ++row)
        for (int lane = 0; lane < kRow; ++lane) {
            const float* at = rows_ + row * (1 + d_) * kRow + lane;
            const float norm = at[0] * x_unit_ * c_unit_;
            float sum = 0.0f;
            for (int pair = 0; pair < pairs; ++pair) {
                int32_t values[2] = {};
                for (int i = 0; i < 2 && 2 * pair + i < d_; ++i) {
                    values[i] = static_cast<int32_t>(__builtin_lrintf(-at[(1 + 2 * pair + i) * kRow] * c_unit_));
                    sum += static_cast<float>(values[i] < 0 ? -values[i] : values[i]);
                }
                pairs_[(row * pairs + pair) * kRow + lane] =
                    static_cast<int32_t>((static_cast<uint32_t>(values[1]) << 16) | (static_cast<uint32_t>(values[0]) & 0xffffu));
            }
            // no codeword: above every score, and still no overflow with a product added
            pair_norms_[row * kRow + lane] = norm < 0x1p30f ? static_cast<int32_t>(__builtin_lrintf(norm)) : 0x3fffffff;
            widest = sum > widest ? sum : widest;
        }
    // a coordinate of x is off by at most a half, and so is one of c; twice that, and the rounding of sums to floats
    pair_error_ = widest + static_cast<float>(d_) + 4.0f + 0x1p8f;
}

// False where a point is too far out for the integers; *largest <- the largest magnitude of a shifted coordinate.
inline bool Codebook::pair_scores(const float* points, int count, void* work, float* least, float* largest) const {
    if (x_unit_ == 0.0f) return false;
    const int pairs = (d_ + 1) / 2;
    int16_t* x = static_cast<int16_t*>(work);  // [points][2 * pairs]
    const __m512 unit = _mm512_set1_ps(x_unit_);
    __m512i extreme = _mm512_setzero_si512();  // magnitudes of floats are ordered as their bits
    const auto round = [&](__m512 value, __m512 shift, int16_t* to) {
        const __m512 shifted = _mm512_sub_ps(value, shift);
        extreme = _mm512_max_epu32(extreme, _mm512_and_si512(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x7fffffff)));
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(shifted, unit));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(whole));  // there is room for whole vectors
    };
    if (d_ % 2 == 0) {
        const int total = count * d_;
        for (int i = 0, at = 0; i < total; i += 16) {
            const __m512 shift = _mm512_loadu_ps(shift_ + at);
            if (i + 16 <= total)
                round(_mm512_loadu_ps(points + i), shift, x + i);
            else
                round(_mm512_mask_loadu_ps(shift, first_lanes(total - i), points + i), shift, x + i);
            at = at + 16 < d_ * kRow ? at + 16 : 0;
        }
    } else {
        const __mmask16 lanes = first_lanes(d_);
        const __m512 shift = _mm512_maskz_loadu_ps(lanes, shift_);
        for (int p = 0; p < count; ++p)  // the next point overwrites what is past this one
            round(_mm512_maskz_loadu_ps(lanes, points + p * d_), shift, x + p * 2 * pairs);
    }
    *largest = bits_float(_mm512_reduce_max_epu32(extreme));
    if (!(*largest * x_unit_ <= 32766.0f) || *largest * root_reach_ > 0x1p30f) return false;
    const int32_t* words = reinterpret_cast<const int32_t*>(x);
    switch (pairs) {
        case 1: pair_products<1, 4>(words, count, least); break;
        case 2: pair_products<2, 4>(words, count, least); break;
        case 3: pair_products<3, 4>(words, count, least); break;
        case 4: pair_products<4, 4>(words, count, least); break;
        case 5: pair_products<5, 2>(words, count, least); break;
        case 6: pair_products<6, 2>(words, count, least); break;
        case 7: pair_products<7, 2>(words, count, least); break;
        default: pair_products<8, 2>(words, count, least);
    }
    return true;
}

// least [blocks][points][16] <- least integer score of each group, as floats. x [points][Pairs].
template <int Pairs, int Together>
inline void Codebook::pair_products(const int32_t* x, int count, float* least) const {
    for (int p = 0; p < count; p += Together) {
        __m512i point[Together][Pairs];
        for (int q = 0; q < Together; ++q)
            for (int i = 0; i < Pairs; ++i) point[q][i] = _mm512_set1_epi32(x[(p + q) * Pairs + i]);
        for (int64_t block = 0; block < blocks_; ++block) {
            __m512i lowest[Together];
            for (int q = 0; q < Together; ++q) lowest[q] = _mm512_set1_epi32(0x7fffffff);
            const int32_t* row = pairs_ + block * kRow * Pairs * kRow;
            const int32_t* norms = pair_norms_ + block * kRow * kRow;
            for (int64_t t = 0; t < group_size(block); ++t, row += Pairs * kRow, norms += kRow) {
                __m512i score[Together];
                for (int q = 0; q < Together; ++q) score[q] = _mm512_load_si512(norms);
                for (int i = 0; i < Pairs; ++i) {
                    const __m512i codewords = _mm512_load_si512(row + i * kRow);
                    for (int q = 0; q < Together; ++q) score[q] = _mm512_dpwssd_epi32(score[q], point[q][i], codewords);
                }
                for (int q = 0; q < Together; ++q) lowest[q] = _mm512_min_epi32(lowest[q], score[q]);
            }
            for (int q = 0; q < Together; ++q)
                _mm512_store_ps(least + (block * kTilePoints + p + q) * kRow, _mm512_cvtepi32_ps(lowest[q]));
        }
    }
}
#else
inline void Codebook::prepare_pairs() {}
inline bool Codebook::pair_scores(const float*, int, void*, float*, float*) const { return false; }
#endif

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
