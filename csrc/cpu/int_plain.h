// Products with packed integer weights on any instruction set: the weight is decoded into cache, to fp32, or, for
// activations in 8 bits, to levels q - z in 16 bits, whose sums are exact.
//
// With AVX2, per 8 weights 6 instructions to decode and one a token; of levels, per 16 weights 3 and two a token.
#pragma once

#include <string.h>

#include "cpu/dot_tiles.h"
#include "cpu/int_decode.h"
#include "cpu/int_levels.h"
#include "cpu/parallel.h"
#include "qnkernels.h"

namespace qnk {
inline namespace QNK_ISA {

constexpr int64_t kBlockTokens = 256;
constexpr int64_t kBlockBytes = 2048;  // of decoded columns of a row, of which 16 rows fill the first-level cache
constexpr int64_t kSkew = 16;          // elements: rows of a power of two would share few sets of the cache

// Rows of the weight that are decoded together.
inline int64_t block_rows(int64_t tokens) { return tokens <= kTileTokens ? kTileRows : 16; }

// y [tokens, n], columns o to o + rows, from sums [tokens][rows]; those of token t times unit[t], null: 1.
template <typename T>
void put_block(const float* sums, int64_t apart, int64_t tokens, int64_t rows, const float* unit, const float* bias, T* y,
               int64_t n) {
    for (int64_t t = 0; t < tokens; ++t) {
        const Vec by_token = splat(unit ? unit[t] : 1.0f);
        by_batch(rows, [&](int64_t r, int lanes, auto size) {
            each<size>([&](int v) {
                const int64_t at = r + v * kLanes;
                Vec value = load_first(sums + t * apart + at, lanes) * by_token;
                if (bias) value = value + load_first(bias + at, lanes);
                store_first(y + t * n + at, value, lanes);
            });
        });
    }
}

// Asks for what is decoded after `columns` columns from c on of rows o to o + count: the next ones, or the next rows.
inline void prefetch_after(const Packed& w, int64_t o, int64_t count, int64_t c, int64_t columns) {
    const bool more = c + columns < w.k;
    const int64_t begin = more ? c + columns : 0, stop = begin + columns < w.k ? begin + columns : w.k;
    if (!more) o += count;
    for (int64_t r = o; r < o + count && r < w.n; ++r) prefetch(w, r, Columns(w, begin, stop));
}

// y [m, n] = x [m, k] times the decoded weight, in fp32.
class DecodedProduct {
  public:
    explicit DecodedProduct(const Packed& w) : w_(w), stride_((w.k + kColumns - 1) / kColumns * kColumns + kSkew) {}

    template <typename T>
    int multiply(const T* x, const float* bias, T* y, int64_t m) const {
        const int64_t block = block_rows(m), tokens = m < kBlockTokens ? m : kBlockTokens;
        const int threads = max_threads();
        const Buffer<float> rows(m * stride_);
        const PerThread<float> decoded(threads, block * kWidth), sums(threads, tokens * block);
        if (!rows || !decoded || !sums) return QNK_NO_MEMORY;
        parallel_for(m, (16384 + w_.k) / (w_.k + 1), [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
                float* row = rows.get() + t * stride_;
                widen(x + t * w_.k, w_.k, row);
                memset(row + w_.k, 0, static_cast<size_t>(stride_ - w_.k) * sizeof(float));
            }
        });
        parallel_for(w_.n, 16, [&](int64_t begin, int64_t end, int thread) {
            float *work = decoded.of(thread), *sum = sums.of(thread);
            for (int64_t t = 0; t < m; t += tokens) {
                const int64_t here = m - t < tokens ? m - t : tokens;
                for (int64_t o = begin; o < end; o += block) {
                    const int64_t count = end - o < block ? end - o : block;
                    add_blocks(rows.get() + t * stride_, here, o, count, block, work, sum);
                    put_block(sum, block, here, count, nullptr, bias ? bias + o : nullptr, y + t * w_.n + o, w_.n);
                }
            }
        });
        return QNK_OK;
    }

  private:
    static constexpr int64_t kColumns = kBlockBytes / 4, kWidth = kColumns + kSkew;

    // sums [tokens][block] <- those of rows o to o + count.
    void add_blocks(const float* x, int64_t tokens, int64_t o, int64_t count, int64_t block, float* work, float* sums) const {
        const int64_t rows = (count + kTileRows - 1) / kTileRows * kTileRows;
        memset(sums, 0, static_cast<size_t>(tokens * block) * sizeof(float));
        for (int64_t c = 0; c < w_.k; c += kColumns) {
            const int64_t stop = c + kColumns < w_.k ? c + kColumns : w_.k;
            const int64_t columns = (stop - c + kLanes - 1) / kLanes * kLanes;
            const Columns part(w_, c, stop);
            prefetch_after(w_, o, count, c, kColumns);
            for (int64_t r = 0; r < rows; ++r) {
                float* row = work + r * kWidth;
                if (r < count) decode(w_, o + r, part, row);
                for (int64_t i = r < count ? stop - c : 0; i < columns; ++i) row[i] = 0.0f;
            }
            dot_block(x + c, stride_, tokens, work, kWidth, rows, columns, sums, block);
        }
    }

    const Packed& w_;
    int64_t stride_;  // of rows of x in fp32
};

// The same over 8-bit codes of x, less their zero points: exact sums in 32-bit integers, of a segment at a time.
class LevelProduct {
  public:
    explicit LevelProduct(const Packed& w) : w_(w), stride_((w.k + kSkew - 1) / kSkew * kSkew + kSkew) {}

    template <typename T>
    int multiply(const T* x, const float* x_scale, const float* x_zero_point, const float* bias, T* y, int64_t m) const {
        const int64_t block = block_rows(m), tokens = m < kBlockTokens ? m : kBlockTokens;
        const int threads = max_threads();
        const Buffer<int16_t> levels(m * stride_ + kSkew);
        const Buffer<float> scales(m);
        const PerThread<int16_t> decoded(threads, block * kWidth);
        const PerThread<int32_t> exact(threads, tokens * block);
        const PerThread<float> sums(threads, tokens * block);
        if (!levels || !decoded || !exact || !scales || !sums) return QNK_NO_MEMORY;
        parallel_for(m, (16384 + w_.k) / (w_.k + 1), [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t)
                scales.get()[t] = quantize_levels(x + t * w_.k, w_.k, x_scale, x_zero_point, levels.get() + t * stride_);
        });
        parallel_for(w_.n, 16, [&](int64_t begin, int64_t end, int thread) {
            const Work work{decoded.of(thread), exact.of(thread), sums.of(thread)};
            for (int64_t t = 0; t < m; t += tokens) {
                const int64_t here = m - t < tokens ? m - t : tokens;
                for (int64_t o = begin; o < end; o += block) {
                    const int64_t count = end - o < block ? end - o : block;
                    add_segments(levels.get() + t * stride_, here, o, count, block, work);
                    put_block(work.sums, block, here, count, scales.get() + t, bias ? bias + o : nullptr,
                              y + t * w_.n + o, w_.n);
                }
            }
        });
        return QNK_OK;
    }

  private:
    static constexpr int64_t kColumns = kBlockBytes / 2, kWidth = kColumns + kSkew;
    static_assert(kExactColumns % kColumns == 0);

    // Of a thread.
    struct Work {
        int16_t* decoded;  // [block][kWidth]
        int32_t* exact;    // [tokens][block], of a segment
        float* sums;       // [tokens][block]
    };

    void add_segments(const int16_t* x, int64_t tokens, int64_t o, int64_t count, int64_t block, const Work& work) const {
        const int64_t rows = (count + kTileRows - 1) / kTileRows * kTileRows, size = w_.group_size();
        memset(work.sums, 0, static_cast<size_t>(tokens * block) * sizeof(float));
        for (int64_t g = 0; g < w_.groups; ++g)
            for (int64_t begin = g * size, end = begin + size; begin < end; begin += kExactColumns) {
                const int64_t stop = begin + kExactColumns < end ? begin + kExactColumns : end;
                memset(work.exact, 0, static_cast<size_t>(tokens * block) * sizeof(int32_t));
                for (int64_t c = begin; c < stop; c += kColumns)
                    add_block(x + c, tokens, o, count, rows, block, g, c, stop - c < kColumns ? stop - c : kColumns, work);
                for (int64_t r = 0; r < count; ++r) {
                    const float scale = w_.scale[(o + r) * w_.groups + g];
                    for (int64_t t = 0; t < tokens; ++t) {
                        const int64_t at = t * block + r;
                        work.sums[at] = work.sums[at] + static_cast<float>(work.exact[at]) * scale;
                    }
                }
            }
    }

    void add_block(const int16_t* x, int64_t tokens, int64_t o, int64_t count, int64_t rows, int64_t block, int64_t g,
                   int64_t first, int64_t columns, const Work& work) const {
        const int64_t whole = (columns + kSkew - 1) / kSkew * kSkew;
        prefetch_after(w_, o, count, first, kColumns);
        for (int64_t r = 0; r < rows; ++r) {
            int16_t* row = work.decoded + r * kWidth;
            if (r < count) decode_levels(w_, o + r, g, first, columns, row);
            for (int64_t i = r < count ? columns : 0; i < whole; ++i) row[i] = 0;
        }
        dot_block(x, stride_, tokens, work.decoded, kWidth, rows, whole, work.exact, block);
    }

    const Packed& w_;
    int64_t stride_;  // of rows of levels
};

}  // namespace QNK_ISA
}  // namespace qnk
