// The nearest codewords of the points of a warp, exact in fp32: the least sum_j (x_j - c_j)^2, the lowest index of equals.
//
// Tensor cores take scores x'.c' - |c'|^2 / 2 of all codewords (codebook.h), with x' = (x - shift) * scale in two fp16
// halves and c' in one, so that a product of 16 has 8 coordinates, twice. Each lane keeps the greatest score of its 8
// codewords of a section, a group, and over the sections the best two groups. The groups within the error of the best are
// then compared by their distances; where a lane may have more than two, all codewords are.
//
// Of a point and a codeword: D / 8 products of 2048 in 128, half an instruction for the maximum (three operands on sm_90,
// a whole one before), half of one for the group. Of a point: 8 distances, and all of them for one in a hundred or so.
#pragma once

#include "cuda/codebook.h"
#include "cuda/primitives.h"

namespace qnk {

template <int D>
struct Nearest {
    static constexpr int kSteps = D / 8;
    static constexpr int kWarps = D <= 16 ? 16 : D <= 32 ? 12 : 8;  // of a block, at most: what registers there are for
    static constexpr int kTiles = D <= 8 ? 4 : 2;                  // of 16 points, that share the loads of a codeword
    static constexpr int kRows = 16 * kTiles;                      // points of a warp
    static constexpr int kStride = D + 4;                          // floats from row to row: rows meet in no bank
    static constexpr int kTileSections = 16 / kSteps;              // sections scanned in a row: a key has 4 bits for them
    static constexpr int kSlots = 2 * kTiles;                      // rows that a lane has scores of
    static constexpr int16_t kNone = -1, kMany = -2;

    struct alignas(16) Scratch {  // of a warp, in shared memory
        float x[kRows * kStride];
        float tolerance[kRows];
        int16_t group[kRows][4];  // of each lane of a row: a group to compare, or kNone, or kMany
    };

    // Where the codewords are for now.
    struct Rows {
        const float* rows;
        int64_t k;
    };

    // x <- points [count, d], the first row of them at `from`; by 4 coordinates where `pieces`.
    __device__ static void load(const float* from, int count, int d, bool pieces, Scratch& scratch) {
        if (pieces)
            copy_rows(reinterpret_cast<const float4*>(from), count, d / 4, reinterpret_cast<float4*>(scratch.x),
                      kStride / 4);
        else
            copy_rows(from, count, d, scratch.x, kStride);
    }

    // The groups to compare of each row into scratch.group.
    // scan(tile(first section, number of sections, bias, halves)) calls tile for all sections, kTileSections at a time.
    template <typename Scan>
    __device__ static void groups(const Facts* facts, Scratch& scratch, const Scan& scan) {
        const int lane = threadIdx.x % 32, t = lane % 4;
        uint32_t a[kTiles][kSteps][4];
        fragments(facts, scratch, a);
        int best[kSlots], second[kSlots], tile_of[kSlots];
#pragma unroll
        for (int r = 0; r < kSlots; ++r) best[r] = second[r] = kNoScore, tile_of[r] = 0;
        scan([&](int first, int count, const float* bias, const uint32_t* halves) {
            int before[kSlots];
#pragma unroll
            for (int r = 0; r < kSlots; ++r) before[r] = best[r];
#pragma unroll 1
            for (int section = 0; section < count; ++section)
                scores(a, section, reinterpret_cast<const float4*>(bias + section * Codebook<D>::kStarts) + t,
                       reinterpret_cast<const uint4*>(halves + section * Codebook<D>::kHalves) + lane, best, second);
#pragma unroll
            for (int r = 0; r < kSlots; ++r)
                if (best[r] != before[r]) tile_of[r] = first;
        });
#pragma unroll
        for (int r = 0; r < kSlots; ++r) {
            const int row = r * 8 + lane / 4;
            int top = max(best[r], __shfl_xor_sync(0xffffffffu, best[r], 1));
            top = max(top, __shfl_xor_sync(0xffffffffu, top, 2));
            // scores below 0 are in no order: whatever is close to the best has to be above
            const float least = __int_as_float(top) - scratch.tolerance[row];
            int16_t group = kNone;
            if (__int_as_float(best[r]) >= least)
                group = static_cast<int16_t>((tile_of[r] + best[r] % kSectionsOfKey) * 4 + t);
            if (!(least > 0.0f) || __int_as_float(second[r]) >= least) group = kMany;
            scratch.group[row][t] = group;
        }
        __syncwarp();
    }

    // Of a codebook that is one group.
    __device__ static void only_group(Scratch& scratch) {
        for (int i = threadIdx.x % 32; i < kRows * 4; i += 32) scratch.group[i / 4][i % 4] = i % 4 ? kNone : 0;
        __syncwarp();
    }

    // Bits of the squared distance in the upper half, index in the lower, of the codeword nearest to row 8 * slot + g, for
    // the lanes 4 g to 4 g + 3. Infinity and 0 where no distance is below infinity.
    __device__ static uint64_t nearest(const Scratch& scratch, int slot, const Rows& codewords) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const int16_t* group = scratch.group[slot * 8 + g];
        const float* x = scratch.x + (slot * 8 + g) * kStride;
        const bool many = group[0] == kMany || group[1] == kMany || group[2] == kMany || group[3] == kMany;
        unsigned long long key = kNowhere;
        for (int i = 0; i < 4 && !many; ++i) {
            if (group[i] == kNone) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // half of the rows begin with the second half of the group: see row_piece
                const int k = group[i] * kGroup + (half ^ (g & 1)) * 4 + t;
                key = min(key, key_of(x, codewords.rows, k));
            }
        }
        key = min(key, __shfl_xor_sync(0xffffffffu, key, 1));
        key = min(key, __shfl_xor_sync(0xffffffffu, key, 2));
        for (uint32_t left = __ballot_sync(0xffffffffu, many && t == 0); left; left &= left - 1) {
            const int owner = (__ffs(static_cast<int>(left)) - 1) / 4;
            const unsigned long long found = of_all(scratch.x + (slot * 8 + owner) * kStride, codewords);
            if (g == owner) key = found;
        }
        return key;
    }

  private:
    static constexpr int kNoScore = -2147483647 - 1;  // -0.0f
    static constexpr int kSectionsOfKey = 16;
    static constexpr unsigned long long kNowhere = 0x7f800000ull << 32;

    template <typename T>
    __device__ static void copy_rows(const T* from, int count, int width, T* to, int stride) {
        const int lane = threadIdx.x % 32, rows_ahead = 32 / width, columns_ahead = 32 % width;
        int row = lane / width, column = lane % width;
        for (int i = lane; i < count * width; i += 32) {
            to[row * stride + column] = from[i];
            row += rows_ahead, column += columns_ahead;
            if (column >= width) column -= width, ++row;
        }
        __syncwarp();
    }

    // a <- x' of the rows; scratch.tolerance <- by how much less than the best the score of the nearest may be.
    __device__ static void fragments(const Facts* facts, Scratch& scratch, uint32_t (&a)[kTiles][kSteps][4]) {
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const float scale = facts->scale, longest = __uint_as_float(facts->longest), lost = __uint_as_float(facts->error);
        float2 shift[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) shift[s] = reinterpret_cast<const float2*>(facts->shift)[s * 4 + t];
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = m * 16 + h * 8 + g;
                const float2* x = reinterpret_cast<const float2*>(scratch.x + row * kStride);
                float squared = 0.0f;
#pragma unroll
                for (int s = 0; s < kSteps; ++s) {
                    const float2 point = x[s * 4 + t];
                    const float value[2] = {(point.x - shift[s].x) * scale, (point.y - shift[s].y) * scale};
                    f16 high[2], low[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        high[e] = from_float<f16>(value[e]);
                        low[e] = from_float<f16>(value[e] - to_float(high[e]));
                        squared = fmaf(value[e], value[e], squared);
                    }
                    a[m][s][h] = pack_halves(high[0], high[1]);
                    a[m][s][h + 2] = pack_halves(low[0], low[1]);
                }
                squared += __shfl_xor_sync(0xffffffffu, squared, 1);
                squared += __shfl_xor_sync(0xffffffffu, squared, 2);
                if (t == 0) scratch.tolerance[row] = tolerance(sqrtf(squared), longest, lost);
            }
        __syncwarp();
    }

    // Twice the error of a score, and the error of the distances that decide. length: |x'|; longest, lost: of the codebook.
    __device__ static float tolerance(float length, float longest, float lost) {
        // c' in one half; terms cut off in products, and 4 bits of a key; x' in two halves, which are not below 2^-25
        const float error = 1.001f * lost * length + (kSteps + 3.5f) * 0x1p-20f * (kBias + length * longest) +
                            0x1p-22f * longest;
        const float reach = length + longest;
        return 1.01f * (2.0f * error + (D + 3) * 0x1p-24f * reach * reach);
    }

    // best, second: the greatest keys of groups, and the second greatest. A key is the bits of a score, with the section
    // in place of the last four: ordered as the scores are, where they are above 0.
    __device__ __forceinline__ static void scores(const uint32_t (&a)[kTiles][kSteps][4], int section, const float4* bias,
                                                  const uint4* halves, int (&best)[kSlots], int (&second)[kSlots]) {
        alignas(16) uint32_t words[kSteps][4];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) *reinterpret_cast<uint4*>(words[s]) = halves[s * 32];
        int top[kSlots];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            alignas(16) float start[4];
            *reinterpret_cast<float4*>(start) = bias[i * 4];
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
                float sum[4];
                mma_m16n8k16_from(sum, a[m][0], {words[0][i], words[0][i]}, start);
#pragma unroll
                for (int s = 1; s < kSteps; ++s) mma_m16n8k16<f16>(sum, a[m][s], {words[s][i], words[s][i]});
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int one = __float_as_int(sum[2 * h]), other = __float_as_int(sum[2 * h + 1]), r = 2 * m + h;
                    top[r] = i == 0 ? max(one, other) : max(max(top[r], one), other);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kSlots; ++r) {
            const int key = (top[r] & -kSectionsOfKey) | section;
            second[r] = max(second[r], min(best[r], key));
            best[r] = max(best[r], key);
        }
    }

    __device__ static unsigned long long key_of(const float* x, const float* rows, int k) {
        const float4* codeword = reinterpret_cast<const float4*>(rows + static_cast<int64_t>(k) * D);
        float squared = 0.0f;
#pragma unroll
        for (int piece = 0; piece < D / 4; ++piece) {
            const float4 c = codeword[row_piece<D>(k, piece)], p = reinterpret_cast<const float4*>(x)[piece];
            const float difference[4] = {p.x - c.x, p.y - c.y, p.z - c.z, p.w - c.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) squared = fmaf(difference[i], difference[i], squared);
        }
        return static_cast<unsigned long long>(__float_as_uint(squared)) << 32 | static_cast<uint32_t>(k);
    }

    // By all lanes, for one row.
    __device__ static unsigned long long of_all(const float* x, const Rows& codewords) {
        unsigned long long key = kNowhere;
        for (int k = threadIdx.x % 32; k < codewords.k; k += 32) key = min(key, key_of(x, codewords.rows, k));
        for (int step = 16; step > 0; step /= 2) key = min(key, __shfl_xor_sync(0xffffffffu, key, step));
        return key;
    }
};

}  // namespace qnk
