// Product-quantization noise, one pass: blocks of weights are noised together.
//
// Per element of fp32: 4 bytes read, 4 written. A run of blocks is copied (times `factor`) and then, still in cache,
// its noised blocks are overwritten: with 0, with their mean, summed left to right, or with the nearest codeword,
// which is looked up for a tile of noised blocks at a time.
#include <stdlib.h>

#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/nearest.h"
#include "cpu/noise_bits.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace qnk {
inline namespace QNK_ISA {

QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)

namespace {

constexpr int64_t kCached = 4096;  // elements

template <typename In, typename Out>
void copy_scaled(const In* x, Out* y, int64_t count, float factor) {
    const Vec times = splat(factor);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, load(x + i) * times);
    for (; i < count; ++i) y[i] = from_float<Out>(to_float(x[i]) * factor);
}

template <typename In>
float mean(const In* block, int64_t size) {
    float total = to_float(block[0]);
    for (int64_t i = 1; i < size; ++i) total += to_float(block[i]);
    return total / static_cast<float>(size);
}

// In every run of blocks [begin, end), copied (times `factor`) to out: noised(index) for each block to overwrite.
template <typename In, typename Out, typename Noised>
void copy_runs(const In* weight, Out* out, int64_t begin, int64_t end, int64_t size, float factor, Noise& noise,
               const Noised& noised) {
    const int64_t fitting = kCached / size;
    const int64_t step = fitting < 1 ? 1 : fitting < kWord ? fitting : kWord;  // blocks handled while in cache
    for (int64_t first = begin; first < end;) {
        const int64_t word_end = (first / kWord + 1) * kWord;
        const int64_t bound = word_end < end ? word_end : end;
        const int64_t count = first + step < bound ? step : bound - first;
        uint64_t bits = noise.word(first / kWord) >> (first % kWord);
        if (count < kWord) bits &= (uint64_t{1} << count) - 1;
        copy_scaled(weight + first * size, out + first * size, count * size, factor);
        for (; bits; bits &= bits - 1) noised(first + __builtin_ctzll(bits));
        first += count;
    }
}

template <typename In, typename Out>
void apply(const In* weight, Out* out, int64_t n_blocks, int64_t size, int kind, float factor, int32_t threshold,
           const int64_t* seed) {
    parallel_for(n_blocks, kWord, [&](int64_t begin, int64_t end) {
        Noise noise(seed, threshold);
        copy_runs(weight, out, begin, end, size, factor, noise, [&](int64_t block) {
            const int64_t at = block * size;
            const Out value = from_float<Out>(kind == QNK_MEAN ? mean(weight + at, size) : 0.0f);
            for (int64_t i = 0; i < size; ++i) out[at + i] = value;
        });
    });
}

// Noised blocks that wait until a tile of them can be looked up.
template <typename In, typename Out>
class Pending {
  public:
    Pending(const Codebook& codebook, const float* codewords, int64_t size, void* work)
        : codebook_(codebook), codewords_(codewords), size_(size), work_(work) {}

    void add(const In* block, Out* to) {
        for (int64_t i = 0; i < size_; ++i) points_[count_ * size_ + i] = to_float(block[i]);
        to_[count_] = to;
        if (++count_ == kTilePoints) flush();
    }

    void flush() {
        int32_t codes[kTilePoints];
        float distances[kTilePoints];
        codebook_.nearest(points_, count_, work_, codes, distances);
        for (int p = 0; p < count_; ++p)
            for (int64_t i = 0; i < size_; ++i) to_[p][i] = from_float<Out>(codewords_[codes[p] * size_ + i]);
        count_ = 0;
    }

  private:
    const Codebook& codebook_;
    const float* codewords_;
    int64_t size_;
    void* work_;
    int count_ = 0;
    float points_[kTilePoints * kMaxDimension];
    Out* to_[kTilePoints];
};

template <typename In, typename Out>
int apply_codewords(const In* weight, Out* out, int64_t n_blocks, int64_t size, const float* codewords, int64_t k,
                    int32_t threshold, const int64_t* seed) {
    Codebook codebook;
    float sample[kSample * kMaxDimension];
    const int sampled = sample_of(weight, n_blocks, size, sample);
    if (!codebook.prepare(codewords, k, static_cast<int>(size), sample, sampled)) return QNK_NO_MEMORY;
    bool no_memory = false;
    parallel_for(n_blocks, kWord, [&](int64_t begin, int64_t end) {
        void* work = aligned_alloc(64, static_cast<size_t>(codebook.work_bytes()));
        if (!work) {
            no_memory = true;
            return;
        }
        const Tiles scope;
        Noise noise(seed, threshold);
        Pending<In, Out> pending(codebook, codewords, size, work);
        copy_runs(weight, out, begin, end, size, 1.0f, noise,
                  [&](int64_t block) { pending.add(weight + block * size, out + block * size); });
        pending.flush();
        free(work);
    });
    return no_memory ? QNK_NO_MEMORY : QNK_OK;
}

}  // namespace

int block_noise(const void* weight, int weight_dtype, void* out, int out_dtype, int64_t n_blocks,
                int64_t block_size, int kind, float factor, int32_t threshold, const int64_t* seed) {
    return by_dtypes(weight_dtype, out_dtype, [&](auto* in, auto* to) {
        using In = std::remove_pointer_t<decltype(in)>;
        using Out = std::remove_pointer_t<decltype(to)>;
        apply(static_cast<const In*>(weight), static_cast<Out*>(out), n_blocks, block_size, kind, factor, threshold,
              seed);
        return QNK_OK;
    });
}

int block_noise_centroid(const void* weight, int weight_dtype, void* out, int out_dtype, int64_t n_blocks,
                         int64_t block_size, const float* codebook, int64_t k, int32_t threshold,
                         const int64_t* seed) {
    return by_dtypes(weight_dtype, out_dtype, [&](auto* in, auto* to) {
        using In = std::remove_pointer_t<decltype(in)>;
        using Out = std::remove_pointer_t<decltype(to)>;
        return apply_codewords(static_cast<const In*>(weight), static_cast<Out*>(out), n_blocks, block_size, codebook, k,
                               threshold, seed);
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
