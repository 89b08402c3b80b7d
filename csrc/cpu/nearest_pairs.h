// Nearest codewords by scores in 16-bit integers, pairs of coordinates side by side, for nearest.h.
//
// Points are side by side, 32 of them, and codewords come in couples. The low bits of the lesser score of a couple make
// room for its number, so that the least and the second least of all are found without a look at where they are. Where
// the second is beyond the rounding of the first, the nearest codeword is one of that couple: both distances are taken.
// Other points, 2 to 3 in 100, are scored again, 16 codewords side by side, and compared to all that are close. Points
// much longer than most go without integers.
//
// Per point and codeword, d / 2 multiply-adds of pairs and 2.5 instructions more, for 16 points at once. Floor for d = 8,
// 256 codewords, at two multiply-adds a cycle of 4.15 GHz: 7.7 ns a point on one core; measured 9.2 in the loop, 11.6 in all.
#pragma once

#include "cpu/nearest.h"

namespace qnk {
inline namespace QNK_ISA {

#if defined(__AVX512VNNI__)
constexpr int64_t kCouples = 4096;   // that the low bits of a score tell apart
constexpr int kAhead = 1024;         // coordinates between a point that is read and one that is asked for
constexpr int kLonger = 16;          // one in so many points of a sample is left out of account as too long
constexpr float kReach = 1.5f;       // how much longer than the others a point may be

inline int64_t couple_words(int pairs) { return 2 * (1 + pairs) + 1; }

// Units in which products of any codeword and of almost all points fit, judging by a sample; none if there are no such.
inline void Codebook::choose_pair_units(const float* sample, int count) {
    float largest = 0.0f;
    const int64_t rows = (blocks_ - 1) * kRow + last_tiles_;
    for (int64_t row = 0; row < rows; ++row)
        for (int i = kRow; i < (1 + d_) * kRow; ++i) {
            const float magnitude = __builtin_fabsf(rows_[row * (1 + d_) * kRow + i]);
            largest = magnitude > largest ? magnitude : largest;
        }
    if (!(largest > 1e-14f && norm_ < 1e15f)) return;
    float lengths[kSample] = {}, widths[kSample] = {};
    for (int p = 0; p < count; ++p) {
        for (int j = 0; j < d_; ++j) {
            const float value = sample[p * d_ + j] - shift_[j], magnitude = __builtin_fabsf(value);
            lengths[p] += value * value;
            widths[p] = magnitude > widths[p] ? magnitude : widths[p];
        }
        lengths[p] = __builtin_sqrtf(lengths[p]);
    }
    const auto most_of = [&](float* values, float least) {
        float most = 0.0f;
        for (int left_out = 0; left_out <= count / kLonger; ++left_out) {
            int at = 0;
            for (int p = 1; p < count; ++p) at = values[p] > values[at] ? p : at;
            most = values[at], values[at] = 0.0f;
        }
        return kReach * (most > least ? most : least);
    };
    const float longest = most_of(lengths, norm_), widest_x = most_of(widths, largest);
    if (!(longest < 1e15f)) return;
    // |c|^2 / 2 + |x| |c|, a score's largest magnitude, is below 2^31
    const float product = 0x1.f5p30f / ((norm_ / 2 + longest) * norm_), c_most = 32766.0f / largest;
    x_unit_ = 32766.0f / widest_x;
    c_unit_ = product / x_unit_ < c_most ? product / x_unit_ : c_most;
    const float limit = longest * x_unit_ / 8 - __builtin_sqrtf(static_cast<float>(d_ + 1));
    pair_limit_ = static_cast<int32_t>(limit * limit);
    // coordinates of c are off by at most a half, those of x as well; besides, sums, norms and their differences in fp32
    const float rounding = (d_ + 4) * 0x1p-22f * (longest + norm_) * norm_;
    pair_error_ = static_cast<int32_t>(static_cast<float>(d_) + 0x1p11f + rounding * x_unit_ * c_unit_);
}

inline void Codebook::prepare_pairs(const float* sample, int count) {
    choose_pair_units(sample, count);
    if (x_unit_ == 0.0f) return;
    const int pairs = (d_ + 1) / 2;
    int32_t widest = 0;  // sum of magnitudes of a codeword
    for (int64_t i = 0; i < rounded_up(k_, 2); ++i) {
        int32_t* words = couples_ + i / 2 * couple_words(pairs) + i % 2 * (1 + pairs);
        words[0] = kNoCodeword;
        for (int pair = 0; pair < pairs; ++pair) words[1 + pair] = 0;
        if (i % 2) words[1 + pairs] = static_cast<int32_t>(i / 2 % kCouples);
    }
    for (int64_t row = 0; row < (blocks_ - 1) * kRow + last_tiles_; ++row)
        for (int lane = 0; lane < kRow; ++lane) {
            const float* at = rows_ + row * (1 + d_) * kRow + lane;
            const float norm = at[0] * x_unit_ * c_unit_;
            int32_t sum = 0;
            int32_t words[1 + kPairDimension / 2] = {norm < 0x1p31f ? static_cast<int32_t>(__builtin_lrintf(norm)) : kNoCodeword};
            for (int pair = 0; pair < pairs; ++pair) {
                int32_t values[2] = {};
                for (int i = 0; i < 2 && 2 * pair + i < d_; ++i) {
                    values[i] = static_cast<int32_t>(__builtin_lrintf(-at[(1 + 2 * pair + i) * kRow] * c_unit_));
                    sum += values[i] < 0 ? -values[i] : values[i];
                }
                words[1 + pair] =
                    static_cast<int32_t>((static_cast<uint32_t>(values[1]) << 16) | (static_cast<uint32_t>(values[0]) & 0xffffu));
                pairs_[(row * pairs + pair) * kRow + lane] = words[1 + pair];
            }
            pair_norms_[row * kRow + lane] = words[0];
            widest = sum > widest ? sum : widest;
            const int64_t block = row / kRow, i = first_of(block, lane) + row % kRow;
            if (i < k_ && row % kRow < group_size(block))
                for (int word = 0; word <= pairs; ++word)
                    couples_[i / 2 * couple_words(pairs) + i % 2 * (1 + pairs) + word] = words[word];
        }
    pair_error_ += widest;
}

inline void Codebook::pair_nearest(const float* points, int count, void* work, int32_t* codes, float* distances) const {
    switch ((d_ + 1) / 2) {
        case 1: return pair_choose<1>(points, count, work, codes, distances);
        case 2: return pair_choose<2>(points, count, work, codes, distances);
        case 3: return pair_choose<3>(points, count, work, codes, distances);
        case 4: return pair_choose<4>(points, count, work, codes, distances);
        case 5: return pair_choose<5>(points, count, work, codes, distances);
        case 6: return pair_choose<6>(points, count, work, codes, distances);
        case 7: return pair_choose<7>(points, count, work, codes, distances);
        default: return pair_choose<8>(points, count, work, codes, distances);
    }
}

// x [points][2 * pairs] <- the shifted points in units of 1 / x_unit_, at the end of the range where they are beyond it.
inline void Codebook::pair_operands(const float* points, int count, int16_t* x) const {
    const __m512 unit = _mm512_set1_ps(x_unit_);
    const auto round = [&](__m512 value, __m512 shift, int16_t* to) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(value, shift), unit));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(whole));  // there is room for whole vectors
    };
    if (d_ % 2 == 0) {
        const int total = count * d_;
        for (int i = 0, at = 0; i < total; i += 16) {
            const __m512 shift = _mm512_loadu_ps(shift_ + at);
            __builtin_prefetch(points + i + kAhead);
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
            round(_mm512_maskz_loadu_ps(lanes, points + p * d_), shift, x + p * (d_ + 1));
    }
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

// columns [Pairs] <- pairs of coordinates of 16 points x [16][Pairs], point 4 q + l in lane 4 l + q.
template <int Pairs>
inline void pair_columns(const int32_t* x, __m512i (&columns)[Pairs]) {
    for (int first = 0; first < Pairs; first += 4) {
        const __mmask8 lanes = static_cast<__mmask8>(first_lanes(Pairs - first < 4 ? Pairs - first : 4));
        __m512 quads[4];
        for (int q = 0; q < 4; ++q) {
            const auto quad = [&](int l) {
                return _mm_castsi128_ps(_mm_maskz_loadu_epi32(lanes, x + (4 * q + l) * Pairs + first));
            };
            const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(quad(0)), quad(1), 1);
            const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(quad(2)), quad(3), 1);
            quads[q] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
        }
        transpose_quads(quads);
        for (int i = 0; i < 4 && first + i < Pairs; ++i) columns[first + i] = _mm512_castps_si512(quads[i]);
    }
}

// Of 16 points, the lanes of pair_columns: least and second least score of a couple, the low bits cleared, and the number
// of the first.
struct BestCouples {
    __m512i first, second, number;
};

// x [2][Pairs]: columns of 32 points.
template <int Pairs>
inline void Codebook::best_couples(const __m512i (&x)[2][Pairs], BestCouples* best) const {
    const __m512i low = _mm512_set1_epi32(kCouples - 1), none = _mm512_set1_epi32(kNoCodeword);
    for (int v = 0; v < 2; ++v) best[v] = {none, none, _mm512_setzero_si512()};
    const int64_t couples = (k_ + 1) / 2;
    const int32_t* words = couples_;
    for (int64_t begin = 0; begin < couples; begin += kCouples) {
        __m512i first[2] = {none, none}, second[2] = {none, none};
        for (int64_t t = begin; t < begin + kCouples && t < couples; ++t, words += 2 * (1 + Pairs) + 1) {
            __m512i scores[2][2];
            for (int c = 0; c < 2; ++c)
                for (int v = 0; v < 2; ++v) scores[c][v] = _mm512_set1_epi32(words[c * (1 + Pairs)]);
            for (int i = 0; i < Pairs; ++i)
                for (int c = 0; c < 2; ++c) {
                    const __m512i codeword = _mm512_set1_epi32(words[c * (1 + Pairs) + 1 + i]);
                    for (int v = 0; v < 2; ++v) scores[c][v] = _mm512_dpwssd_epi32(scores[c][v], x[v][i], codeword);
                }
            const __m512i number = _mm512_set1_epi32(words[2 * (1 + Pairs)]);
            for (int v = 0; v < 2; ++v) {
                // (score & ~low) | number
                const __m512i score = _mm512_ternarylogic_epi32(_mm512_min_epi32(scores[0][v], scores[1][v]), low, number, 0xba);
                second[v] = _mm512_min_epi32(second[v], _mm512_max_epi32(first[v], score));
                first[v] = _mm512_min_epi32(first[v], score);
            }
        }
        for (int v = 0; v < 2; ++v) {
            BestCouples& to = best[v];
            const __m512i number = _mm512_add_epi32(_mm512_and_si512(first[v], low), _mm512_set1_epi32(static_cast<int32_t>(begin)));
            const __m512i score = _mm512_andnot_si512(low, first[v]);
            to.second = _mm512_min_epi32(_mm512_min_epi32(to.second, _mm512_andnot_si512(low, second[v])),
                                         _mm512_max_epi32(to.first, score));
            to.number = _mm512_mask_mov_epi32(to.number, _mm512_cmplt_epi32_mask(score, to.first), number);
            to.first = _mm512_min_epi32(to.first, score);
        }
    }
}

// The nearest codewords of up to 32 points.
template <int Pairs>
inline void Codebook::pair_choose(const float* points, int count, void* work, int32_t* codes, float* distances) const {
    float* least = static_cast<float*>(work);  // [blocks][points][16]
    int16_t* operands = reinterpret_cast<int16_t*>(least + blocks_ * kTilePoints * kRow);
    pair_operands(points, count, operands);
    const int32_t* x = reinterpret_cast<const int32_t*>(operands);
    alignas(64) int32_t couples[kTilePoints], tolerances[kTilePoints];
    __m512i columns[2][Pairs];
    BestCouples best[2];
    for (int v = 0; v < 2; ++v) pair_columns<Pairs>(x + v * kRow * Pairs, columns[v]);
    best_couples<Pairs>(columns, best);
    uint32_t far = 0, doubts = 0;
    for (int v = 0; v < 2; ++v) {
        const auto ordered = [](__m512i lanes) {
            return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), lanes);
        };
        __m512i error = _mm512_set1_epi32(pair_error_), squared = _mm512_setzero_si512(), widest = squared;
        for (int i = 0; i < Pairs; ++i) {
            const __m512i size = _mm512_abs_epi16(columns[v][i]), eighth = _mm512_srli_epi16(size, 3);
            error = _mm512_dpwssd_epi32(error, size, _mm512_set1_epi16(1));
            squared = _mm512_dpwssd_epi32(squared, eighth, eighth);
            widest = _mm512_max_epu16(widest, size);
        }
        const __mmask32 ends = _mm512_cmpge_epu16_mask(ordered(widest), _mm512_set1_epi16(0x7fff));
        const uint32_t end = _mm512_test_epi32_mask(_mm512_movm_epi16(ends), _mm512_set1_epi32(-1));
        const uint32_t longer = _mm512_cmpgt_epi32_mask(ordered(squared), _mm512_set1_epi32(pair_limit_));
        const __m512i tolerance = ordered(error);
        const __m512i limit = _mm512_add_epi32(ordered(best[v].first), _mm512_add_epi32(tolerance, _mm512_set1_epi32(kCouples)));
        const uint32_t close = _mm512_cmple_epi32_mask(ordered(best[v].second), limit);
        far |= (end | longer) << (v * kRow), doubts |= close << (v * kRow);
        _mm512_store_si512(tolerances + v * kRow, tolerance);
        _mm512_store_si512(couples + v * kRow, ordered(best[v].number));
    }
    for (int p = 0; p < count; p += kRow)
        nearer_of(points + p * d_, count - p < kRow ? count - p : kRow, couples + p, codes + p, distances + p);
    const uint32_t all = count < kTilePoints ? (1u << count) - 1u : ~0u;
    constexpr int D = 2 * Pairs;
    for (doubts &= all & ~far; doubts; doubts &= doubts - 1) {
        const int p = __builtin_ctz(doubts);
        const float bound = pair_scores<Pairs>(x + p * Pairs, least) + static_cast<float>(tolerances[p]);
        d_ == D ? compare_groups<D>(points + p * D, least, bound, codes + p, distances + p)
                : compare_groups<0>(points + p * d_, least, bound, codes + p, distances + p);
    }
    for (far &= all; far; far &= far - 1) {
        const int p = __builtin_ctz(far);
        d_ == D ? scored_nearest<D>(points + p * D, 1, work, codes + p, distances + p)
                : scored_nearest<0>(points + p * d_, 1, work, codes + p, distances + p);
    }
}

// least [blocks][points][16] <- of one point x [Pairs], the first, the least integer score of each group, as floats.
// Returns the least of all.
template <int Pairs>
inline float Codebook::pair_scores(const int32_t* x, float* least) const {
    __m512 overall = _mm512_set1_ps(kInfinity);
    for (int64_t block = 0; block < blocks_; ++block) {
        __m512i lowest = _mm512_set1_epi32(kNoCodeword);
        const int32_t* row = pairs_ + block * kRow * Pairs * kRow;
        const int32_t* norms = pair_norms_ + block * kRow * kRow;
        for (int64_t t = 0; t < group_size(block); ++t, row += Pairs * kRow, norms += kRow) {
            __m512i score = _mm512_load_si512(norms);
            for (int i = 0; i < Pairs; ++i)
                score = _mm512_dpwssd_epi32(score, _mm512_set1_epi32(x[i]), _mm512_load_si512(row + i * kRow));
            lowest = _mm512_min_epi32(lowest, score);
        }
        const __m512 scores = _mm512_cvtepi32_ps(lowest);
        _mm512_store_ps(least + block * kTilePoints * kRow, scores);
        overall = _mm512_min_ps(overall, scores);
    }
    return _mm512_reduce_min_ps(overall);
}

// The nearer codeword of a couple for up to 16 points.
inline void Codebook::nearer_of(const float* points, int count, const int32_t* couples, int32_t* codes, float* distances) const {
    const __m512i first = _mm512_slli_epi32(_mm512_load_si512(couples), 1);
    const __m512i other = _mm512_min_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(1)), _mm512_set1_epi32(static_cast<int32_t>(k_ - 1)));
    __m512 from_first, from_other;
    if (d_ == 8 && k_ % 2 == 0) {
        distances_of_8(points, count, couples, from_first, from_other);
    } else {
        from_first = distances_of(points, count, first);
        from_other = distances_of(points, count, other);
    }
    const __mmask16 lanes = first_lanes(count), nearer = _mm512_cmp_ps_mask(from_other, from_first, _CMP_LT_OQ) |
                                                _mm512_cmp_ps_mask(from_first, from_first, _CMP_UNORD_Q);
    _mm512_mask_storeu_epi32(codes, lanes, _mm512_mask_mov_epi32(first, nearer, other));
    _mm512_mask_storeu_ps(distances, lanes, _mm512_mask_mov_ps(from_first, nearer, from_other));
}

// Squared distances of up to 16 points to their codewords, summed in the order of distances_in_group: the dimensions in
// turn, the points side by side.
inline __m512 Codebook::distances_of(const float* points, int count, __m512i codes) const {
    alignas(64) int32_t rows[kRow];
    _mm512_store_si512(rows, codes);
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < d_; j += 4) {
        const __mmask8 lanes = static_cast<__mmask8>(first_lanes(d_ - j < 4 ? d_ - j : 4));
        const auto difference = [&](int p) {
            p = p < count ? p : 0;
            const __m128 c = _mm_maskz_loadu_ps(lanes, codewords_ + rows[p] * static_cast<int64_t>(d_) + j);
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
    return sum;
}

// The same to both codewords of couples, for d = 8, where one vector holds a couple.
inline void Codebook::distances_of_8(const float* points, int count, const int32_t* couples, __m512& first, __m512& other) const {
    __m512 quads[4][4];  // [four points][dimension]: their columns j of the one codeword, then j + 4, then of the other
    for (int l = 0; l < 4; ++l) {
        for (int i = 0; i < 4; ++i) {
            const int p = 4 * l + i < count ? 4 * l + i : 0;
            const __m512 point = _mm512_broadcast_f32x8(_mm256_loadu_ps(points + 8 * p));
            quads[l][i] = _mm512_sub_ps(_mm512_loadu_ps(codewords_ + couples[p] * int64_t{16}), point);
        }
        transpose_quads(quads[l]);
    }
    first = other = _mm512_setzero_ps();
    const auto add = [&](__m512 low, __m512 high) {
        const __m512 of_first = _mm512_shuffle_f32x4(low, high, 0x88), of_other = _mm512_shuffle_f32x4(low, high, 0xdd);
        first = _mm512_fmadd_ps(of_first, of_first, first);
        other = _mm512_fmadd_ps(of_other, of_other, other);
    };
    for (int j = 0; j < 4; ++j)
        add(_mm512_shuffle_f32x4(quads[0][j], quads[1][j], 0x88), _mm512_shuffle_f32x4(quads[2][j], quads[3][j], 0x88));
    for (int j = 0; j < 4; ++j)
        add(_mm512_shuffle_f32x4(quads[0][j], quads[1][j], 0xdd), _mm512_shuffle_f32x4(quads[2][j], quads[3][j], 0xdd));
}
#else
inline void Codebook::prepare_pairs(const float*, int) {}
inline void Codebook::pair_nearest(const float*, int, void*, int32_t*, float*) const {}
#endif

}  // namespace QNK_ISA
}  // namespace qnk
