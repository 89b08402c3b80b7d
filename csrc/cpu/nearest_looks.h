// What a look of points at a group of centroids is made of; part of nearest_bounds.h.
#pragma once

#include "cpu/nearest_bounds.h"

namespace qnk {
inline namespace QNK_ISA {

// distances [count] <- squared, of up to 16 points to their centroids, in the order of Codebook::distances_in_group.
template <int D>
inline void BoundedCodebook::own_distances(const float* points, int count, const int32_t* codes, float* distances) const {
    const int d = D ? D : d_;
    alignas(64) float columns[kMaxDimension * kRow], sums[kRow];
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
    alignas(64) float x[kMaxDimension * kRow], own[kRow], taken[kRow];
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
    alignas(64) float x[kMaxDimension * kRow], taken[kRow], best_groups[kRow], limits[kRow] = {};
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

}  // namespace QNK_ISA
}  // namespace qnk
