// Nearest of K codewords, exact in fp32, for points of up to 64 dimensions.
//
// Scores |c|^2 / 2 - x.c order the codewords of a point like its distances, up to rounding. They are taken 16 codewords
// at a time, a row of 16 lanes, and only the least score of each lane is kept: a lane holds the scores of one group of
// up to 16 codewords. Groups whose least score is within the rounding of the best one are then compared by their
// distances themselves, sum_j (x_j - c_j)^2. Points and codewords are shifted by the mean codeword before scoring, so
// that a common offset costs no precision.
//
// Per point and codeword: d multiply-adds and a minimum. With VNNI and d <= 16, half as many products of pairs of 16-bit
// integers (nearest_pairs.h). With AMX and d > 16, tile products (bf16 halves: x.c = xh.ch + xl.ch + xh.cl). Per point
// besides: the distances of 16 codewords, with integers of two.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "cpu/rows.h"
#include "cpu/tiles.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int kTilePoints = 32;   // points that are looked up together
constexpr int kBlock = 256;       // codewords of a block: 16 lanes of up to 16
constexpr int kMaxDimension = 64;
constexpr int kSample = 64;       // points that tell how long they are
constexpr float kInfinity = __builtin_inff();

struct BestCouples;

class Codebook {
  public:
    Codebook() = default;
    Codebook(const Codebook&) = delete;
    Codebook& operator=(const Codebook&) = delete;
    ~Codebook() { free(memory_); }

    // codewords [k, d], which must stay as long as points are looked up; sample [count, d]: some of the points. false
    // without memory.
    bool prepare(const float* codewords, int64_t k, int d, const float* sample, int count);

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
    template <int D>
    void compare_groups(const float* x, const float* least, float bound, int32_t* code, float* distance) const;
    void least_over_blocks(const float* least, float* minima) const;
    float rounding(float largest) const;
    template <int D>
    void scored_nearest(const float* points, int count, void* work, int32_t* codes, float* distances) const;
    void choose_pair_units(const float* sample, int count);
    void prepare_pairs(const float* sample, int count);
    void pair_nearest(const float* points, int count, void* work, int32_t* codes, float* distances) const;
    void pair_operands(const float* points, int count, int16_t* x) const;
    template <int Pairs>
    void pair_choose(const float* points, int count, void* work, int32_t* codes, float* distances) const;
    template <int Pairs>
    float pair_scores(const int32_t* x, float* least) const;
#if defined(__AVX512VNNI__)
    void nearer_of(const float* points, int count, const int32_t* couples, int32_t* codes, float* distances) const;
    __m512 distances_of(const float* points, int count, __m512i codes) const;
    void distances_of_8(const float* points, int count, const int32_t* couples, __m512& first, __m512& other) const;
    template <int Pairs>
    void best_couples(const __m512i (&x)[2][Pairs], BestCouples* best) const;
#endif
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
    float x_unit_ = 0.0f, c_unit_ = 0.0f;  // 0: they are not of use
    int32_t pair_error_ = 0;            // of the difference of two scores, without the share of x
    int32_t pair_limit_ = 0;            // of the squared length of x / 8
    int32_t* pairs_ = nullptr;          // [rows][(d + 1) / 2][16]
    int32_t* pair_norms_ = nullptr;     // [rows][16]
    int32_t* couples_ = nullptr;        // [(k + 1) / 2]: norm and pairs of two codewords, and the number of the couple
    const float* codewords_ = nullptr;  // [k, d], the caller's
};

#if defined(__AVX512VNNI__)
constexpr int kPairDimension = 16;  // largest that is scored in pairs
#else
constexpr int kPairDimension = 0;
#endif
constexpr int32_t kNoCodeword = 0x7fffffff;  // above every score in integers

inline int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// sample [kSample, d] <- some of the points [n, d]; returns how many.
template <typename T>
inline int sample_of(const T* points, int64_t n, int64_t d, float* sample) {
    const int count = static_cast<int>(n < kSample ? n : kSample);
    for (int p = 0; p < count; ++p)
        for (int64_t j = 0; j < d; ++j) sample[p * d + j] = to_float(points[n * p / count * d + j]);
    return count;
}

inline bool Codebook::prepare(const float* codewords, int64_t k, int d, const float* sample, int count) {
    k_ = k, d_ = d, codewords_ = codewords;
    blocks_ = (k + kBlock - 1) / kBlock;
    last_tiles_ = rounded_up((k - (blocks_ - 1) * kBlock + kRow - 1) / kRow, 2);  // tile products go in pairs
    direct_only_ = k <= kRow;
    if (direct_only_) last_tiles_ = kRow;
    steps_ = (3 * d + 31) / 32;
    const bool in_pairs = d <= kPairDimension && !direct_only_, in_tiles = kHasTiles && !in_pairs;
    const int64_t rows = (blocks_ - 1) * kRow + last_tiles_, groups = blocks_ * kRow;
    const int64_t group_floats = groups * d * kRow, row_floats = rows * (1 + d) * kRow;
    const int64_t norm_floats = in_tiles ? rows * kRow : 0, tile_halves = in_tiles ? rows * steps_ * 512 : 0;
    const int64_t pairs = (d + 1) / 2, couple_words = (k + 1) / 2 * (2 * (1 + pairs) + 1);
    const int64_t pair_words = in_pairs ? rows * kRow * (pairs + 1) + couple_words : 0;
    const int64_t bytes = 4 * (group_floats + row_floats + norm_floats + pair_words) + 2 * tile_halves;
    memory_ = aligned_alloc(64, static_cast<size_t>(rounded_up(bytes, 64)));
    if (!memory_) return false;
    groups_ = static_cast<float*>(memory_);
    rows_ = groups_ + group_floats;
    norms_ = rows_ + row_floats;
    pair_norms_ = reinterpret_cast<int32_t*>(norms_ + norm_floats);
    pairs_ = pair_norms_ + rows * kRow;
    couples_ = pairs_ + rows * kRow * pairs;
    tiles_ = reinterpret_cast<uint16_t*>(pair_norms_ + pair_words);
    for (int64_t i = 0; i < tile_halves; ++i) tiles_[i] = 0;

    const auto is_finite = [&](int64_t i) {
        float product = 0.0f;  // of zeros, which infinity and NaN make NaN
        for (int j = 0; j < d; ++j) product += codewords[i * d + j] * 0.0f;
        return product == 0.0f;
    };
    double mean[kMaxDimension] = {}, count_of_mean = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        if (!is_finite(i)) continue;
        ++count_of_mean;
        for (int j = 0; j < d; ++j) mean[j] += codewords[i * d + j];
    }
    for (int j = 0; j < d * kRow; ++j) shift_[j] = static_cast<float>(count_of_mean ? mean[j % d] / count_of_mean : 0.0);
    double largest = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        if (!is_finite(i)) continue;
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
                const bool real = i < k && is_finite(i);  // nothing is near one that is not
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
    if (in_pairs) prepare_pairs(sample, count);
    return true;
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
    Vec lowest = load(squared);
    for (int v = kLanes; v < kRow; v += kLanes) lowest = min(load(squared + v), lowest);
    const float least = min_of(lowest);
    if (!(least < *distance)) return;
    *distance = least;
    *code = static_cast<int32_t>(first_of(block, lane)) + __builtin_ctz(at_most(squared, least));
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
    if (x_unit_ > 0.0f) return pair_nearest(points, count, work, codes, distances);
    scored_nearest<D>(points, count, work, codes, distances);
}

// The nearest codewords by scores in fp32 or in tiles.
template <int D>
inline void Codebook::scored_nearest(const float* points, int count, void* work, int32_t* codes, float* distances) const {
    const int d = D ? D : d_;
    float* least = static_cast<float*>(work);  // [blocks][points][16]
    float* shifted = least + blocks_ * kTilePoints * kRow;
    float* scratch = shifted + kTilePoints * kMaxDimension;
    const float largest = shifted_points(points, count, shifted);
    float tolerance = rounding(largest);
    if (kHasTiles && d > kPairDimension) {
        tile_scores(shifted, count, scratch, least);
        const float reach = largest * __builtin_sqrtf(static_cast<float>(d)) + norm_;
        tolerance = (tolerance + 0x1p-15f * reach * norm_) * scale_ * scale_;
    } else {
        scores<D>(shifted, count, least);
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
    alignas(64) float bounds[kRow], minima[kRow], squared[kRow * kRow];
    least_over_blocks(least, bounds);
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
        compare_groups<D>(points + p * d, least + p * kRow, bounds[p] + tolerance, codes + p, distances + p);
    }
}

// The nearest codeword of a point among the groups whose least score is at most `bound`.
template <int D>
inline void Codebook::compare_groups(const float* x, const float* least, float bound, int32_t* code,
                                     float* distance) const {
    *code = 0, *distance = kInfinity;
    for (int64_t b = 0; b < blocks_; ++b)
        for (uint32_t close = at_most(least + b * kTilePoints * kRow, bound); close; close &= close - 1)
            in_group<D>(x, b, __builtin_ctz(close), code, distance);
}

// minima [16] <- the least scores of 16 points over all groups.
inline void Codebook::least_over_blocks(const float* least, float* minima) const {
    alignas(64) float overall[kRow * kRow];
    if (blocks_ > 1)
        for (int i = 0; i < kRow * kRow; i += kLanes) {
            Vec lowest = load(least + i);
            for (int64_t b = 1; b < blocks_; ++b) lowest = min(load(least + b * kTilePoints * kRow + i), lowest);
            store(overall + i, lowest);
        }
    row_minima(blocks_ > 1 ? overall : least, minima);
}

// Of a score of a point whose coordinates, shifted, are at most `largest`, twice: products of norms times units in the
// last place.
inline float Codebook::rounding(float largest) const {
    return (d_ + 4) * 0x1p-22f * (largest * __builtin_sqrtf(static_cast<float>(d_)) + norm_) * norm_;
}

}  // namespace QNK_ISA
}  // namespace qnk

#include "cpu/nearest_pairs.h"
#include "cpu/nearest_scores.h"
