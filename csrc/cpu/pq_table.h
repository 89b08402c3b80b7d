// pq_linear from tables of products: for each block, codeword . x for all codewords and a vector of tokens, and then
// one row of that table, added to the output, per code.
//
// Per block and vector of tokens: k * d multiply-adds for the table, n additions of a row. The outputs of the tokens lie
// in the second-level cache, and pass through the first once for all tables in use together. With tables of four blocks
// (k = 256: 64 KiB) half of the rows come from the second level, too, but the outputs pass half as often as with two.
#pragma once

#include <string.h>

#include "cpu/parallel.h"
#include "cpu/pq.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int64_t kTablesTogether = kLanes == 16 ? 65536 : 32768;  // bytes

// table [k][lanes] <- codeword . x for coordinates [d][lanes] of the tokens.
template <int D>
inline void product_table(const ProductQuantized& w, const float* coordinates, float* table) {
    const int d = D ? D : w.d;
    Vec x[D ? D : 1];
    if (D)
        for (int j = 0; j < D; ++j) x[j] = load(coordinates + j * kLanes);
    const auto products = [&](int64_t c, auto size) {  // of several codewords: each sum waits for itself at every step
        Vec sums[size];
        each<size>([&](int i) { sums[i] = splat(0.0f); });
        for (int j = 0; j < d; ++j) {
            const Vec column = D ? x[D ? j : 0] : load(coordinates + j * kLanes);
            each<size>([&](int i) { sums[i] = fma(splat(w.codebook[(c + i) * d + j]), column, sums[i]); });
        }
        each<size>([&](int i) { store(table + (c + i) * kLanes, sums[i]); });
    };
    int64_t c = 0;
    for (; c + kBatch <= w.k; c += kBatch) products(c, Size<kBatch>());
    for (; c < w.k; ++c) products(c, Size<1>());
}

// y [n][lanes] += rows of the tables [Together][k][lanes] of blocks b, b + 1, ... Eight bytes of codes are read at once: the
// loads are what takes the time.
template <int Together, typename Code>
inline void add_rows(const ProductQuantized& w, int64_t b, const float* tables, float* y) {
    constexpr int kBits = 8 * sizeof(Code), kRun = 8 / sizeof(Code);
    const Code* codes[Together];
    const float* rows[Together];
    for (int i = 0; i < Together; ++i) codes[i] = w.block<Code>(b + i), rows[i] = tables + i * w.k * kLanes;
    const auto add = [&](float* to, const auto& row) {
        Vec sum = load(to);
        for (int i = 0; i < Together; ++i) sum = sum + load(rows[i] + row(i) * kLanes);
        store(to, sum);
    };
    const int64_t n = w.n;
    int64_t o = 0;
    for (; o + kRun <= n; o += kRun) {
        uint64_t words[Together];
        for (int i = 0; i < Together; ++i) memcpy(words + i, codes[i] + o, sizeof(uint64_t));
#pragma GCC unroll 8
        for (int j = 0; j < kRun; ++j)
            add(y + (o + j) * kLanes, [&](int i) { return words[i] >> (kBits * j) & ((uint64_t{1} << kBits) - 1); });
    }
    for (; o < n; ++o) add(y + o * kLanes, [&](int i) { return static_cast<uint64_t>(codes[i][o]); });
}

// y [n][lanes] += products of blocks first to last. coordinates: [columns][lanes]. table: room for 8 * k rows or less.
template <int D, typename Code>
inline void add_blocks(const ProductQuantized& w, int64_t first, int64_t last, const float* coordinates, float* table,
                       int together, float* y) {
    for (int64_t b = first; b < last;) {
        int count = together;
        while (b + count > last) count /= 2;
        for (int i = 0; i < count; ++i)
            product_table<D>(w, coordinates + (b + i) * w.d * kLanes, table + i * w.k * kLanes);
        if (count == 8) add_rows<8, Code>(w, b, table, y);
        if (count == 4) add_rows<4, Code>(w, b, table, y);
        if (count == 2) add_rows<2, Code>(w, b, table, y);
        if (count == 1) add_rows<1, Code>(w, b, table, y);
        b += count;
    }
}

// Blocks whose tables are in use together, a power of two up to 8.
inline int tables_together(const ProductQuantized& w) {
    int together = 1;
    while (together < 8 && 2 * together * w.k * kLanes * 4 <= kTablesTogether) together *= 2;
    return together;
}

// coordinates [first to last of the columns][lanes] <- x [count][columns], count <= lanes; lanes past count are 0. A few
// columns at a time: those of all tokens may fall into one set of the cache.
template <typename T>
inline void transpose_tokens(const T* x, int64_t count, int64_t columns, int64_t first, int64_t last, float* coordinates) {
    constexpr int64_t kRun = 16;
    for (int64_t run = first; run < last; run += kRun) {
        const int64_t end = run + kRun < last ? run + kRun : last;
        for (int t = 0; t < kLanes; ++t)
            for (int64_t c = run; c < end; ++c) coordinates[c * kLanes + t] = t < count ? to_float(x[t * columns + c]) : 0.0f;
    }
}

// y [m, n] <- x [m, columns] . W^T + bias
template <typename T>
inline int multiply_by_tables(const T* x, const ProductQuantized& w, const float* bias, T* y, int64_t m) {
    const int64_t tiles = (m + kLanes - 1) / kLanes;
    const int threads = max_threads();
    // few tokens: the threads share the blocks of a tile, and their sums are added in order
    const int64_t parts = tiles >= threads ? 1 : threads < w.blocks ? threads : w.blocks;
    const int together = tables_together(w);
    const int64_t outputs = w.n * kLanes, table = together * w.k * kLanes, coordinates = w.columns() * kLanes;
    const PerThread<float> sums(parts > 1 ? parts : threads, outputs), work(threads, table);
    const PerThread<float> tokens(parts > 1 ? 1 : threads, coordinates);
    if (!sums || !work || !tokens) return QNK_NO_MEMORY;
    const auto add = [&](int64_t first, int64_t last, const float* from, float* scratch, float* to) {
        for (int64_t i = 0; i < outputs; ++i) to[i] = 0.0f;
        by_code(w, [&](auto* type) {
            using Code = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            switch (w.d) {
                case 4: return add_blocks<4, Code>(w, first, last, from, scratch, together, to);
                case 8: return add_blocks<8, Code>(w, first, last, from, scratch, together, to);
                case 16: return add_blocks<16, Code>(w, first, last, from, scratch, together, to);
                default: return add_blocks<0, Code>(w, first, last, from, scratch, together, to);
            }
        });
    };
    const auto write = [&](int64_t tile, int64_t begin, int64_t end, const auto& from, int64_t count_parts) {
        const int64_t first = tile * kLanes, count = m - first < kLanes ? m - first : kLanes;
        constexpr int64_t kRun = 16;  // outputs of a token that are written in a row
        alignas(64) float lanes[kRun * kLanes];
        for (int64_t run = begin; run < end; run += kRun) {
            const int64_t length = end - run < kRun ? end - run : kRun;
            for (int64_t i = 0; i < length; ++i) {
                Vec sum = load(from(0) + (run + i) * kLanes);
                for (int64_t part = 1; part < count_parts; ++part)
                    sum = sum + load(from(part) + (run + i) * kLanes);
                store(lanes + i * kLanes, sum + splat(bias ? bias[run + i] : 0.0f));
            }
            for (int64_t t = 0; t < count; ++t)
                for (int64_t i = 0; i < length; ++i) y[(first + t) * w.n + run + i] = from_float<T>(lanes[i * kLanes + t]);
        }
    };
    if (parts == 1) {
        parallel(tiles, [&](int thread, int team) {
            float *to = sums.of(thread), *from = tokens.of(thread);
            for (int64_t tile = tiles * thread / team; tile < tiles * (thread + 1) / team; ++tile) {
                const int64_t first = tile * kLanes;
                transpose_tokens(x + first * w.columns(), m - first, w.columns(), 0, w.columns(), from);
                add(0, w.blocks, from, work.of(thread), to);
                write(tile, 0, w.n, [&](int64_t) { return to; }, 1);
            }
        });
        return QNK_OK;
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * kLanes;
        parallel_for(w.columns(), 64, [&](int64_t begin, int64_t end) {
            transpose_tokens(x + first * w.columns(), m - first, w.columns(), begin, end, tokens.of(0));
        });
        parallel(parts, [&](int thread, int team) {
            for (int64_t part = thread; part < parts; part += team)
                add(w.blocks * part / parts, w.blocks * (part + 1) / parts, tokens.of(0), work.of(thread),
                    sums.of(part));
        });
        parallel_for(w.n, 64, [&](int64_t begin, int64_t end) {
            write(tile, begin, end, [&](int64_t part) { return sums.of(part); }, parts);
        });
    }
    return QNK_OK;
}

}  // namespace QNK_ISA
}  // namespace qnk
