// Sums of points by code in 64-bit fixed point: integers, so that the order of the points leaves no trace.
//
// A table that fits is kept in shared memory, per block, and added to the totals at the end. Shared memory has no atomic
// addition of 64 bits (it is a loop of compare-and-swap), so an entry is two words, and the first says when it carries.
#pragma once

#include "cuda/device.h"

namespace qnk {

// round(term * unit), half to even; unit is a power of two.
__device__ __forceinline__ int64_t fixed_point(float term, double unit) {
    return __double2ll_rn(static_cast<double>(term) * unit);
}

// For a warp in which the lanes 4 g to 4 g + 3 have one point.
struct FixedSums {
    int64_t* sums;  // [k, d], the totals
    int64_t* mass;  // [k]
    int64_t k;
    int d;
    double unit, weight_unit;
    uint32_t* low;   // [k * (d + 1)] in shared memory: sums, masses; or null
    uint32_t* high;  // likewise

    __host__ __device__ static int64_t shared_bytes(int64_t k, int64_t d) { return 8 * k * (d + 1); }

    // Takes `memory` [shared_bytes] for this block; all threads, before a barrier.
    __device__ void open(void* memory) {
        const int64_t entries = k * (d + 1);
        low = static_cast<uint32_t*>(memory), high = low + entries;
        for (int64_t i = threadIdx.x; i < 2 * entries; i += blockDim.x) low[i] = 0;
    }

    // Adds what is in shared memory to the totals; all threads, after a barrier.
    __device__ void close() const {
        for (int64_t i = threadIdx.x; i < k * (d + 1); i += blockDim.x) {
            const uint64_t value = static_cast<uint64_t>(high[i]) << 32 | low[i];
            if (value != 0) add_to_total(i, value);
        }
    }

    // weight * point x [d] by the four lanes of a point; weights null: 1.
    __device__ void add_point(const float* x, int64_t code, const float* weight) const {
        const int t = threadIdx.x % 4, pieces = (d + 3) / 4;
        const float factor = weight ? *weight : 1.0f;
        int piece = threadIdx.x / 4 % pieces;  // points begin at different ones, to meet in fewer banks
        for (int i = 0; i < pieces; ++i) {
            const int j = piece * 4 + t;
            if (j < d) add(code * d + j, fixed_point(x[j] * factor, unit));
            piece = piece + 1 == pieces ? 0 : piece + 1;
        }
        if (t == 0) add(k * d + code, weight ? fixed_point(factor, weight_unit) : 1);
    }

  private:
    __device__ void add(int64_t entry, int64_t term) const {
        const auto value = static_cast<uint64_t>(term);
        if (!low) return add_to_total(entry, value);
        const auto lower = static_cast<uint32_t>(value);
        const uint32_t carry = atomicAdd(low + entry, lower) + lower < lower ? 1 : 0;
        const uint32_t upper = static_cast<uint32_t>(value >> 32) + carry;
        if (upper != 0) atomicAdd(high + entry, upper);
    }

    __device__ void add_to_total(int64_t entry, uint64_t value) const {
        int64_t* total = entry < k * d ? sums + entry : mass + (entry - k * d);
        atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(value));
    }
};

}  // namespace qnk
