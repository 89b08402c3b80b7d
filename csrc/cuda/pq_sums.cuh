// Sums by codeword in fixed point, which are the same in any order of their terms.
//
// A sum of 64 bits in shared memory is two words, each with a native atomic addition (one of 64 bits is a loop of
// compare and swap); the old value of the low word tells whether it carries. Tables that do not fit shared memory are
// added to in global memory.
#pragma once

#include "cuda/pq_codewords.cuh"

namespace qnk {

inline int sums_in_shared(const PqWeight& w, int other_bytes) {
    const int64_t bytes = static_cast<int64_t>(w.k) * (2 * w.d + 1) * 4;
    return bytes + other_bytes <= kSharedBytes ? static_cast<int>(bytes) : 0;
}

class CodewordSums {
  public:
    // shared: sums_in_shared bytes, or null
    __device__ CodewordSums(const PqWeight& w, const PqSums& to, uint32_t* shared)
        : to_(to), low_(shared), k_(w.k), d_(w.d) {
        scale_ = __longlong_as_double((static_cast<long long>(*to.exponent) + 1023) << 52);
        if (!shared) return;
        for (int i = threadIdx.x; i < k_ * (2 * d_ + 1); i += blockDim.x) shared[i] = 0;
        __syncthreads();
    }

    // Element `within` of a block of `code`: += term, exactly rounded to a multiple of 2^-exponent.
    __device__ __forceinline__ void add(int code, int within, float term) const {
        if (code >= k_) return;
        const long long fixed = __double2ll_rn(static_cast<double>(term) * scale_);
        const int at = code * d_ + within;
        if (low_) {
            const uint32_t low = static_cast<uint32_t>(fixed), before = atomicAdd(low_ + at, low);
            const uint32_t carry = before + low < before;
            atomicAdd(low_ + k_ * d_ + at, static_cast<uint32_t>(static_cast<uint64_t>(fixed) >> 32) + carry);
        } else {
            atomicAdd(reinterpret_cast<unsigned long long*>(to_.sums) + at, static_cast<unsigned long long>(fixed));
        }
        if (within != 0 || !to_.counts) return;
        if (low_)
            atomicAdd(low_ + 2 * k_ * d_ + code, 1u);
        else
            atomicAdd(reinterpret_cast<unsigned long long*>(to_.counts) + code, 1ull);
    }

    // By all threads of the block, once they have added all.
    __device__ void flush() const {
        if (!low_) return;
        __syncthreads();
        const int entries = k_ * d_;
        for (int i = threadIdx.x; i < entries; i += blockDim.x) {
            const uint64_t sum = static_cast<uint64_t>(low_[entries + i]) << 32 | low_[i];
            atomicAdd(reinterpret_cast<unsigned long long*>(to_.sums) + i, static_cast<unsigned long long>(sum));
        }
        for (int i = threadIdx.x; to_.counts && i < k_; i += blockDim.x)
            atomicAdd(reinterpret_cast<unsigned long long*>(to_.counts) + i,
                      static_cast<unsigned long long>(low_[2 * entries + i]));
    }

  private:
    PqSums to_;
    uint32_t* low_;  // [k, d] low words, [k, d] high words, [k] counts
    int k_, d_;
    double scale_;
};

// The terms of `outputs` and of two adjacent columns, the first of them even: d is a multiple of 4, so that they are in
// one block.
template <typename Code, int Count>
__device__ __forceinline__ void scatter(const CodewordSums& sums, const PqWeight& w, int column,
                                        const int (&outputs)[Count], const float (&terms)[Count][2]) {
    if (column >= w.columns()) return;
    const int block = column / w.d, within = column - block * w.d;
    const Code* codes = static_cast<const Code*>(w.codes) + static_cast<int64_t>(block) * w.n;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        if (outputs[i] >= w.n) continue;
        const int code = codes[outputs[i]];
        sums.add(code, within, terms[i][0]);
        sums.add(code, within + 1, terms[i][1]);
    }
}

}  // namespace qnk
