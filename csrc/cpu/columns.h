// Rows of 16 points side by side: each column in 16 lanes.
#pragma once

#include "cpu/rows.h"

namespace qnk {
inline namespace QNK_ISA {

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

}  // namespace QNK_ISA
}  // namespace qnk
