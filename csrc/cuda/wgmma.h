// wgmma of sm_90a: products of a warpgroup, 128 threads, that run while its threads do other work.
//
// Products go like this (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"):
//   1. write the tile of B to shared memory; every thread that wrote: fence_async_shared(), then __syncthreads()
//   2. write the registers of A, and of d before the first product: wgmma_fence(d, a, ...), of all that were written
//   3. wgmma_m64k16(d, a, b) for as many products as there are, in the order of the sums, then wgmma_commit()
//   4. wgmma_wait<Pending>(): the groups but the last Pending are complete. Until then nothing may touch their d and
//      a, or write their tiles of B
//   5. wgmma_results(d) before d is read: to the compiler it is the place where they change
// All of it by whole warpgroups, in uniform control flow. On other architectures the functions are empty, and kernels
// are under `if constexpr (kHasWgmma)`. With QNK_EMULATE they come from the emulator, which checks the above.
#pragma once

#include "cuda/primitives.h"

namespace qnk {

// Descriptor of B [16 of k, N] in shared memory, where the k of each column lie together, in chunks of 16 bytes (8
// values). Swizzle128: column n, chunk c of k is at tile_offset(n, c) of a tile [columns, 64 of k], which starts at a
// multiple of 1024 bytes; a step of 16 along k is kNextK more. The hardware takes bits 4 to 6 of an address xor bits 7
// to 9. Plain: 8 columns of a chunk are 128 bytes together (a core matrix); from one chunk to the next are
// `leading_bytes`, from 8 columns to the next `stride_bytes`.
enum class Swizzle : uint32_t { Plain = 0, Swizzle128 = 1 };

__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes,
                                                  Swizzle swizzle) {
    const uint32_t low = (address & 0x3ffff) >> 4 | leading_bytes >> 4 << 16;
    const uint32_t high = stride_bytes >> 4 | static_cast<uint32_t>(swizzle) << 30;
    return static_cast<uint64_t>(high) << 32 | low;
}

constexpr uint64_t kNextK = 32 >> 4;
constexpr uint32_t kSwizzleBytes = 1024;  // of the pattern: 8 columns of 128 bytes

__device__ __forceinline__ uint64_t wgmma_swizzled_operand(uint32_t address) {
    return wgmma_operand(address, 16, kSwizzleBytes, Swizzle::Swizzle128);
}

// Byte of column `n`, chunk `c` of 8 values of k (0 to 7) in a swizzled tile [columns, 64].
__device__ __forceinline__ int tile_offset(int n, int c) { return n * 128 + ((c ^ n) & 7) * 16; }

// Bytes from `memory` to the next multiple of kSwizzleBytes in the shared address space.
__device__ __forceinline__ uint32_t to_swizzle_boundary(const void* memory) {
    return -shared_address(memory) & (kSwizzleBytes - 1);
}

#ifndef QNK_EMULATE

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#define QNK_WGMMA(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kHasWgmma = false;
#define QNK_WGMMA(...)
#endif

// Writes of this thread to shared memory, copies that it waited for among them, come before what products read.
__device__ __forceinline__ void fence_async_shared() { QNK_WGMMA("fence.proxy.async.shared::cta;" ::: "memory"); }

// To the compiler, registers that change here.
__device__ __forceinline__ void wgmma_touch(float& d) { QNK_WGMMA("" : "+f"(d)::"memory"); }
__device__ __forceinline__ void wgmma_touch(uint32_t& a) { QNK_WGMMA("" : "+r"(a)::"memory"); }
template <typename T, int Count>
__device__ __forceinline__ void wgmma_touch(T (&array)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) wgmma_touch(array[i]);
}

// The products after it may use `registers`, arrays of d or A that were written before and are not in flight.
template <typename... Arrays>
__device__ __forceinline__ void wgmma_fence(Arrays&... registers) {
    (wgmma_touch(registers), ...);
    QNK_WGMMA("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last commit are a group.
__device__ __forceinline__ void wgmma_commit() { QNK_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    QNK_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

template <typename Array>
__device__ __forceinline__ void wgmma_results(Array& d) {
    wgmma_touch(d);
}

// d [64, N] += a [64, 16] @ b [16, N], T bf16 or f16, sums in fp32. Of warp w of the warpgroup, with g = lane / 4 and
// t = lane % 4:
//   a: words (16w + g, 2t..2t+1), (16w + g + 8, 2t..), (16w + g, 2t + 8..), (16w + g + 8, 2t + 8..) as (row, columns)
//   d[4i..4i+3]: (16w + g, 8i + 2t), (16w + g, 8i + 2t + 1), (16w + g + 8, 8i + 2t), (16w + g + 8, 8i + 2t + 1)
template <typename T, int N>
struct Wgmma;

#define QNK_TEN(tens)                                                                                              \
    "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, "     \
    "%" #tens "8, %" #tens "9, "
#define QNK_TO_30 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " QNK_TEN(1) QNK_TEN(2)
#define QNK_TO_60 QNK_TO_30 QNK_TEN(3) QNK_TEN(4) QNK_TEN(5)
#define QNK_TO_120 QNK_TO_60 QNK_TEN(6) QNK_TEN(7) QNK_TEN(8) QNK_TEN(9) QNK_TEN(10) QNK_TEN(11)
#define QNK_D8(i)                                                                                                  \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),    \
        "+f"(d[i + 7])
#define QNK_D32(i) QNK_D8(i), QNK_D8(i + 8), QNK_D8(i + 16), QNK_D8(i + 24)
#define QNK_D64(i) QNK_D32(i), QNK_D32(i + 32)
#define QNK_D128(i) QNK_D64(i), QNK_D64(i + 64)

#define QNK_WGMMA_M64K16(T, name, N, registers, operands, a_and_b)                                                 \
    template <>                                                                                                    \
    struct Wgmma<T, N> {                                                                                           \
        static __device__ __forceinline__ void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {        \
            QNK_WGMMA("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" operands "}, " a_and_b  \
                      ", 1, 1, 1, 0;"                                                                              \
                      : registers                                                                                  \
                      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                       \
        }                                                                                                          \
    };
#define QNK_WGMMA_SIZES(T, name)                                                                                   \
    QNK_WGMMA_M64K16(T, name, 64, QNK_D32(0), QNK_TO_30 "%30, %31", "{%32, %33, %34, %35}, %36")                   \
    QNK_WGMMA_M64K16(T, name, 128, QNK_D64(0), QNK_TO_60 "%60, %61, %62, %63", "{%64, %65, %66, %67}, %68")        \
    QNK_WGMMA_M64K16(T, name, 256, QNK_D128(0),                                                                    \
                     QNK_TO_120 "%120, %121, %122, %123, %124, %125, %126, %127",                                  \
                     "{%128, %129, %130, %131}, %132")
QNK_WGMMA_SIZES(bf16, "bf16")
QNK_WGMMA_SIZES(f16, "f16")
#undef QNK_WGMMA_SIZES
#undef QNK_WGMMA_M64K16
#undef QNK_TEN
#undef QNK_TO_30
#undef QNK_TO_60
#undef QNK_TO_120
#undef QNK_D8
#undef QNK_D32
#undef QNK_D64
#undef QNK_D128
#undef QNK_WGMMA

template <typename T, int Count>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[Count], const uint32_t (&a)[4], uint64_t b) {
    Wgmma<T, 2 * Count>::run(d, a, b);
}

#endif

}  // namespace qnk
