// Nearest codewords by scores in 16-bit integers, pairs of coordinates side by side, for nearest.h.
//
// Per point and codeword, of d / 2 multiply-adds of pairs and a minimum. The best group is then scored again, which
// takes d / 2 more for all of its 16 codewords, since the lanes now hold the codewords of the one group. Where just one
// codeword of one group is within the rounding of the best score, it is the nearest one.
#pragma once

#include <type_traits>

#include "cpu/nearest.h"

namespace qnk {
inline namespace QNK_ISA {

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
            pair_norms_[row * kRow + lane] = norm < 0x1p30f ? static_cast<int32_t>(__builtin_lrintf(norm)) : kNoCodeword;
            widest = sum > widest ? sum : widest;
        }
    for (int64_t group = 0; group < blocks_ * kRow; ++group) {
        const int64_t block = group / kRow, lane = group % kRow, size = group_size(block);
        for (int64_t t = 0; t < kRow; ++t) {
            const int64_t row = block * kRow + t;
            pair_group_norms_[group * kRow + t] = t < size ? pair_norms_[row * kRow + lane] : kNoCodeword;
            for (int pair = 0; pair < pairs; ++pair)
                pair_groups_[(group * pairs + pair) * kRow + t] = t < size ? pairs_[(row * pairs + pair) * kRow + lane] : 0;
        }
    }
    // a coordinate of x is off by at most a half, and so is one of c; twice that, and the rounding of sums to floats
    pair_error_ = widest + static_cast<float>(d_) + 4.0f + 0x1p8f;
}

// False where a point is too far out for the integers.
inline bool Codebook::pair_nearest(const float* points, int count, void* work, int32_t* codes, float* distances) const {
    if (x_unit_ == 0.0f) return false;
    float* least = static_cast<float*>(work);  // [blocks][points][16]
    int16_t* x = reinterpret_cast<int16_t*>(least + blocks_ * kTilePoints * kRow);
    const float largest = pair_operands(points, count, x);
    if (!(largest * x_unit_ <= 32766.0f) || largest * root_reach_ > 0x1p30f) return false;
    const float tolerance = (rounding(largest) * c_unit_ + d_ * largest) * x_unit_ + pair_error_;
    const int32_t* words = reinterpret_cast<const int32_t*>(x);
    const auto of = [&](auto pairs, auto together) {
        constexpr int kPairs = decltype(pairs)::value;
        pair_products<kPairs, decltype(together)::value>(words, count, least);
        for (int p = 0; p < count; p += kRow)
            pair_choose<kPairs>(points + p * d_, words + p * kPairs, count - p < kRow ? count - p : kRow, least + p * kRow,
                                tolerance, codes + p, distances + p);
    };
    switch ((d_ + 1) / 2) {
        case 1: of(std::integral_constant<int, 1>(), std::integral_constant<int, 4>()); break;
        case 2: of(std::integral_constant<int, 2>(), std::integral_constant<int, 4>()); break;
        case 3: of(std::integral_constant<int, 3>(), std::integral_constant<int, 4>()); break;
        case 4: of(std::integral_constant<int, 4>(), std::integral_constant<int, 4>()); break;
        case 5: of(std::integral_constant<int, 5>(), std::integral_constant<int, 2>()); break;
        case 6: of(std::integral_constant<int, 6>(), std::integral_constant<int, 2>()); break;
        case 7: of(std::integral_constant<int, 7>(), std::integral_constant<int, 2>()); break;
        default: of(std::integral_constant<int, 8>(), std::integral_constant<int, 2>());
    }
    return true;
}

// x [points][2 * pairs] <- the shifted points in units of 1 / x_unit_; returns the largest magnitude of a coordinate.
inline float Codebook::pair_operands(const float* points, int count, int16_t* x) const {
    const int pairs = (d_ + 1) / 2;
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
    return bits_float(_mm512_reduce_max_epu32(extreme));
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

// The nearest codewords of up to 16 points, from the least scores of their groups. x [points][Pairs].
template <int Pairs>
inline void Codebook::pair_choose(const float* points, const int32_t* x, int count, const float* least, float tolerance,
                                  int32_t* codes, float* distances) const {
    constexpr int64_t kStride = kTilePoints * kRow;  // from block to block
    alignas(64) float bounds[kRow];
    least_over_blocks(least, bounds);
    _mm512_store_ps(bounds, _mm512_add_ps(_mm512_load_ps(bounds), _mm512_set1_ps(tolerance)));
    uint32_t several = 0;  // points with more than one codeword to compare
    for (int p = 0; p < count; ++p) {
        const __m512 bound = _mm512_set1_ps(bounds[p]);
        const auto within = [&](__m512 scores) { return static_cast<uint32_t>(_mm512_cmple_ps_mask(scores, bound)); };
        uint32_t close = within(_mm512_load_ps(least + p * kRow)), more = close & (close - 1);
        int64_t group = __builtin_ctz(close | 1u << (kRow - 1));
        for (int64_t b = 1; b < blocks_; ++b) {
            const uint32_t others = within(_mm512_load_ps(least + b * kStride + p * kRow));
            if (!others) continue;
            more |= close | (others & (others - 1));
            close = others;
            group = b * kRow + __builtin_ctz(others);
        }
        __m512i score = _mm512_load_si512(pair_group_norms_ + group * kRow);
        const int32_t* codewords = pair_groups_ + group * Pairs * kRow;
        for (int i = 0; i < Pairs; ++i)
            score = _mm512_dpwssd_epi32(score, _mm512_set1_epi32(x[p * Pairs + i]), _mm512_load_si512(codewords + i * kRow));
        const uint32_t near = within(_mm512_cvtepi32_ps(score));
        more |= near & (near - 1);
        codes[p] = static_cast<int32_t>(first_of(group / kRow, group % kRow)) + __builtin_ctz(near | 1u << (kRow - 1));
        several |= static_cast<uint32_t>(more != 0) << p;
    }
    for (; several; several &= several - 1) {
        const int p = __builtin_ctz(several);
        constexpr int D = 2 * Pairs;
        d_ == D ? compare_groups<D>(points + p * D, least + p * kRow, bounds[p], codes + p, distances + p)
                : compare_groups<0>(points + p * d_, least + p * kRow, bounds[p], codes + p, distances + p);
    }
    if (d_ == 8)
        distances_of_8(points, count, codes, distances);
    else
        distances_of(points, count, codes, distances);
}

// A transpose of 4 x 4 in each 128 bits: element i of vector j becomes element j of vector i.
inline void transpose_quads(__m512 (&v)[4]) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1])), b = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
    const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1])), d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
    v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}

// distances [count] <- squared distances of up to 16 points to their codewords, summed in the order of
// distances_in_group: the dimensions in turn, the points side by side.
inline void Codebook::distances_of(const float* points, int count, const int32_t* codes, float* distances) const {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < d_; j += 4) {
        const __mmask8 lanes = static_cast<__mmask8>(first_lanes(d_ - j < 4 ? d_ - j : 4));
        const auto difference = [&](int p) {
            p = p < count ? p : 0;
            const __m128 c = _mm_maskz_loadu_ps(lanes, codewords_ + codes[p] * static_cast<int64_t>(d_) + j);
            return _mm_sub_ps(c, _mm_maskz_loadu_ps(lanes, points + p * d_ + j));
        };
        __m512 quads[4];
        for (int q = 0; q < 4; ++q) {
            const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(difference(q)), difference(q + 4), 1);
            const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(difference(q + 8)), difference(q + 12), 1);
            quads[q] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
        }
        transpose_quads(quads);
        for (int i = 0; i < 4; ++i) sum = _mm512_fmadd_ps(quads[i], quads[i], sum);  // past d: adds 0
    }
    _mm512_mask_storeu_ps(distances, first_lanes(count), sum);
}

// The same for d = 8, a vector holding two points.
inline void Codebook::distances_of_8(const float* points, int count, const int32_t* codes, float* distances) const {
    const auto together = [](const float* first, const float* second) {
        return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(first)), _mm256_loadu_ps(second), 1);
    };
    __m512 quads[2][4];
    for (int half = 0; half < 2; ++half)
        for (int q = 0; q < 4; ++q) {
            const int a = 8 * half + q < count ? 8 * half + q : 0, b = 8 * half + q + 4 < count ? 8 * half + q + 4 : 0;
            const __m512 c = together(codewords_ + codes[a] * int64_t{8}, codewords_ + codes[b] * int64_t{8});
            quads[half][q] = _mm512_sub_ps(c, together(points + 8 * a, points + 8 * b));
        }
    transpose_quads(quads[0]);
    transpose_quads(quads[1]);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; ++i) {
        const __m512 column = _mm512_shuffle_f32x4(quads[0][i], quads[1][i], 0x88);
        sum = _mm512_fmadd_ps(column, column, sum);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 column = _mm512_shuffle_f32x4(quads[0][i], quads[1][i], 0xdd);
        sum = _mm512_fmadd_ps(column, column, sum);
    }
    _mm512_mask_storeu_ps(distances, first_lanes(count), sum);
}
#else
inline void Codebook::prepare_pairs() {}
inline bool Codebook::pair_nearest(const float*, int, void*, int32_t*, float*) const { return false; }
#endif

}  // namespace QNK_ISA
}  // namespace qnk
