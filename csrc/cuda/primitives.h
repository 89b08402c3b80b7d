// Instructions that C++ has no name for: tensor cores, matrix loads, asynchronous copies (PTX ISA, sm_80 on).
// Fragments are in the registers of a warp as the PTX ISA lays them out; all 32 lanes take part. With
// QNK_EMULATE the same functions come from the emulator, by way of cuda/device.h.
#pragma once

#include "cuda/device.h"

#ifndef QNK_EMULATE

namespace qnk {

// d [16, 8] += a [16, 16] @ b [16, 8], T bf16 or f16, sums in fp32. With g = lane / 4 and t = lane % 4:
//   a: words (g, 2t..2t+1), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..) as (row, columns), low half first
//   b: words (2t..2t+1, g), (2t + 8.., g) as (rows, column);  d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define QNK_MMA_M16N8K16(type, name)                                                                               \
    template <>                                                                                                    \
    __device__ __forceinline__ void mma_m16n8k16<type>(float (&d)[4], const uint32_t (&a)[4],                      \
                                                       const uint32_t (&b)[2]) {                                   \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, "              \
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                               \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                          \
    }
QNK_MMA_M16N8K16(bf16, "bf16")
QNK_MMA_M16N8K16(f16, "f16")
#undef QNK_MMA_M16N8K16

// d = a @ b + c of f16. c stays in its registers, for several products that start from it.
__device__ __forceinline__ void mma_m16n8k16_from(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const float (&c)[4]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
}

// d [16, 8] += a [16, 32] @ b [32, 8], A and B int8_t or uint8_t, sums in int32 that wrap around. d as above;
//   a: words (g, 4t..4t+3), (g + 8, 4t..), (g, 4t + 16..), (g + 8, 4t + 16..);  b: words (4t.., g), (4t + 16.., g)
template <typename A, typename B>
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define QNK_MMA_M16N8K32(A, B, names)                                                                              \
    template <>                                                                                                    \
    __device__ __forceinline__ void mma_m16n8k32<A, B>(int32_t (&d)[4], const uint32_t (&a)[4],                    \
                                                       const uint32_t (&b)[2]) {                                   \
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." names ".s32 {%0, %1, %2, %3}, "                      \
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                               \
                     : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                          \
    }
QNK_MMA_M16N8K32(int8_t, int8_t, "s8.s8")
QNK_MMA_M16N8K32(uint8_t, int8_t, "u8.s8")
QNK_MMA_M16N8K32(int8_t, uint8_t, "s8.u8")
QNK_MMA_M16N8K32(uint8_t, uint8_t, "u8.u8")
#undef QNK_MMA_M16N8K32

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Matrices of 8 rows of 8 16-bit values from shared memory: lane 8i + j gives the address of row j of matrix i,
// 16-byte aligned. word[i] of a lane: elements (lane / 4, 2 (lane % 4) ..+1) of matrix i; _trans: of its transpose.
#define QNK_LDMATRIX(name, count, suffix, operands, address, ...)                                                  \
    __device__ __forceinline__ void name(uint32_t (&word)[count], const void* row) {                               \
        asm volatile("ldmatrix.sync.aligned.m8n8.x" #count suffix ".shared.b16 {" operands "}, [" address "];"     \
                     : __VA_ARGS__                                                                                 \
                     : "r"(shared_address(row))                                                                    \
                     : "memory");                                                                                  \
    }
#define QNK_FOUR "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
#define QNK_TWO "=r"(word[0]), "=r"(word[1])
QNK_LDMATRIX(ldmatrix_x4, 4, "", "%0, %1, %2, %3", "%4", QNK_FOUR)
QNK_LDMATRIX(ldmatrix_x4_trans, 4, ".trans", "%0, %1, %2, %3", "%4", QNK_FOUR)
QNK_LDMATRIX(ldmatrix_x2, 2, "", "%0, %1", "%2", QNK_TWO)
QNK_LDMATRIX(ldmatrix_x2_trans, 2, ".trans", "%0, %1", "%2", QNK_TWO)
#undef QNK_LDMATRIX
#undef QNK_FOUR
#undef QNK_TWO

// Asks for the line of `global` in the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// 16 bytes that nobody reads again soon: past the L1 cache, which keeps what is read more than once.
__device__ __forceinline__ uint4 load_once_16(const void* global) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(global));
    return value;
}

// Copies 16 bytes from global to shared memory, both 16-byte aligned, of which the first `bytes` are read and the
// others 0; `from` is not read at all where bytes is 0. It lands at the wait for its group.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// The same of 4 bytes, 4-byte aligned.
__device__ __forceinline__ void cp_async_4(void* to, const void* from, int bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// The copies of this thread since the last commit are a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last `Pending`. For copies of other threads, a barrier after it.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Barriers 1 to 15 beside __syncthreads(), which is 0: complete when `Threads` have come, in whole warps, by either.
// sync waits for that; arrive does not, and what it comes after is there for those that wait.
template <int Threads>
__device__ __forceinline__ void barrier_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}
template <int Threads>
__device__ __forceinline__ void barrier_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}

// Bit i of the result: bit (4 a_i + 2 b_i + c_i) of Table. Of (0xf0, 0xcc, 0xaa) for (a, b, c) Table is the formula.
template <int Table>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(Table));
    return result;
}

}  // namespace qnk

#endif
