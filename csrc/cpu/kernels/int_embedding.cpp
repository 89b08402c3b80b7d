// Rows and columns of a packed integer weight as values, and the gradient of its linear layer in few rows of input.
//
// int_embedding and int_decode: bits / 8 bytes read and one value written per element. int_linear_backward: the codes
// are read once, decoded once, and multiplied m times.
#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/extremes.h"
#include "cpu/int_plain.h"
#include "cpu/kernels.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

// Rows that are asked for ahead: whole ones, and slices, each on a page of its own.
constexpr int64_t kRowsAhead = 4, kSlicesAhead = 16;

// total [n] += sum over rows of factor * row [n]; rows are kColumns apart.
template <int Rows>
void add_scaled(float* total, const float* row, int64_t apart, const float* factor, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        Vec value = load(total + i);
        for (int r = 0; r < Rows; ++r) value = fma(load(row + r * apart + i), splat(factor[r]), value);
        store(total + i, value);
    }
    for (; i < n; ++i)
        for (int r = 0; r < Rows; ++r) total[i] += row[r * apart + i] * factor[r];
}

// grad_x [m, k] = grad [m, n] times the decoded weight, some rows of it at a time.
class TransposedProduct {
  public:
    TransposedProduct(const Packed& w, int64_t m)
        : w_(w), m_(m), strip_(strip(m, w.k)), grad_(m * w.n), totals_(max_threads(), m * strip_) {}

    template <typename T>
    int multiply(const T* grad, T* grad_x) {
        if (!grad_ || !totals_) return QNK_NO_MEMORY;
        widen(grad, m_ * w_.n, grad_.get());
        parallel_for(w_.k, kColumns, [&](int64_t begin, int64_t end, int thread) {
            float* total = totals_.of(thread);
            for (int64_t column = begin; column < end; column += strip_) {
                const int64_t last = column + strip_ < end ? column + strip_ : end, columns = last - column;
                add_rows(column, last, total);
                for (int64_t t = 0; t < m_; ++t)
                    for (int64_t i = 0; i < columns; ++i)
                        grad_x[t * w_.k + column + i] = from_float<T>(total[t * columns + i]);
            }
        });
        return QNK_OK;
    }

  private:
    static constexpr int kRows = 8;
    static constexpr int64_t kColumns = 256;  // decoded values of kRows rows: 8 KiB

    // Columns whose sums for m rows take 128 KiB, or kColumns.
    static int64_t strip(int64_t m, int64_t k) {
        const int64_t fit = 32768 / (m * kColumns + 1) * kColumns, all = (k + kColumns - 1) / kColumns * kColumns;
        return fit < kColumns ? kColumns : fit < all ? fit : all;
    }

    // total [m, last - first] <- the product's columns
    void add_rows(int64_t first, int64_t last, float* total) const {
        const int64_t columns = last - first;
        float decoded[kRows * kColumns];
        for (int64_t i = 0; i < m_ * columns; ++i) total[i] = 0.0f;
        for (int64_t r = 0; r < w_.n; r += kRows) {
            const int rows = w_.n - r < kRows ? static_cast<int>(w_.n - r) : kRows;
            for (int64_t c = first; c < last; c += kColumns) {
                const int64_t stop = c + kColumns < last ? c + kColumns : last;
                const Columns chunk(w_, c, stop);
                for (int j = 0; j < rows; ++j) {
                    if (r + kRows + j < w_.n) prefetch(w_, r + kRows + j, chunk);
                    decode(w_, r + j, chunk, decoded + j * kColumns);
                }
                for (int64_t t = 0; t < m_; ++t) {
                    const float* factor = grad_.get() + t * w_.n + r;
                    float* to = total + t * columns + c - first;
                    if (rows == kRows)
                        add_scaled<kRows>(to, decoded, kColumns, factor, stop - c);
                    else
                        for (int j = 0; j < rows; ++j)
                            add_scaled<1>(to, decoded + j * kColumns, kColumns, factor + j, stop - c);
                }
            }
        }
    }

    const Packed& w_;
    int64_t m_, strip_;
    Buffer<float> grad_;
    PerThread<float> totals_;
};

}  // namespace

int int_linear_backward(const void* grad, int dtype, const uint8_t* weight, const float* scale,
                        const uint8_t* zero_point, void* grad_x, int64_t m, int64_t n, int64_t k, int64_t groups,
                        int bits) {
    const Packed w{weight, scale, zero_point, n, k, groups, bits};
    if (!w.valid()) return QNK_BAD_BITS;
    return by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return TransposedProduct(w, m).multiply(static_cast<const T*>(grad), static_cast<T*>(grad_x));
    });
}

int int_embedding(const int64_t* indices, int64_t count, const uint8_t* weight, const float* scale,
                  const uint8_t* zero_point, void* out, int out_dtype, int64_t rows, int64_t k, int64_t groups,
                  int bits) {
    const Packed w{weight, scale, zero_point, rows, k, groups, bits};
    if (!w.valid()) return QNK_BAD_BITS;
    for (int64_t i = 0; i < count; ++i)
        if (indices[i] < 0 || indices[i] >= rows) return QNK_BAD_INDEX;
    return by_dtype(out_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* to = static_cast<T*>(out);
        const Columns all(w, 0, k);
        parallel_for(count, 16, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                if (i + kRowsAhead < end) prefetch(w, indices[i + kRowsAhead], all);
                decode(w, indices[i], all, to + i * k);
            }
        });
        return static_cast<int>(QNK_OK);
    });
}

int int_decode(const uint8_t* weight, const float* scale, const uint8_t* zero_point, void* out, int out_dtype, int64_t n,
               int64_t k, int64_t groups, int bits, int64_t first, int64_t last) {
    const Packed w{weight, scale, zero_point, n, k, groups, bits};
    if (!w.valid()) return QNK_BAD_BITS;
    return by_dtype(out_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* to = static_cast<T*>(out);
        const Columns columns(w, first, last);
        parallel_for(n, 16, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                if (r + kSlicesAhead < end) prefetch(w, r + kSlicesAhead, columns);
                decode(w, r, columns, to + r * (last - first));
            }
        });
        return static_cast<int>(QNK_OK);
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
