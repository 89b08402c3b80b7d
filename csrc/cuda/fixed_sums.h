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
    // Where in shared memory the table of the block starts, two arrays uint32_t [k * (d + 1)]: the lower and the upper
    // words of sums and masses. kNoTable: each term goes to the totals.
    int table;

    static constexpr int kNoTable = -1;

    __host__ __device__ static int64_t table_bytes(int64_t k, int64_t d) { return (8 * k * (d + 1) + 15) / 16 * 16; }

    // All threads, before a barrier.
    __device__ void open() const {
        if (table == kNoTable) return;
        for (int i = threadIdx.x; i < 2 * entries(); i += blockDim.x) low()[i] = 0;
    }

    // Adds the table to the totals; all threads, after a barrier.
    __device__ void close() const {
        if (table == kNoTable) return;
        for (int i = threadIdx.x; i < entries(); i += blockDim.x) {
            const uint64_t value = static_cast<uint64_t>(low()[entries() + i]) << 32 | low()[i];
            if (value != 0) add_to_total(i, value);
        }
    }

    // weight * point x [d], by the four lanes of the point; weighted is false: 1.
    __device__ void add_point(const float* x, int code, bool weighted, float weight) const {
        const int t = threadIdx.x % 4, pieces = (d + 3) / 4;
        // points begin with different pieces, to meet in fewer banks
        int piece = threadIdx.x / 4 & (pieces >= 4 ? 3 : pieces >= 2 ? 1 : 0);
#pragma unroll 2
        for (int i = 0; i < pieces; ++i) {
            const int j = piece * 4 + t;
            if (j < d) add(code * d + j, fixed_point(weighted ? x[j] * weight : x[j], unit));
            piece = piece + 1 == pieces ? 0 : piece + 1;
        }
        if (t == 0) add(static_cast<int>(k) * d + code, weighted ? fixed_point(weight, weight_unit) : 1);
    }

  private:
    __device__ int entries() const { return static_cast<int>(k) * (d + 1); }

    // Not a member: the compiler has to see that this is shared memory.
    __device__ uint32_t* low() const {
        QNK_SHARED_MEMORY(memory);
        return reinterpret_cast<uint32_t*>(memory + table);
    }

    __device__ void add(int entry, int64_t term) const {
        const auto value = static_cast<uint64_t>(term);
        if (table == kNoTable) return add_to_total(entry, value);
        const auto lower = static_cast<uint32_t>(value);
        const uint32_t carry = atomicAdd(low() + entry, lower) + lower < lower ? 1 : 0;
        const uint32_t upper = static_cast<uint32_t>(value >> 32) + carry;
        if (upper != 0) atomicAdd(low() + entries() + entry, upper);
    }

    __device__ void add_to_total(int entry, uint64_t value) const {
        const int of_sums = static_cast<int>(k) * d;
        int64_t* total = entry < of_sums ? sums + entry : mass + (entry - of_sums);
        atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(value));
    }
};

}  // namespace qnk
