// Both gradients of pq_linear, without the dense weight or its gradient.
//
// For a block and a vector of tokens, the rows of grad are added up by codeword: H [k][lanes]. Then
//   grad_x = H^T . codebook (k * d multiply-adds per token), grad_codebook += H . x (as many).
// Per block, output and vector of tokens one addition of a row to H, which stays in the first-level cache for k = 256.
// With more codewords than outputs the rows of grad are used as they are.
//
// The codebook's gradient is summed in kChunks parts of the blocks and then in their order: the same on any number of
// threads.
#pragma once

#include "cpu/pq_table.h"

namespace qnk {
inline namespace QNK_ISA {

class Gradients {
  public:
    Gradients(const ProductQuantized& w, bool needs_x, bool needs_codebook, bool mean)
        : w_(w), needs_x_(needs_x), needs_codebook_(needs_codebook), mean_(mean), padded_((w.d + 7) / 8 * 8) {}

    // grad [m, n], x [m, columns] -> grad_x [m, columns], grad_codebook [k, d]; null where not needed.
    template <typename T>
    int compute(const T* grad, const T* x, T* grad_x, float* grad_codebook, int64_t m) const {
        const int64_t columns = w_.columns(), rows = by_codeword() ? w_.k : 0;
        const int64_t chunks = w_.blocks < kChunks ? w_.blocks : kChunks;
        const int threads = max_threads();
        const Buffer<float> grads(w_.n * kLanes), tokens(needs_codebook_ ? kLanes * w_.blocks * padded_ : 0);
        const PerThread<float> sums(threads, rows * kLanes);
        const Buffer<float> x_out(needs_x_ ? columns * kLanes : 0);
        const int64_t partial = needs_codebook_ ? w_.k * padded_ : 0;
        const Buffer<float> partials(chunks * partial);
        const Buffer<int64_t> counts(chunks * (mean_ ? w_.k : 0));
        if (!grads || !tokens || !sums || !x_out || !partials || !counts) return QNK_NO_MEMORY;
        for (int64_t i = 0; i < chunks * partial; ++i) partials.get()[i] = 0.0f;
        for (int64_t first = 0; first < m; first += kLanes) {
            const int64_t count = m - first < kLanes ? m - first : kLanes;
            parallel_for(w_.n, 256, [&](int64_t begin, int64_t end) {
                for (int64_t o = begin; o < end; ++o)
                    for (int64_t t = 0; t < kLanes; ++t)
                        grads.get()[o * kLanes + t] = t < count ? to_float(grad[(first + t) * w_.n + o]) : 0.0f;
            });
            parallel(chunks, [&](int thread, int team) {
                float* table = sums.of(thread);
                for (int64_t chunk = chunks * thread / team; chunk < chunks * (thread + 1) / team; ++chunk)
                    for (int64_t b = w_.blocks * chunk / chunks; b < w_.blocks * (chunk + 1) / chunks; ++b) {
                        float* block_tokens = tokens.get() + b * kLanes * padded_;
                        if (needs_codebook_) take_tokens(x + first * columns + b * w_.d, count, block_tokens);
                        add_block(b, grads.get(), table, block_tokens, x_out.get() + b * w_.d * kLanes,
                                  partials.get() + chunk * partial);
                    }
            });
            if (!needs_x_) continue;
            parallel_for(columns, 256, [&](int64_t begin, int64_t end) {
                for (int64_t t = 0; t < count; ++t)
                    for (int64_t c = begin; c < end; ++c)
                        grad_x[(first + t) * columns + c] = from_float<T>(x_out.get()[c * kLanes + t]);
            });
        }
        if (!needs_codebook_) return QNK_OK;
        if (mean_) count_codes(chunks, counts.get());
        for (int64_t c = 0; c < w_.k; ++c) {
            int64_t blocks = 0;
            for (int64_t chunk = 0; mean_ && chunk < chunks; ++chunk) blocks += counts.get()[chunk * w_.k + c];
            const double divisor = blocks > 0 ? static_cast<double>(blocks) : 1.0;
            for (int j = 0; j < w_.d; ++j) {
                double total = 0.0;
                for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partials.get()[chunk * partial + c * padded_ + j];
                grad_codebook[c * w_.d + j] = static_cast<float>(total / divisor);
            }
        }
        return QNK_OK;
    }

  private:
    static constexpr int64_t kChunks = 16;

    bool by_codeword() const { return w_.k <= w_.n; }

    // counts [chunks][k] <- blocks of each codeword
    void count_codes(int64_t chunks, int64_t* counts) const {
        by_code(w_, [&](auto* type) {
            using Code = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin * w_.k; i < end * w_.k; ++i) counts[i] = 0;
                for (int64_t chunk = begin; chunk < end; ++chunk) {
                    const Code* codes = w_.block<Code>(w_.blocks * chunk / chunks);
                    const int64_t number = (w_.blocks * (chunk + 1) / chunks - w_.blocks * chunk / chunks) * w_.n;
                    for (int64_t i = 0; i < number; ++i) ++counts[chunk * w_.k + codes[i]];
                }
            });
        });
    }

    // tokens [lanes][padded d] <- one block of x, zeros past its end
    template <typename T>
    void take_tokens(const T* x, int64_t count, float* tokens) const {
        for (int64_t t = 0; t < kLanes; ++t)
            for (int j = 0; j < padded_; ++j)
                tokens[t * padded_ + j] = t < count && j < w_.d ? to_float(x[t * w_.columns() + j]) : 0.0f;
    }

    void add_block(int64_t b, const float* grads, float* table, const float* tokens, float* x_out, float* partial) const {
        by_code(w_, [&](auto* type) {
            using Code = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            const Code* codes = w_.block<Code>(b);
            if (by_codeword()) {
                for (int64_t i = 0; i < w_.k * kLanes; i += kLanes) store(table + i, splat(0.0f));
                for (int64_t o = 0; o < w_.n; ++o) {
                    float* to = table + static_cast<int64_t>(codes[o]) * kLanes;
                    store(to, load(to) + load(grads + o * kLanes));
                }
                contract(table, w_.k, [](int64_t row) { return row; }, tokens, x_out, partial);
            } else {
                contract(grads, w_.n, [&](int64_t row) { return static_cast<int64_t>(codes[row]); }, tokens, x_out, partial);
            }
        });
    }

    // rows [count][lanes] against the codeword that each row belongs to, and against the tokens
    template <typename Codeword>
    void contract(const float* rows, int64_t count, const Codeword& codeword, const float* tokens, float* x_out,
                  float* partial) const {
        if (needs_x_) {
            switch (w_.d) {
                case 4: to_x<4>(rows, count, codeword, x_out); break;
                case 8: to_x<8>(rows, count, codeword, x_out); break;
                case 16: to_x<16>(rows, count, codeword, x_out); break;
                default: to_x<0>(rows, count, codeword, x_out);
            }
        }
        if (!needs_codebook_) return;
        for (int64_t r = 0; r < count; ++r) {
            float* to = partial + codeword(r) * padded_;
            for (int j = 0; j < padded_; j += 8) to_codeword(rows + r * kLanes, tokens + j, to + j);
        }
    }

    // x_out [d][lanes] <- sum over the rows of codeword * row
    template <int D, typename Codeword>
    void to_x(const float* rows, int64_t count, const Codeword& codeword, float* x_out) const {
        if (D) {
            Vec sum[D ? D : 1];
            for (int j = 0; j < D; ++j) sum[j] = splat(0.0f);
            for (int64_t r = 0; r < count; ++r) {
                const Vec row = load(rows + r * kLanes);
                const float* c = w_.codebook + codeword(r) * D;
                for (int j = 0; j < D; ++j) sum[j] = fma(row, splat(c[j]), sum[j]);
            }
            for (int j = 0; j < D; ++j) store(x_out + j * kLanes, sum[j]);
            return;
        }
        for (int j = 0; j < w_.d; ++j) {
            Vec sum = splat(0.0f);
            for (int64_t r = 0; r < count; ++r)
                sum = fma(load(rows + r * kLanes), splat(w_.codebook[codeword(r) * w_.d + j]), sum);
            store(x_out + j * kLanes, sum);
        }
    }

    // to [8] += row [lanes] . tokens [lanes][padded d], eight coordinates of them
    void to_codeword(const float* row, const float* tokens, float* to) const {
#if defined(__AVX2__)
        __m256 even = _mm256_loadu_ps(to), odd = _mm256_setzero_ps();
        for (int t = 0; t < kLanes; t += 2) {
            even = _mm256_fmadd_ps(_mm256_set1_ps(row[t]), _mm256_loadu_ps(tokens + t * padded_), even);
            odd = _mm256_fmadd_ps(_mm256_set1_ps(row[t + 1]), _mm256_loadu_ps(tokens + (t + 1) * padded_), odd);
        }
        _mm256_storeu_ps(to, _mm256_add_ps(even, odd));
#else
        for (int t = 0; t < kLanes; ++t)
            for (int j = 0; j < 8; ++j) to[j] += row[t] * tokens[t * padded_ + j];
#endif
    }

    const ProductQuantized& w_;
    bool needs_x_, needs_codebook_, mean_;
    int padded_;
};

}  // namespace QNK_ISA
}  // namespace qnk
