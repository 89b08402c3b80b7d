// Nearest of K codewords, exact in fp32, for points of up to 64 dimensions.
//
// Scores |c|^2 / 2 - x.c order the codewords of a point like its distances, up to rounding. They are taken 16 codewords
// at a time, a row of 16 lanes, and only the least score of each lane is kept: a lane holds the scores of one group of
// up to 16 codewords. Groups whose least score is within the rounding of the best one are then compared by their
// distances themselves, sum_j (x_j - c_j)^2. Points and codewords are shifted by the mean codeword before scoring, so
// that a common offset costs no precision.
//
// Per point and codeword: d multiply-adds and a minimum. With VNNI and d <= 16, half as many products of pairs of 16-bit
// integers (some 14 bits of x and c: the rounding is wider, and one point in twenty has two groups to compare). With AMX
// and d > 16, tile products (bf16 halves: x.c = xh.ch + xl.ch + xh.cl). Per point besides: the distances of 16 codewords.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int kRow = 16;          // lanes of a row of scores, codewords of a group at most
constexpr int kRowVecs = kRow / kLanes;
constexpr int kTilePoints = 32;   // points that are looked up together
constexpr int kBlock = 256;       // codewords of a block: 16 lanes of up to 16
constexpr int kMaxDimension = 64;
constexpr float kInfinity = __builtin_inff();

class Codebook {
  public:
    Codebook() = default;
    Codebook(const Codebook&) = delete;
    Codebook& operator=(const Codebook&) = delete;
    ~Codebook() { free(memory_); }

    // codewords [k, d]; false without memory.
    bool prepare(const float* codewords, int64_t k, int d);

    // codes, distances [count] of points [count, d], count <= kTilePoints. work: work_bytes() aligned to 64.
    // With AMX, inside a Tiles scope.
    void nearest(const float* points, int count, void* work, int32_t* codes, float* distances) const;

    int64_t work_bytes() const;

  private:
    // Codewords of lane l of block b: count in a row, the first being first.
    int64_t group_size(int64_t block) const { return block + 1 < blocks_ ? kRow : last_tiles_; }
    int64_t first_of(int64_t block, int64_t lane) const { return block * kBlock + lane * group_size(block); }

    template <int D>
    void nearest_of(const float* points, int count, void* work, int32_t* codes, float* distances) const;
    template <int D>
    void distances_in_group(const float* x, int64_t group, float* squared) const;
    template <int D>
    void in_group(const float* x, int64_t block, int lane, int32_t* code, float* distance) const;
    template <int D>
    void choose(const float* points, int count, const float* least, float tolerance, int32_t* codes,
                float* distances) const;
    template <int D>
    void scores(const float* shifted, int count, float* least) const;
    void tile_scores(const float* shifted, int count, void* work, float* least) const;
    void prepare_pairs();
    bool pair_scores(const float* points, int count, void* work, float* least, float* largest) const;
    template <int Pairs, int Together>
    void pair_products(const int32_t* x, int count, float* least) const;
    void write_tiles(const float* shifted, int64_t row, int lane) const;
    float shifted_points(const float* points, int count, float* shifted) const;

    int64_t k_ = 0, blocks_ = 0, last_tiles_ = 0;
    int d_ = 0, steps_ = 0;
    bool direct_only_ = false;
    float norm_ = 0.0f;   // largest |c - shift|
    float scale_ = 1.0f;  // power of two that brings norm_ to about 1, for bf16
    float shift_[kMaxDimension * kRow] = {};  // the mean codeword, 16 times over
    void* memory_ = nullptr;
    float* groups_ = nullptr;    // [blocks * 16 lanes][d][16]: codewords of a group side by side, infinite where none
    float* rows_ = nullptr;      // [rows][1 + d][16]: half norms and coordinates less the shift; infinite norms where none
    float* norms_ = nullptr;     // [rows][16]: half norms in the scale of the tiles, where sums of AMX start
    uint16_t* tiles_ = nullptr;  // [rows][steps][16][32]: bf16 operands of AMX
    // Scores in integers: x in units of 1 / x_unit_, codewords of 1 / c_unit_, pairs of coordinates side by side.
    float x_unit_ = 0.0f, c_unit_ = 0.0f, pair_error_ = 0.0f, root_reach_ = 0.0f;
    int32_t* pairs_ = nullptr;       // [rows][(d + 1) / 2][16]
    int32_t* pair_norms_ = nullptr;  // [rows][16]
};

// minima [16] <- least value of each of 16 rows of 16 (aligned to 64 bytes).
inline void row_minima(const float* rows, float* minima) {
#if defined(__AVX512F__)
    const auto fold = [](__m512 a, __m512 b) { return _mm512_min_ps(a, b); };
    __m512 quads[4];  // lane l holds, of four rows, the least of their elements 4 l to 4 l + 3
    for (int q = 0; q < 4; ++q) {
        const float* row = rows + q * 4 * kRow;
        const __m512 a = _mm512_load_ps(row), b = _mm512_load_ps(row + kRow);
        const __m512 c = _mm512_load_ps(row + 2 * kRow), d = _mm512_load_ps(row + 3 * kRow);
        const __m512d ab = _mm512_castps_pd(fold(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        const __m512d cd = _mm512_castps_pd(fold(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        quads[q] = fold(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    }
    const auto halves = [&](__m512 a, __m512 b) {
        return fold(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 low = halves(quads[0], quads[1]), high = halves(quads[2], quads[3]);
    _mm512_store_ps(minima, fold(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
#else
    for (int r = 0; r < kRow; ++r) {
        Vec least = load(rows + r * kRow);
        for (int v = 1; v < kRowVecs; ++v) least = min(load(rows + r * kRow + v * kLanes), least);
        minima[r] = min_of(least);
    }
#endif
}

// Bit l is set where element l of a row is at most `bound`.
inline uint32_t at_most(const float* row, float bound) {
    uint32_t bits = 0;
    for (int v = 0; v < kRowVecs; ++v) {
        const Mask greater = less(splat(bound), load(row + v * kLanes));
        bits |= static_cast<uint32_t>(first_lanes(kLanes) & static_cast<Mask>(~greater)) << (v * kLanes);
    }
    return bits;
}

#if defined(__AVX512VNNI__)
constexpr int kPairDimension = 16;  // largest that is scored in pairs
#else
constexpr int kPairDimension = 0;
#endif
constexpr float kPairReach = 1.5f;  // how much larger than any of a codeword a coordinate of x may be

inline int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline bool Codebook::prepare(const float* codewords, int64_t k, int d) {
    k_ = k, d_ = d;
    blocks_ = (k + kBlock - 1) / kBlock;
    last_tiles_ = rounded_up((k - (blocks_ - 1) * kBlock + kRow - 1) / kRow, 2);  // tile products go in pairs
    direct_only_ = k <= kRow;
    if (direct_only_) last_tiles_ = kRow;
    steps_ = (3 * d + 31) / 32;
    const bool in_pairs = d <= kPairDimension && !direct_only_, in_tiles = kHasTiles && !in_pairs;
    const int64_t rows = (blocks_ - 1) * kRow + last_tiles_, groups = blocks_ * kRow;
    const int64_t group_floats = groups * d * kRow, row_floats = rows * (1 + d) * kRow;
    const int64_t norm_floats = in_tiles ? rows * kRow : 0, tile_halves = in_tiles ? rows * steps_ * 512 : 0;
    const int64_t pair_words = in_pairs ? rows * kRow * ((d + 1) / 2 + 1) : 0;
    const int64_t bytes = 4 * (group_floats + row_floats + norm_floats + pair_words) + 2 * tile_halves;
    memory_ = aligned_alloc(64, static_cast<size_t>(rounded_up(bytes, 64)));
    if (!memory_) return false;
    groups_ = static_cast<float*>(memory_);
    rows_ = groups_ + group_floats;
    norms_ = rows_ + row_floats;
    pair_norms_ = reinterpret_cast<int32_t*>(norms_ + norm_floats);
    pairs_ = pair_norms_ + rows * kRow;
    tiles_ = reinterpret_cast<uint16_t*>(pair_norms_ + pair_words);
    for (int64_t i = 0; i < tile_halves; ++i) tiles_[i] = 0;

    double mean[kMaxDimension] = {};
    for (int64_t i = 0; i < k; ++i)
        for (int j = 0; j < d; ++j) mean[j] += codewords[i * d + j];
    for (int j = 0; j < d * kRow; ++j) shift_[j] = static_cast<float>(mean[j % d] / static_cast<double>(k));
    double largest = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        double squared = 0.0;
        for (int j = 0; j < d; ++j) {
            const double c = codewords[i * d + j] - shift_[j];
            squared += c * c;
        }
        largest = squared > largest ? squared : largest;
    }
    norm_ = static_cast<float>(__builtin_sqrt(largest));
    int exponent = 0;
    if (norm_ > 0.0f && norm_ < kInfinity) (void)__builtin_frexpf(norm_, &exponent);
    exponent = exponent > 100 ? 100 : exponent < -100 ? -100 : exponent;
    scale_ = __builtin_ldexpf(1.0f, -exponent);

    for (int64_t i = 0; i < group_floats; ++i) groups_[i] = kInfinity;
    for (int64_t block = 0; block < blocks_; ++block) {
        const int64_t size = group_size(block);
        for (int lane = 0; lane < kRow; ++lane)
            for (int64_t t = 0; t < size; ++t) {
                const int64_t i = block * kBlock + lane * size + t, row = block * kRow + t;
                const bool real = i < k;
                float shifted[kMaxDimension];
                double squared = 0.0;
                float* group = groups_ + (block * kRow + lane) * d * kRow;
                float* at = rows_ + row * (1 + d) * kRow + lane;
                for (int j = 0; j < d; ++j) {
                    shifted[j] = real ? codewords[i * d + j] - shift_[j] : 0.0f;
                    squared += static_cast<double>(shifted[j]) * shifted[j];
                    if (real) group[j * kRow + t] = codewords[i * d + j];
                    at[(1 + j) * kRow] = shifted[j];
                }
                const float half_norm = real ? static_cast<float>(squared / 2) : kInfinity;
                at[0] = half_norm;
                if (in_tiles) {
                    norms_[row * kRow + lane] = half_norm * scale_ * scale_;
                    write_tiles(shifted, row, lane);
                }
            }
    }
    if (in_pairs) prepare_pairs();
    return true;
}

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

inline int64_t Codebook::work_bytes() const {
    const int64_t least = 4 * blocks_ * kTilePoints * kRow, shifted = 4 * kTilePoints * kMaxDimension;
    const int64_t operands = 2 * kTilePoints * 32 * steps_, products = kHasTiles ? 4 * 8 * 16 * 32 : 0;
    return rounded_up(least + shifted + operands + products, 64);
}

inline void Codebook::nearest(const float* points, int count, void* work, int32_t* codes, float* distances) const {
    switch (d_) {
        case 4: return nearest_of<4>(points, count, work, codes, distances);
        case 8: return nearest_of<8>(points, count, work, codes, distances);
        case 16: return nearest_of<16>(points, count, work, codes, distances);
        default: return nearest_of<0>(points, count, work, codes, distances);
    }
}

// shifted [count, d] <- points less the mean codeword; returns the largest magnitude among them.
inline float Codebook::shifted_points(const float* points, int count, float* shifted) const {
    const int total = count * d_, repeat = d_ * kRow;
    uint32_t largest = 0;  // magnitudes of floats are ordered as their bits
    for (int first = 0; first < total; first += repeat) {
        const int together = total - first < repeat ? total - first : repeat;
        for (int i = 0; i < together; ++i) {
            const float value = points[first + i] - shift_[i];
            const uint32_t magnitude = float_bits(value) & 0x7fffffffu;
            shifted[first + i] = value;
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    return bits_float(largest);
}

// squared [16] <- squared distances to the codewords of a group.
template <int D>
inline void Codebook::distances_in_group(const float* x, int64_t group, float* squared) const {
    const int d = D ? D : d_;
    const float* codewords = groups_ + group * d * kRow;
    for (int v = 0; v < kRowVecs; ++v) {
        Vec sum = splat(0.0f);
        for (int j = 0; j < d; ++j) {
            const Vec difference = load(codewords + j * kRow + v * kLanes) - splat(x[j]);
            sum = fma(difference, difference, sum);
        }
        store(squared + v * kLanes, sum);
    }
}

// Least distance to the codewords of a group, if it is less than *distance.
template <int D>
inline void Codebook::in_group(const float* x, int64_t block, int lane, int32_t* code, float* distance) const {
    alignas(64) float squared[kRow];
    distances_in_group<D>(x, block * kRow + lane, squared);
    for (int t = 0; t < kRow; ++t)
        if (squared[t] < *distance) {
            *distance = squared[t];
            *code = static_cast<int32_t>(first_of(block, lane)) + t;
        }
}

template <int D>
inline void Codebook::nearest_of(const float* points, int count, void* work, int32_t* codes, float* distances) const {
    const int d = D ? D : d_;
    if (direct_only_) {
        alignas(64) float squared[kTilePoints * kRow], minima[kTilePoints];
        for (int p = 0; p < count; ++p) distances_in_group<D>(points + p * d, 0, squared + p * kRow);
        for (int p = 0; p < kTilePoints; p += kRow) row_minima(squared + p * kRow, minima + p);
        for (int p = 0; p < count; ++p) {
            distances[p] = minima[p];
            const uint32_t equal = at_most(squared + p * kRow, minima[p]);
            codes[p] = equal ? __builtin_ctz(equal) : 0;
        }
        return;
    }
    float* least = static_cast<float*>(work);  // [blocks][points][16]
    float* shifted = least + blocks_ * kTilePoints * kRow;
    float* scratch = shifted + kTilePoints * kMaxDimension;
    float largest = 0.0f, tolerance;
    // rounding of a score, twice: products of norms times units in the last place
    const auto rounding = [&] { return (d + 4) * 0x1p-22f * (largest * __builtin_sqrtf(static_cast<float>(d)) + norm_) * norm_; };
    if (d <= kPairDimension && pair_scores(points, count, scratch, least, &largest)) {
        tolerance = (rounding() * c_unit_ + d * largest) * x_unit_ + pair_error_;
    } else {
        largest = shifted_points(points, count, shifted);
        if (kHasTiles && d > kPairDimension) {
            tile_scores(shifted, count, scratch, least);
            const float reach = largest * __builtin_sqrtf(static_cast<float>(d)) + norm_;
            tolerance = (rounding() + 0x1p-15f * reach * norm_) * scale_ * scale_;
        } else {
            scores<D>(shifted, count, least);
            tolerance = rounding();
        }
    }
    for (int p = 0; p < count; p += kRow)
        choose<D>(points + p * d, count - p < kRow ? count - p : kRow, least + p * kRow, tolerance, codes + p,
                  distances + p);
}

// The nearest codewords of up to 16 points, from the least scores of their groups.
template <int D>
inline void Codebook::choose(const float* points, int count, const float* least, float tolerance, int32_t* codes,
                             float* distances) const {
    const int d = D ? D : d_;
    constexpr int64_t kStride = kTilePoints * kRow;  // from block to block
    alignas(64) float bounds[kRow], minima[kRow], overall[kRow * kRow], squared[kRow * kRow];
    if (blocks_ > 1)
        for (int i = 0; i < kRow * kRow; i += kLanes) {
            Vec lowest = load(least + i);
            for (int64_t b = 1; b < blocks_; ++b) lowest = min(load(least + b * kStride + i), lowest);
            store(overall + i, lowest);
        }
    row_minima(blocks_ > 1 ? overall : least, bounds);
    int32_t groups[kRow];
    uint32_t several = 0;  // points with more than one group to compare
    for (int p = 0; p < count; ++p) {
        const float bound = bounds[p] + tolerance;
        if (blocks_ == 1) {
            const uint32_t close = at_most(least + p * kRow, bound);
            groups[p] = __builtin_ctz(close | 1u << (kRow - 1));
            several |= static_cast<uint32_t>((close & (close - 1)) != 0) << p;
        } else {
            int candidates = 0;
            groups[p] = 0;
            for (int64_t b = 0; b < blocks_; ++b) {
                const uint32_t close = at_most(least + b * kStride + p * kRow, bound);
                if (!close) continue;
                candidates += close & (close - 1) ? 2 : 1;
                groups[p] = static_cast<int32_t>(b * kRow) + __builtin_ctz(close);
            }
            several |= static_cast<uint32_t>(candidates > 1) << p;
        }
        distances_in_group<D>(points + p * d, groups[p], squared + p * kRow);
    }
    row_minima(squared, minima);
    for (int p = 0; p < count; ++p) {
        const uint32_t equal = at_most(squared + p * kRow, minima[p]);
        distances[p] = minima[p];
        const auto first = static_cast<int32_t>(first_of(groups[p] / kRow, groups[p] % kRow));
        codes[p] = equal ? first + __builtin_ctz(equal) : 0;  // no distance equals its minimum if it is NaN
    }
    for (; several; several &= several - 1) {
        const int p = __builtin_ctz(several);
        codes[p] = 0, distances[p] = kInfinity;
        for (int64_t b = 0; b < blocks_; ++b)
            for (uint32_t close = at_most(least + b * kStride + p * kRow, bounds[p] + tolerance); close; close &= close - 1)
                in_group<D>(points + p * d, b, __builtin_ctz(close), codes + p, distances + p);
    }
}

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

}  // namespace QNK_ISA
}  // namespace qnk
