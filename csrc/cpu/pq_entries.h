// pq_linear of a token or two: for each block the products of all codewords with its coordinates, and then one of them,
// looked up, per code.
//
// Per block and token k * d multiply-adds for its table, 4 k bytes, and n additions, each with a load of the code and one
// of the entry; a vector of tokens (pq_table.h) takes two to four times as long as one addition, for any number of them.
#pragma once

#include <string.h>

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/pq.h"
#include "cpu/vec.h"

#if defined(__clang__)
#define QNK_SUMS_APART
#else
#define QNK_SUMS_APART __attribute__((optimize("no-tree-slp-vectorize")))
#endif

namespace qnk {
inline namespace QNK_ISA {

class EntryProduct {
  public:
    explicit EntryProduct(const ProductQuantized& w)
        : w_(w), stride_((w.k + kLanes - 1) / kLanes * kLanes), threads_(max_threads()),
          parts_(threads_ < w.blocks ? threads_ : w.blocks), transposed_(w.d * stride_), token_(w.columns()),
          tables_(threads_, kTogether * stride_), sums_(parts_, w.n) {}

    // y [m, n] <- x [m, columns] . W^T + bias
    template <typename T>
    int multiply(const T* x, const float* bias, T* y, int64_t m) const {
        if (!transposed_ || !token_ || !tables_ || !sums_) return QNK_NO_MEMORY;
        for (int64_t c = 0; c < stride_; ++c)
            for (int j = 0; j < w_.d; ++j)
                transposed_.get()[j * stride_ + c] = c < w_.k ? w_.codebook[c * w_.d + j] : 0.0f;
        for (int64_t t = 0; t < m; ++t) {
            widen(x + t * w_.columns(), w_.columns(), token_.get());
            // threads share the blocks; their sums are added in order
            parallel(parts_, [&](int thread, int team) {
                for (int64_t part = thread; part < parts_; part += team)
                    add_blocks(w_.blocks * part / parts_, w_.blocks * (part + 1) / parts_, tables_.of(thread),
                               sums_.of(part));
            });
            T* to = y + t * w_.n;
            parallel_for(w_.n, 4096, [&](int64_t begin, int64_t end) {
                for (int64_t o = begin; o < end; ++o) {
                    float sum = sums_.of(0)[o];
                    for (int64_t part = 1; part < parts_; ++part) sum += sums_.of(part)[o];
                    to[o] = from_float<T>(bias ? sum + bias[o] : sum);
                }
            });
        }
        return QNK_OK;
    }

  private:
    static constexpr int kTogether = 6;  // blocks: their codes may all fall into one set of the cache

    // y [n] <- products of blocks first to last.
    void add_blocks(int64_t first, int64_t last, float* tables, float* y) const {
        for (int64_t o = 0; o < w_.n; ++o) y[o] = 0.0f;
        by_code(w_, [&](auto* type) {
            using Code = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            for (int64_t b = first; b < last;) {
                const int64_t count = last - b < kTogether ? 1 : kTogether;
                for (int64_t i = 0; i < count; ++i) fill(token_.get() + (b + i) * w_.d, tables + i * stride_);
                if (count == 1)
                    add<1, Code>(b, tables, y);
                else
                    add<kTogether, Code>(b, tables, y);
                b += count;
            }
        });
    }

    // table [k] <- codewords . x
    void fill(const float* x, float* table) const {
        by_batch(stride_, [&](int64_t c, int, auto size) __attribute__((always_inline)) {
            Vec sum[size];
            each<size>([&](int v) { sum[v] = splat(0.0f); });
            for (int j = 0; j < w_.d; ++j) {
                const Vec coordinate = splat(x[j]);
                const float* from = transposed_.get() + j * stride_ + c;
                each<size>([&](int v) { sum[v] = fma(coordinate, load(from + v * kLanes), sum[v]); });
            }
            each<size>([&](int v) { store(table + c + v * kLanes, sum[v]); });
        });
    }

    // y [n] += entries of the tables of blocks b, b + 1, ... Eight outputs at a time, whose codes are a word or two. (Sums
    // stay apart: vectors of them would be put together entry by entry.)
    template <int Together, typename Code>
    QNK_SUMS_APART __attribute__((noinline)) void add(int64_t b, const float* tables, float* y) const {
        constexpr int kBits = 8 * sizeof(Code), kWords = sizeof(Code), kPerWord = 8 / kWords;
        const Code* codes = w_.block<Code>(b);
        const int64_t stride = stride_;
        int64_t o = 0;
        for (; o + 8 <= w_.n; o += 8) {
            float sum[8];
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) sum[j] = y[o + j];
            const float* table = tables;
            const Code* code = codes + o;
            for (int i = 0; i < Together; ++i, table += stride, code += w_.n) {
                __asm__("" : "+r"(table));  // one register, to which no index is added
                uint64_t words[kWords];
                memcpy(words, code, sizeof words);
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j)
                    sum[j] += table[words[j / kPerWord] >> (kBits * (j % kPerWord)) & ((uint64_t{1} << kBits) - 1)];
            }
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) y[o + j] = sum[j];
        }
        for (; o < w_.n; ++o)
            for (int i = 0; i < Together; ++i) y[o] += tables[i * stride_ + codes[i * w_.n + o]];
    }

    const ProductQuantized& w_;
    int64_t stride_;  // of tables: k in whole vectors
    int threads_;
    int64_t parts_;
    Buffer<float> transposed_;  // codebook [d][stride]
    Buffer<float> token_;
    PerThread<float> tables_, sums_;
};

}  // namespace QNK_ISA
}  // namespace qnk
