// Small kernels for the tests of the emulator: what is right must work, and each mistake be found.
// All have the arguments x [n] and y [n], and one block of n threads.
#include "cuda/primitives.h"
#include "cuda/status.h"
#include "cuda/wgmma.h"

namespace qnk {
namespace {

// Sum of x in every element of y: shuffles within warps, shared memory between them.
__global__ void sum(const float* x, float* y, int n) {
    QNK_SHARED(float, partial, [32]);
    float v = x[threadIdx.x];
    for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < n / 32; ++w) v += partial[w];
    y[threadIdx.x] = v;
}

// Lane l of each warp: from lane l - 1 of its segment of 8, from lane 5 of it, how many are positive, whether all are.
__global__ void shuffles(const float* x, float* y, int) {
    const float v = x[threadIdx.x];
    const float up = __shfl_up_sync(0xffffffffu, v, 1, 8), fifth = __shfl_sync(0xffffffffu, v, 5, 8);
    const int positive = __popc(__ballot_sync(0xffffffffu, v > 0));
    const int least = __reduce_min_sync(0xffffffffu, static_cast<int>(threadIdx.x % 32) - 7);
    const int all = __all_sync(0xffffffffu, v > 0);
    y[threadIdx.x] = up + 2 * fifth + static_cast<float>(100 * positive + 10000 * all + least);
}

// The two halves of a warp in different branches, each with collectives of its own.
__global__ void halves(const float* x, float* y, int) {
    const uint32_t mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    float v = x[threadIdx.x];
    if (threadIdx.x % 32 < 16)
        v = __shfl_xor_sync(mask, v, 1);
    else
        for (int i = 0; i < 3; ++i) v = __shfl_xor_sync(mask, v, 1 << i);
    __syncwarp();
    y[threadIdx.x] = v;
}

// y = x, by way of asynchronous copies of 16 bytes to dynamic shared memory.
template <int Pending>
__global__ void copied(const float* x, float* y, int n) {
    QNK_SHARED_MEMORY(memory);
    float* tile = reinterpret_cast<float*>(memory);
    const int first = 4 * static_cast<int>(threadIdx.x);
    if (first < n) cp_async_16(tile + first, x + first, min(16, 4 * (n - first)));
    cp_async_commit();
    cp_async_wait<Pending>();
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void write_past_the_end(const float* x, float* y, int n) { y[threadIdx.x + (threadIdx.x == n - 1)] = x[0]; }

__global__ void read_before_the_start(const float* x, float* y, int) {
    y[threadIdx.x] = x[static_cast<int>(threadIdx.x) - 1];
}

__global__ void misaligned(const float* x, float* y, int n) {
    if (threadIdx.x == 0) reinterpret_cast<float4*>(y)[0] = *reinterpret_cast<const float4*>(x + n % 4 + 1);
}

__global__ void half_written(const float* x, float* y, int n) {
    if (threadIdx.x < n / 2) y[threadIdx.x] = x[threadIdx.x];
}

// Element 3 by thread 3, and by another, of the same value.
__global__ void written_twice(const float*, float* y, int n) {
    y[threadIdx.x] = 1.0f;
    if (static_cast<int>(threadIdx.x) == n - 1) y[3] = 1.0f;
}

// The same by one thread, before and after it waits for others.
__global__ void written_on_both_sides_of_a_barrier(const float*, float* y, int) {
    if (threadIdx.x == 3) y[3] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = 1.0f;
}

// Of parts [2][n] that were written by one launch, and of zeros, which may be written as often as kernels like.
__global__ void writes_parts(const float* x, float* parts, int n) {
    parts[threadIdx.x] = x[threadIdx.x];
    parts[n + threadIdx.x] = 1.0f;
}
__global__ void adds_parts(const float* parts, float* y, int n) {
    y[threadIdx.x] = parts[threadIdx.x] + parts[n + threadIdx.x];
}
__global__ void adds_itself(const float* x, float* y, int) {
    atomicAdd(reinterpret_cast<unsigned*>(y), static_cast<unsigned>(x[threadIdx.x]));
}

__global__ void writes_its_input(const float* x, float* y, int) {
    const_cast<float*>(x)[threadIdx.x] = 1.0f;
    y[threadIdx.x] = 1.0f;
}

__global__ void shared_past_the_end(const float* x, float* y, int) {
    QNK_SHARED_MEMORY(tile);
    reinterpret_cast<float*>(tile)[threadIdx.x + 1] = x[threadIdx.x];
    y[threadIdx.x] = 1.0f;
}

__global__ void shared_never_written(const float*, float* y, int) {
    QNK_SHARED(float, tile, [1024]);
    y[threadIdx.x] = tile[threadIdx.x];
}

// Static shared memory of so many KiB, beside n KiB of dynamic.
template <int StaticKiB>
__global__ void large_shared(const float* x, float* y, int) {
    QNK_SHARED(float, tile, [StaticKiB * 256]);
    QNK_SHARED_MEMORY(memory);
    tile[threadIdx.x] = x[0];
    memory[threadIdx.x] = 1;
    y[threadIdx.x] = tile[threadIdx.x];
}

// y = x reversed; Barrier: whether writes and reads of shared memory are kept apart.
template <bool Barrier>
__global__ void reversed(const float* x, float* y, int n) {
    QNK_SHARED(float, tile, [1024]);
    tile[threadIdx.x] = x[threadIdx.x];
    if (Barrier) __syncthreads();
    y[threadIdx.x] = tile[n - 1 - static_cast<int>(threadIdx.x)];
}

// The first element of a buffer that is written again before all have read it.
__global__ void missing_second_barrier(const float* x, float* y, int n) {
    QNK_SHARED(float, value, [1]);
    float sum = 0;
    for (int i = 0; i < n; ++i) {
        if (static_cast<int>(threadIdx.x) == i) value[0] = x[i];
        __syncthreads();
        sum += value[0];
    }
    y[threadIdx.x] = sum;
}

__global__ void barrier_for_some(const float* x, float* y, int) {
    if (threadIdx.x < 16) __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void barrier_after_exit(const float* x, float* y, int) {
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x == 3) return;
    __syncthreads();
}

__global__ void two_barriers(const float* x, float* y, int) {
    if (x[threadIdx.x] > 0)
        __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = 0;
}

enum class Pass { Right, TooFew, TooMany, Twice, HalfAWarp, OtherCount };

// The first 32 threads and the next take turns at adding to one value, n / 32 - 1 turns each, by barriers 1 and 2.
template <Pass What>
__global__ void taken_in_turns(const float* x, float* y, int n) {
    QNK_SHARED(float, value, [32]);
    const int lane = static_cast<int>(threadIdx.x) % 32, mine = 1 + static_cast<int>(threadIdx.x) / 32;
    if (mine > 2) return;
    if (mine == 1) value[lane] = 0;
    if (mine == 2) barrier_arrive<64>(1);
    if (What == Pass::TooMany && mine == 1) barrier_arrive<64>(3);
    if (What == Pass::Twice && mine == 2) barrier_arrive<64>(1);
    if (What == Pass::OtherCount) barrier_arrive<96>(1);
    for (int i = 0; i < n / 32 - 1; ++i) {
        barrier_sync<64>(mine);
        value[lane] = 2 * value[lane] + static_cast<float>(mine) * x[lane];
        if (What != Pass::HalfAWarp || lane % 2 == 0) barrier_arrive<64>(3 - mine);
    }
    if (What == Pass::HalfAWarp && mine == 1) barrier_arrive<64>(2);
    if (mine == 1 && What != Pass::TooFew) barrier_sync<64>(1);
    y[threadIdx.x] = value[lane];
}

// The second half waits for what the first never says.
__global__ void turn_never_given(const float* x, float* y, int) {
    if (threadIdx.x >= 32 && threadIdx.x < 64) barrier_sync<64>(2);
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void shuffle_from_absent(const float* x, float* y, int) {
    float v = x[threadIdx.x];
    if (threadIdx.x % 32 < 16) v = __shfl_sync(0x0000ffffu, v, 20);
    y[threadIdx.x] = v;
}

__global__ void lanes_disagree(const float* x, float* y, int) {
    const float v = x[threadIdx.x];
    y[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(0xffffffffu, v, 1) : __ballot_sync(0xffffffffu, v > 0);
}

__global__ void float_atomics(const float* x, float* y, int) {
    QNK_SHARED(float, sum, [1]);
    if (threadIdx.x == 0) sum[0] = 0;
    __syncthreads();
    atomicAdd(sum, x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = sum[0];
}

// d [16, 8] = a [16, k] @ b [8, k]^T by one warp; x = (a, b) in T, d in y, k = 256 / sizeof(T) / 8.
template <typename T, typename D, bool Transposed>
__global__ void product(const float* x, float* y, int) {
    constexpr int kRow = 32;  // bytes
    QNK_SHARED(uint4, tile, [24 * kRow / 16]);
    const int lane = static_cast<int>(threadIdx.x);
    unsigned char* const bytes = reinterpret_cast<unsigned char*>(tile);
    for (int i = lane; i < 24 * kRow / 16; i += 32) tile[i] = reinterpret_cast<const uint4*>(x)[i];
    __syncwarp();
    uint32_t a[4], b[2];
    ldmatrix_x4(a, bytes + lane % 16 * kRow + lane / 16 * 16);
    if (Transposed) {  // b as [k, 8], rows of 16 bytes
        ldmatrix_x2_trans(b, bytes + 16 * kRow + lane % 16 * 16);
    } else {
        ldmatrix_x2(b, bytes + (16 + lane % 8) * kRow + lane / 8 % 2 * 16);
    }
    D d[4] = {};
    if constexpr (sizeof(T) == 2)
        mma_m16n8k16<T>(d, a, b);
    else
        mma_m16n8k32<T, int8_t>(d, a, b);
    for (int i = 0; i < 4; ++i) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = static_cast<float>(d[i]);
}

enum class Wrong {
    Nothing,
    NoProxyFence,
    NoBarrier,
    NoFence,
    NoFenceOfSums,
    FenceBeforeFragments,
    NoWait,
    ReadInFlight,
    TileOverwritten,
    FragmentsOverwritten,
    SumsOverwritten,
    Misplaced,
    TooFar,
    HalfAGroup,
    LanesDiffer
};

// d [64, 64] = a [64, 32] @ b [64, 32]^T by one warpgroup; x = (a, b) in T, d in y.
template <typename T, Swizzle Layout, Wrong What>
__global__ void warpgroup_product(const float* x, float* y, int) {
    constexpr bool swizzled = Layout == Swizzle::Swizzle128;
    QNK_SHARED_MEMORY(memory);
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    unsigned char* const tile = memory + to_swizzle_boundary(memory) + (What == Wrong::Misplaced ? 256 : 0);
    for (int i = thread; i < 64 * 4; i += 128) {
        const int n = i / 4, c = i % 4;
        const int at = swizzled ? tile_offset(n, c) : n / 8 * 128 + c * 1024 + n % 8 * 16;
        cp_async_16(tile + at, reinterpret_cast<const uint4*>(x) + 256 + i);
    }
    cp_async_commit();
    cp_async_wait<0>();
    if (What != Wrong::NoProxyFence) fence_async_shared();
    if (What != Wrong::NoBarrier) __syncthreads();

    float d[32] = {};
    uint32_t a[2][4] = {};
    if (What == Wrong::FenceBeforeFragments) wgmma_fence(d, a);
    const auto* words = reinterpret_cast<const uint32_t*>(x);
    for (int k = 0; k < 2; ++k)
        for (int i = 0; i < 4; ++i) a[k][i] = words[(16 * warp + g + i % 2 * 8) * 16 + k * 8 + i / 2 * 4 + t];
    if (What == Wrong::NoFenceOfSums)
        wgmma_fence(a);
    else if (What != Wrong::NoFence && What != Wrong::FenceBeforeFragments)
        wgmma_fence(d, a);
    const uint32_t start = shared_address(tile), far = What == Wrong::TooFar ? 2048 : 0;
    for (int k = 0; k < 2; ++k) {
        uint64_t b = swizzled ? wgmma_operand(start, 16, 1024 + far, Layout) + k * kNextK
                              : wgmma_operand(start + k * 2048, 1024, 128, Layout);
        if (What == Wrong::LanesDiffer && thread == 5) b += 64;
        if (What != Wrong::HalfAGroup || thread < 64) wgmma_m64k16<T>(d, a[k], b);
    }
    wgmma_commit();
    if (What == Wrong::TileOverwritten && thread == 0) tile[40] += 1;
    if (What == Wrong::FragmentsOverwritten) a[1][2] = 7;
    if (What == Wrong::SumsOverwritten) d[3] = 7;
    if (What != Wrong::NoWait) wgmma_wait<What == Wrong::ReadInFlight>();
    if (What != Wrong::NoWait && What != Wrong::ReadInFlight) wgmma_results(d);
    for (int i = 0; i < 32; ++i) y[(16 * warp + g + i / 2 % 2 * 8) * 64 + i / 4 * 8 + 2 * t + i % 2] = d[i];
    if (What != Wrong::NoWait) wgmma_wait<0>();
}

// The same product from tiles of both, in which the 64 rows or columns of each k lie together.
template <typename T, Wrong What>
__global__ void warpgroup_product_across(const float* x, float* y, int) {
    constexpr int kTile = 32 * 128;  // bytes
    QNK_SHARED_MEMORY(memory);
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    unsigned char* const tiles = memory + to_swizzle_boundary(memory);
    for (int i = thread; i < 2 * 64 * 32; i += 128) {
        const int which = i / 2048, n = i / 32 % 64, k = i % 32;
        *reinterpret_cast<uint16_t*>(tiles + which * kTile + tile_offset(k, n / 8) + n % 8 * 2) =
            reinterpret_cast<const uint16_t*>(x)[i];
    }
    fence_async_shared();
    __syncthreads();
    float d[32] = {};
    wgmma_fence(d);
    for (int k = 0; k < 2; ++k) {
        const uint64_t a = wgmma_operand(shared_address(tiles) + k * 2048, 0, 1024, Swizzle::Swizzle128);
        wgmma_m64k16_across<T>(d, a, a + (kTile >> 4));
    }
    wgmma_commit();
    if (What == Wrong::TileOverwritten && thread == 0) tiles[40] += 1;
    wgmma_wait<0>();
    wgmma_results(d);
    for (int i = 0; i < 32; ++i) y[(16 * warp + g + i / 2 % 2 * 8) * 64 + i / 4 * 8 + 2 * t + i % 2] = d[i];
}

}  // namespace
}  // namespace qnk

#define QNK_CASE(name, kernel, shared_bytes)                                                                       \
    extern "C" QNK_API int qnk_cuda_##name(const float* x, float* y, int n, void* stream) {                        \
        return qnk::cuda_status(qnk::launch(kernel, 1, n, shared_bytes, stream, x, y, n));                         \
    }
#define QNK_SIMPLE(name) QNK_CASE(name, qnk::name, 0)
QNK_SIMPLE(sum)
QNK_SIMPLE(shuffles)
QNK_SIMPLE(halves)
QNK_CASE(copied, qnk::copied<0>, 16 * ((n + 3) / 4))
QNK_CASE(copied_without_wait, qnk::copied<1>, 16 * ((n + 3) / 4))
QNK_SIMPLE(write_past_the_end)
QNK_SIMPLE(read_before_the_start)
QNK_SIMPLE(misaligned)
QNK_SIMPLE(half_written)
QNK_SIMPLE(written_twice)
QNK_SIMPLE(written_on_both_sides_of_a_barrier)
QNK_SIMPLE(writes_parts)
QNK_SIMPLE(adds_parts)
QNK_SIMPLE(adds_itself)
QNK_SIMPLE(writes_its_input)
QNK_CASE(shared_past_the_end, qnk::shared_past_the_end, 4 * n)
QNK_SIMPLE(shared_never_written)
QNK_CASE(shared_beside_4, qnk::large_shared<4>, 1024 * n)
QNK_CASE(shared_beside_28, qnk::large_shared<28>, 1024 * n)
QNK_CASE(reversed, qnk::reversed<true>, 0)
QNK_CASE(missing_barrier, qnk::reversed<false>, 0)
QNK_SIMPLE(missing_second_barrier)
QNK_SIMPLE(barrier_for_some)
QNK_SIMPLE(barrier_after_exit)
QNK_SIMPLE(two_barriers)
QNK_SIMPLE(turn_never_given)
QNK_CASE(taken_in_turns, qnk::taken_in_turns<qnk::Pass::Right>, 0)
QNK_CASE(turns_too_few, qnk::taken_in_turns<qnk::Pass::TooFew>, 0)
QNK_CASE(turns_too_many, qnk::taken_in_turns<qnk::Pass::TooMany>, 0)
QNK_CASE(turns_twice, qnk::taken_in_turns<qnk::Pass::Twice>, 0)
QNK_CASE(turns_half_a_warp, qnk::taken_in_turns<qnk::Pass::HalfAWarp>, 0)
QNK_CASE(turns_other_count, qnk::taken_in_turns<qnk::Pass::OtherCount>, 0)
QNK_SIMPLE(shuffle_from_absent)
QNK_SIMPLE(lanes_disagree)
QNK_SIMPLE(float_atomics)
QNK_CASE(product_bf16, (qnk::product<qnk::bf16, float, false>), 0)
QNK_CASE(product_f16, (qnk::product<qnk::f16, float, false>), 0)
QNK_CASE(product_bf16_trans, (qnk::product<qnk::bf16, float, true>), 0)
QNK_CASE(product_s8, (qnk::product<int8_t, int32_t, false>), 0)
QNK_CASE(product_u8, (qnk::product<uint8_t, int32_t, false>), 0)
QNK_CASE(wgmma_bf16, (qnk::warpgroup_product<qnk::bf16, qnk::Swizzle::Swizzle128, qnk::Wrong::Nothing>), 10240)
QNK_CASE(wgmma_f16, (qnk::warpgroup_product<qnk::f16, qnk::Swizzle::Swizzle128, qnk::Wrong::Nothing>), 10240)
QNK_CASE(wgmma_plain, (qnk::warpgroup_product<qnk::bf16, qnk::Swizzle::Plain, qnk::Wrong::Nothing>), 10240)
QNK_CASE(wgmma_across, (qnk::warpgroup_product_across<qnk::bf16, qnk::Wrong::Nothing>), 10240)
QNK_CASE(wgmma_across_overwritten, (qnk::warpgroup_product_across<qnk::bf16, qnk::Wrong::TileOverwritten>), 10240)
#define QNK_WRONG(name, what)                                                                                      \
    QNK_CASE(name, (qnk::warpgroup_product<qnk::bf16, qnk::Swizzle::Swizzle128, qnk::Wrong::what>), 10240)
QNK_WRONG(wgmma_no_proxy_fence, NoProxyFence)
QNK_WRONG(wgmma_no_barrier, NoBarrier)
QNK_WRONG(wgmma_no_fence, NoFence)
QNK_WRONG(wgmma_no_fence_of_sums, NoFenceOfSums)
QNK_WRONG(wgmma_fence_before_fragments, FenceBeforeFragments)
QNK_WRONG(wgmma_no_wait, NoWait)
QNK_WRONG(wgmma_read_in_flight, ReadInFlight)
QNK_WRONG(wgmma_tile_overwritten, TileOverwritten)
QNK_WRONG(wgmma_fragments_overwritten, FragmentsOverwritten)
QNK_WRONG(wgmma_sums_overwritten, SumsOverwritten)
QNK_WRONG(wgmma_misplaced, Misplaced)
QNK_WRONG(wgmma_too_far, TooFar)
QNK_WRONG(wgmma_half_a_group, HalfAGroup)
QNK_WRONG(wgmma_lanes_differ, LanesDiffer)
