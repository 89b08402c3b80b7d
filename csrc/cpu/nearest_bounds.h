// The nearest centroid of points whose nearest one of the step before is known, without a look at most of the others
// (Yinyang k-means: Ding et al., 2015).
//
// Centroids are in groups of near ones. A point keeps one lower bound for each group, of its distance to the centroids of
// the group but its own. What the farthest moving one of a group has travelled since then lowers the bound; as long as it
// is above the distance to the point's own centroid, none of the group can be nearer. Bounds are 16-bit integers of a
// given unit, with all that the group ever travelled added when they were taken: a step compares them to
// (distance + travelled), and writes only those it takes anew. Each rounding is to the safe side.
//
// Points that need a look at a group are looked up together, 16 side by side: a score |c|^2 / 2 - x.c for each of its
// centroids, the least and the second least kept. Where these leave a doubt about the nearest (most often as it changes),
// the distances to all of the group are taken as nearest.h takes them: the codes and distances are the same to the bit.
//
// Per point: the distance to its own centroid, a comparison of the bounds, and d + 3 instructions per 16 centroids of the
// groups looked at, 1 to 7 of 16.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "cpu/columns.h"
#include "cpu/group_lists.h"
#include "cpu/nearest.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int kTogether = 4;  // centroids scored together
constexpr float kBoundTop = 65535.0f;
constexpr float kBoundSlack = 0x1p-16f;  // more than the relative rounding of a distance, d <= 64

class BoundedCodebook {
  public:
    BoundedCodebook() = default;
    BoundedCodebook(const BoundedCodebook&) = delete;
    BoundedCodebook& operator=(const BoundedCodebook&) = delete;
    ~BoundedCodebook() { free(memory_); }

    // centroids [k, d] that stay; group_of [k] in [0, groups), groups a multiple of 16; travelled [groups] and unit as
    // bounds are kept. false without memory.
    bool prepare(const float* centroids, int64_t k, int d, const int32_t* group_of, int64_t groups, const float* travelled,
                 float unit);

    int64_t work_bytes() const { return (2 * kListSize + 4) * groups_ + 4 * (padded_ + groups_ * kRow); }

    // codes, bounds [count, groups] of points [count, d], count <= kBoundTile, as before and after the step; distances
    // [count] <- squared. work: work_bytes(). Returns how many groups were looked at.
    int64_t nearest(const float* points, int count, void* work, int32_t* codes, uint16_t* bounds, float* distances) const {
        switch (d_) {
            case 4: return nearest_of<4>(points, count, work, codes, bounds, distances);
            case 8: return nearest_of<8>(points, count, work, codes, bounds, distances);
            case 16: return nearest_of<16>(points, count, work, codes, bounds, distances);
            default: return nearest_of<0>(points, count, work, codes, bounds, distances);
        }
    }

  private:
    struct Point {
        const float* x;
        int32_t* code;
        float* distance;
        uint16_t* bounds;
    };

    template <int D>
    int64_t nearest_of(const float* points, int count, void* work, int32_t* codes, uint16_t* bounds, float* distances) const;
    template <int D>
    void own_distances(const float* points, int count, const int32_t* codes, float* distances) const;
    template <int D>
    void least_scores(const float* x, int64_t group, Vec* first, Vec* second) const;
    template <int D>
    void look(const float* points, const uint16_t* list, int count, int64_t group, int32_t* codes, uint16_t* bounds,
              float* distances, float* squared) const;
    void compare(const Point& point, int64_t group, float* squared) const;
    template <int D>
    void start(const float* points, int count, int32_t* codes, uint16_t* bounds, float* distances, float* work) const;
    template <int D>
    Vec least_squared(const float* x, int v, Vec score) const;
    Vec bound_of(Vec squared, int64_t group) const {
        const Vec bound = sqrt(max(squared, splat(0.0f))) * splat(low_scale_) + splat(low_[group]);
        return min(max(bound, splat(0.0f)), splat(kBoundTop));
    }
    float least_of(const float* squared) const {
        Vec least = load(squared);
        for (int64_t t = kLanes; t < padded_; t += kLanes) least = min(least, load(squared + t));
        return min_of(least);
    }
    int64_t place_of(const float* squared, float value) const {
        for (int64_t t = 0; t < padded_; t += kRow)
            if (const uint32_t bits = at_most(squared + t, value)) return t + __builtin_ctz(bits);
        return -1;
    }
    uint16_t bound_of(float squared, int64_t group) const {
        const float bound = __builtin_sqrtf(squared) * low_scale_ + low_[group];
        return static_cast<uint16_t>(bound > 0.0f ? bound < kBoundTop ? bound : kBoundTop : 0.0f);
    }

    int64_t k_ = 0, groups_ = 0, size_ = 0, padded_ = 0;  // size_, padded_: slots of a group, in steps of 4 and of 16
    int d_ = 0;
    float low_scale_ = 0.0f, high_scale_ = 0.0f;  // units of a distance, rounded to either side
    float norm_error_ = 0.0f, point_error_ = 0.0f;
    float shift_[kMaxDimension] = {};  // the mean centroid
    void* memory_ = nullptr;
    float* rows_ = nullptr;     // [groups][size][1 + d]: half a squared norm and -c, less the shift; infinity where none
    float* columns_ = nullptr;  // [groups][d][padded]: the centroids themselves; infinity where none
    float* low_ = nullptr;      // [groups]: units travelled, rounded down
    int32_t* index_ = nullptr;  // [groups][size]: number of the centroid, ascending
    int32_t* count_ = nullptr;  // [groups]
    uint16_t* high_ = nullptr;  // [groups]: units travelled, rounded up
    const float* centroids_ = nullptr;
    const int32_t* group_of_ = nullptr;
};

inline bool BoundedCodebook::prepare(const float* centroids, int64_t k, int d, const int32_t* group_of, int64_t groups,
                                     const float* travelled, float unit) {
    k_ = k, d_ = d, groups_ = groups, centroids_ = centroids, group_of_ = group_of;
    low_scale_ = (1.0f - kBoundSlack) / unit, high_scale_ = (1.0f + kBoundSlack) / unit;
    int32_t* counts = static_cast<int32_t*>(calloc(static_cast<size_t>(groups), sizeof(int32_t)));
    if (!counts) return false;
    int64_t largest = 1;
    for (int64_t i = 0; i < k; ++i) {
        const int64_t count = ++counts[group_of[i]];
        largest = count > largest ? count : largest;
    }
    free(counts);
    size_ = (largest + kTogether - 1) / kTogether * kTogether, padded_ = (largest + kRow - 1) / kRow * kRow;
    const int64_t row_floats = groups * size_ * (1 + d), column_floats = groups * d * padded_;
    const int64_t bytes = 4 * (row_floats + column_floats + groups + groups * size_ + groups) + 2 * groups;
    memory_ = aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
    if (!memory_) return false;
    columns_ = static_cast<float*>(memory_);
    rows_ = columns_ + column_floats;
    low_ = rows_ + row_floats;
    index_ = reinterpret_cast<int32_t*>(low_ + groups);
    count_ = index_ + groups * size_;
    high_ = reinterpret_cast<uint16_t*>(count_ + groups);

    for (int64_t g = 0; g < groups; ++g) {
        const float units = travelled[g] / unit;
        low_[g] = units * (1.0f - kBoundSlack) - 1.0f;
        const float up = units * (1.0f + kBoundSlack) + 2.0f;
        high_[g] = static_cast<uint16_t>(up < kBoundTop ? up : kBoundTop);
        count_[g] = 0;
    }
    double mean[kMaxDimension] = {};
    for (int64_t i = 0; i < k; ++i)
        for (int j = 0; j < d; ++j) mean[j] += centroids[i * d + j];
    for (int j = 0; j < d; ++j) shift_[j] = static_cast<float>(mean[j] / static_cast<double>(k));
    for (int64_t i = 0; i < row_floats; ++i) rows_[i] = 0.0f;
    for (int64_t i = 0; i < groups * size_; ++i) rows_[i * (1 + d)] = __builtin_inff();
    for (int64_t i = 0; i < column_floats; ++i) columns_[i] = __builtin_inff();
    double largest_norm = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        const int64_t group = group_of[i], slot = count_[group]++;
        float* row = rows_ + (group * size_ + slot) * (1 + d);
        float* column = columns_ + group * d * padded_ + slot;
        double norm = 0.0;
        for (int j = 0; j < d; ++j) {
            const float c = centroids[i * d + j] - shift_[j];
            norm += static_cast<double>(c) * c;
            row[1 + j] = -c;
            column[j * padded_] = centroids[i * d + j];
        }
        row[0] = static_cast<float>(norm / 2);
        index_[group * size_ + slot] = static_cast<int32_t>(i);
        largest_norm = norm > largest_norm ? norm : largest_norm;
    }
    // Twice a score is off by less than (d + 4) units in the last place of (|x| + |c|) |c|, and that is at most
    // |x|^2 / 2 + 3 |c|^2 / 2; half as much again for |x|^2 itself.
    const auto error = static_cast<float>(d + 4) * 0x1p-21f;
    point_error_ = 1.0f - error, norm_error_ = 3.0f * error * static_cast<float>(largest_norm);
    return true;
}

template <int D>
inline int64_t BoundedCodebook::nearest_of(const float* points, int count, void* work, int32_t* codes, uint16_t* bounds,
                                           float* distances) const {
    float* squared = static_cast<float*>(work);
    int32_t* counts = reinterpret_cast<int32_t*>(squared + padded_ + groups_ * kRow);
    uint16_t* lists = reinterpret_cast<uint16_t*>(counts + groups_);  // [groups][kListSize]
    for (int64_t g = 0; g < groups_; ++g) counts[g] = 0;
    const int64_t d = D ? D : d_;
    int64_t looks = 0;
    alignas(64) float own[kRow] = {};  // units to the point's own centroid, rounded up
    for (int first = 0; first < count; first += kRow) {
        const int together = count - first < kRow ? count - first : kRow;
        bool known = true;
        for (int p = first; p < first + together; ++p) known = known && codes[p] >= 0;
        if (!known) {
            start<D>(points + first * d, together, codes + first, bounds + first * groups_, distances + first, squared);
            looks += together * groups_;
            continue;
        }
        own_distances<D>(points + first * d, together, codes + first, distances + first);
        for (int p = 0; p < together; ++p) own[p] = distances[first + p];
        for (int v = 0; v < kRow; v += kLanes) {
            const Vec units = sqrt(load(own + v)) * splat(high_scale_) + splat(2.0f);
            store(own + v, min(units, splat(kBoundTop)));
        }
        for (int64_t g = 0; g < groups_; g += kRow) {
            uint16_t groups[kRow] = {};
            for (int p = 0; p < together; ++p) {
                const auto units = static_cast<uint16_t>(static_cast<int32_t>(own[p]));
                groups[p] = within(bounds + (first + p) * groups_ + g, high_ + g, units);
            }
            append(groups, first, lists + g * kListSize, counts + g);
        }
    }
    for (int64_t g = 0; g < groups_; ++g) {
        for (int at = 0; at < counts[g]; at += kRow)
            look<D>(points, lists + g * kListSize + at, counts[g] - at < kRow ? counts[g] - at : kRow, g, codes, bounds,
                    distances, squared);
        looks += counts[g];
    }
    return looks;
}

}  // namespace QNK_ISA
}  // namespace qnk

#include "cpu/nearest_looks.h"
