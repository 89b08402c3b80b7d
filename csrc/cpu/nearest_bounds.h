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

#include "cpu/rows.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int kBoundTile = 512;       // points whose groups are found before any is looked at
constexpr int kListSize = kBoundTile + kRow;  // and what is written past the end
constexpr int kTogether = 4;          // centroids scored together
constexpr float kBoundTop = 65535.0f;
constexpr float kBoundSlack = 0x1p-16f;  // more than the relative rounding of a distance, d <= 64
constexpr int kBoundDimension = 64;

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
    float shift_[kBoundDimension] = {};  // the mean centroid
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
    double mean[kBoundDimension] = {};
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

// columns [d][16] <- 16 rows, of which pick.four(p, j) and pick.one(p, j) give the coordinates of point p from j on.
template <typename Pick>
inline void columns_of(int d, const Pick& pick, float* columns) {
    int whole = 0;
#if defined(__AVX2__)
    whole = d / 4 * 4;
    for (int j = 0; j < whole; j += 4)
        for (int q = 0; q < kRow; q += 4) {
            __m128 a = pick.four(q, j), b = pick.four(q + 1, j), c = pick.four(q + 2, j), e = pick.four(q + 3, j);
            _MM_TRANSPOSE4_PS(a, b, c, e);
            float* to = columns + j * kRow + q;
            _mm_store_ps(to, a);
            _mm_store_ps(to + kRow, b);
            _mm_store_ps(to + 2 * kRow, c);
            _mm_store_ps(to + 3 * kRow, e);
        }
#endif
    for (int j = whole; j < d; ++j)
        for (int p = 0; p < kRow; ++p) columns[j * kRow + p] = pick.one(p, j);
}

// Rows of 16 centroids less rows of points.
struct Differences {
    const float* centroids[kRow];
    const float* points[kRow];

#if defined(__AVX2__)
    __m128 four(int p, int j) const { return _mm_sub_ps(_mm_loadu_ps(centroids[p] + j), _mm_loadu_ps(points[p] + j)); }
#endif
    float one(int p, int j) const { return centroids[p][j] - points[p][j]; }
};

// Rows of 16 points less one row.
struct Shifted {
    const float* points[kRow];
    const float* shift;

#if defined(__AVX2__)
    __m128 four(int p, int j) const { return _mm_sub_ps(_mm_loadu_ps(points[p] + j), _mm_loadu_ps(shift + j)); }
#endif
    float one(int p, int j) const { return points[p][j] - shift[j]; }
};

// distances [count] <- squared, of up to 16 points to their centroids, in the order of Codebook::distances_in_group.
template <int D>
inline void BoundedCodebook::own_distances(const float* points, int count, const int32_t* codes, float* distances) const {
    const int d = D ? D : d_;
    alignas(64) float columns[kBoundDimension * kRow], sums[kRow];
    Differences from;
    for (int p = 0; p < kRow; ++p) {
        const int at = p < count ? p : 0;
        from.centroids[p] = centroids_ + codes[at] * static_cast<int64_t>(d);
        from.points[p] = points + at * static_cast<int64_t>(d);
    }
    columns_of(d, from, columns);
    for (int v = 0; v < kRowVecs; ++v) {
        Vec sum = splat(0.0f);
        for (int j = 0; j < d; ++j) {
            const Vec difference = load(columns + j * kRow + v * kLanes);
            sum = fma(difference, difference, sum);
        }
        store(sums + v * kLanes, sum);
    }
    for (int p = 0; p < count; ++p) distances[p] = sums[p];
}

// Bit g is set where group g, of the 16 whose bounds and ways are given, may hold a centroid as near as `own` units: its
// bound is at most own + travelled.
inline uint16_t within(const uint16_t* bounds, const uint16_t* travelled, uint16_t own) {
#if defined(__AVX2__)
    const __m256i way = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(travelled));
    const __m256i limit = _mm256_adds_epu16(_mm256_set1_epi16(static_cast<int16_t>(own)), way);
    const __m256i bound = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bounds));
    const __m256i in = _mm256_cmpeq_epi16(_mm256_max_epu16(bound, limit), limit);
    return static_cast<uint16_t>(_mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(in), _mm256_extracti128_si256(in, 1))));
#else
    uint32_t bits = 0;
    for (int g = 0; g < kRow; ++g) {
        const int limit = own + travelled[g];
        bits |= static_cast<uint32_t>(bounds[g] <= (limit < 65535 ? limit : 65535)) << g;
    }
    return static_cast<uint16_t>(bits);
#endif
}

// The places of the bits set in a byte, in order.
struct Places {
    uint16_t of[256][8];

    constexpr Places() : of() {
        for (int byte = 0; byte < 256; ++byte) {
            int count = 0;
            for (int place = 0; place < 8; ++place)
                if (byte >> place & 1) of[byte][count++] = static_cast<uint16_t>(place);
        }
    }
};

// Points first to first + 15, of which `groups` has a bit for each of 16 groups, go to the lists [16][kListSize] of theirs.
// Without a branch: which groups a point needs is not to be foreseen.
inline void append(const uint16_t* groups, int first, uint16_t* lists, int32_t* counts) {
#if defined(__AVX2__)
    static constexpr Places kPlaces;
    const __m128i from = _mm_set1_epi16(static_cast<int16_t>(first)), eight = _mm_set1_epi16(8);
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(groups));
    for (int g = kRow - 1; g >= 0; --g, bits = _mm256_add_epi16(bits, bits)) {  // bit g is the sign
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        const auto points = static_cast<uint32_t>(_mm_movemask_epi8(bytes));
        const auto places = [&](uint32_t byte) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(kPlaces.of[byte])); };
        uint16_t* to = lists + g * kListSize + counts[g];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi16(places(points & 255u), from));
        to += __builtin_popcount(points & 255u);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi16(places(points >> 8), _mm_add_epi16(from, eight)));
        counts[g] += __builtin_popcount(points);
    }
#else
    for (int p = 0; p < kRow; ++p)
        for (uint32_t near = groups[p]; near; near &= near - 1) {
            const int g = __builtin_ctz(near);
            lists[g * kListSize + counts[g]++] = static_cast<uint16_t>(first + p);
        }
#endif
}

// first, second [kRowVecs] <- the least and second least score of 16 points, columns x [d][16], in a group.
template <int D>
inline void BoundedCodebook::least_scores(const float* x, int64_t group, Vec* first, Vec* second) const {
    const int d = D ? D : d_;
    const float* rows = rows_ + group * size_ * (1 + d);
    for (int v = 0; v < kRowVecs; ++v) first[v] = second[v] = splat(__builtin_inff());
    for (int64_t t = 0; t < count_[group]; t += kTogether) {
        const float* row = rows + t * (1 + d);
        Vec sums[kTogether][kRowVecs];
        for (int i = 0; i < kTogether; ++i)
            for (int v = 0; v < kRowVecs; ++v) sums[i][v] = splat(row[i * (1 + d)]);
        for (int j = 0; j < d; ++j)
            for (int v = 0; v < kRowVecs; ++v) {
                const Vec column = load(x + j * kRow + v * kLanes);
                for (int i = 0; i < kTogether; ++i) sums[i][v] = fma(column, splat(row[i * (1 + d) + 1 + j]), sums[i][v]);
            }
        for (int v = 0; v < kRowVecs; ++v) {
            const Vec low = min(sums[0][v], sums[1][v]), high = max(sums[0][v], sums[1][v]);
            const Vec other_low = min(sums[2][v], sums[3][v]), other_high = max(sums[2][v], sums[3][v]);
            const Vec least = min(low, other_low), next = min(max(low, other_low), min(high, other_high));
            second[v] = min(max(first[v], least), min(second[v], next));
            first[v] = min(first[v], least);
        }
    }
}

// At most the squared distances of points, vector v of columns x [d][16], to centroids of these scores or more.
template <int D>
inline Vec BoundedCodebook::least_squared(const float* x, int v, Vec score) const {
    const int d = D ? D : d_;
    Vec norm = splat(0.0f);
    for (int j = 0; j < d; ++j) {
        const Vec column = load(x + j * kRow + v * kLanes);
        norm = fma(column, column, norm);
    }
    return fma(norm, splat(point_error_), score + score - splat(norm_error_));
}

// A look at a group for up to 16 points of a tile, those that `list` names.
template <int D>
inline void BoundedCodebook::look(const float* points, const uint16_t* list, int count, int64_t group, int32_t* codes,
                                  uint16_t* bounds, float* distances, float* squared) const {
    const int d = D ? D : d_;
    alignas(64) float x[kBoundDimension * kRow], own[kRow], taken[kRow];
    Shifted from;
    from.shift = shift_;
    uint32_t inside = 0;  // points whose own centroid is of this group: its second least score counts
    for (int p = 0; p < kRow; ++p) {
        const int at = list[p < count ? p : 0];
        from.points[p] = points + at * static_cast<int64_t>(d);
        own[p] = distances[at];
        inside |= static_cast<uint32_t>(group_of_[codes[at]] == group) << p;
    }
    columns_of(d, from, x);
    Vec first[kRowVecs], second[kRowVecs];
    least_scores<D>(x, group, first, second);
    uint32_t doubts = 0;
    for (int v = 0; v < kRowVecs; ++v) {
        const Vec least = least_squared<D>(x, v, select(inside, v, second[v], first[v]));
        const Mask clear = less(load(own + v * kLanes) * splat(1.0f + kBoundSlack), least);
        doubts |= (static_cast<uint32_t>(first_lanes(kLanes)) & ~static_cast<uint32_t>(clear)) << (v * kLanes);
        store(taken + v * kLanes, bound_of(least, group));
    }
    for (int p = 0; p < count; ++p) bounds[list[p] * groups_ + group] = static_cast<uint16_t>(static_cast<int32_t>(taken[p]));
    for (doubts &= (1u << count) - 1u; doubts; doubts &= doubts - 1) {
        const int at = list[__builtin_ctz(doubts)];
        compare({points + at * static_cast<int64_t>(d), codes + at, distances + at, bounds + at * groups_}, group, squared);
    }
}

// The distances of a point to all centroids of a group: its code, distance and bounds after them.
inline void BoundedCodebook::compare(const Point& point, int64_t group, float* squared) const {
    const float* columns = columns_ + group * d_ * padded_;
    for (int64_t t = 0; t < padded_; t += kLanes) {
        Vec sum = splat(0.0f);
        for (int j = 0; j < d_; ++j) {
            const Vec difference = load(columns + j * padded_ + t) - splat(point.x[j]);
            sum = fma(difference, difference, sum);
        }
        store(squared + t, sum);
    }
    const float least = least_of(squared);
    const int64_t slot = place_of(squared, least);
    if (slot < 0) {  // not a number
        point.bounds[group] = 0;
        return;
    }
    squared[slot] = __builtin_inff();
    const float next = least_of(squared);
    const int32_t nearest = index_[group * size_ + slot], own = *point.code;
    if (least < *point.distance || (least == *point.distance && nearest < own)) {
        if (own >= 0 && group_of_[own] != group) {
            const uint16_t bound = bound_of(*point.distance, group_of_[own]);
            uint16_t* kept = point.bounds + group_of_[own];
            *kept = bound < *kept ? bound : *kept;
        }
        *point.code = nearest, *point.distance = least;
    }
    point.bounds[group] = bound_of(*point.code == nearest ? next : least, group);
}

// The first step, for up to 16 points of which nothing is known: a look at all groups.
template <int D>
inline void BoundedCodebook::start(const float* points, int count, int32_t* codes, uint16_t* bounds, float* distances,
                                   float* work) const {
    const int d = D ? D : d_;
    alignas(64) float x[kBoundDimension * kRow], taken[kRow], best_groups[kRow], limits[kRow] = {};
    float* least = work;  // [groups][16]
    float* squared = work + groups_ * kRow;
    Shifted from;
    from.shift = shift_;
    for (int p = 0; p < kRow; ++p) from.points[p] = points + (p < count ? p : 0) * static_cast<int64_t>(d);
    columns_of(d, from, x);
    Vec best[kRowVecs], best_group[kRowVecs];
    for (int v = 0; v < kRowVecs; ++v) best[v] = splat(__builtin_inff()), best_group[v] = splat(0.0f);
    for (int64_t g = 0; g < groups_; ++g) {
        Vec first[kRowVecs], second[kRowVecs];
        least_scores<D>(x, g, first, second);
        for (int v = 0; v < kRowVecs; ++v) {
            const Mask better = less(first[v], best[v]);
            best[v] = select(better, first[v], best[v]);
            best_group[v] = select(better, splat(static_cast<float>(g)), best_group[v]);
            const Vec bound = least_squared<D>(x, v, first[v]);
            store(least + g * kRow + v * kLanes, bound);
            store(taken + v * kLanes, bound_of(bound, g));
        }
        for (int p = 0; p < count; ++p) bounds[p * groups_ + g] = static_cast<uint16_t>(static_cast<int32_t>(taken[p]));
    }
    for (int v = 0; v < kRowVecs; ++v) store(best_groups + v * kLanes, best_group[v]);
    const auto look_at = [&](int p, int64_t group) {
        compare({points + p * static_cast<int64_t>(d), codes + p, distances + p, bounds + p * groups_}, group, squared);
    };
    for (int p = 0; p < count; ++p) {
        distances[p] = __builtin_inff();
        look_at(p, static_cast<int64_t>(best_groups[p]));
        limits[p] = distances[p] * (1.0f + kBoundSlack);
        least[static_cast<int64_t>(best_groups[p]) * kRow + p] = __builtin_inff();
    }
    for (int64_t g = 0; g < groups_; ++g)
        for (int v = 0; v < kRowVecs; ++v) {
            const Mask clear = less(load(limits + v * kLanes), load(least + g * kRow + v * kLanes));
            uint32_t doubts = (static_cast<uint32_t>(first_lanes(kLanes)) & ~static_cast<uint32_t>(clear)) << (v * kLanes);
            for (doubts &= (1u << count) - 1u; doubts; doubts &= doubts - 1) look_at(__builtin_ctz(doubts), g);
        }
    for (int p = 0; p < count; ++p) codes[p] = codes[p] < 0 ? 0 : codes[p];  // not a number
}

template <int D>
inline int64_t BoundedCodebook::nearest_of(const float* points, int count, void* work, int32_t* codes, uint16_t* bounds,
                                           float* distances) const {
    float* squared = static_cast<float*>(work);
    int32_t* counts = reinterpret_cast<int32_t*>(squared + padded_ + groups_ * kRow);
    uint16_t* lists = reinterpret_cast<uint16_t*>(counts + groups_);  // [groups][kListSize]
    for (int64_t g = 0; g < groups_; ++g) counts[g] = 0;
    int64_t looks = 0;
    alignas(64) float own[kRow] = {};
    for (int first = 0; first < count; first += kRow) {
        const int together = count - first < kRow ? count - first : kRow;
        bool known = true;
        for (int p = first; p < first + together; ++p) known = known && codes[p] >= 0;
        if (!known) {
            start<D>(points + first * static_cast<int64_t>(D ? D : d_), together, codes + first, bounds + first * groups_,
                     distances + first, squared);
            looks += together * groups_;
            continue;
        }
        own_distances<D>(points + first * static_cast<int64_t>(D ? D : d_), together, codes + first, distances + first);
        for (int p = 0; p < together; ++p) own[p] = distances[first + p];
        for (int v = 0; v < kRow; v += kLanes) store(own + v, min(sqrt(load(own + v)) * splat(high_scale_) + splat(2.0f), splat(kBoundTop)));
        for (int64_t g = 0; g < groups_; g += kRow) {
            uint16_t groups[kRow] = {};
            for (int p = 0; p < together; ++p)
                groups[p] = within(bounds + (first + p) * groups_ + g, high_ + g, static_cast<uint16_t>(static_cast<int32_t>(own[p])));
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
