// CUDA C++ as plain C++17: keywords, the runtime's functions, 16-bit types, intrinsics, the PTX of cuda/primitives.h.
// Barriers take their place in the source from the default arguments.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/dtype.h"
#include "launches.h"
#include "memory.h"
#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static const

#define QNK_SHARED(type, name, extents)                                                                            \
    static char name##_site;                                                                                       \
    using name##_type = type extents;                                                                              \
    auto& name = *static_cast<name##_type*>(                                                                       \
        emulator::shared_array(&name##_site, sizeof(name##_type), alignof(type)))
#define QNK_SHARED_MEMORY(name) unsigned char* const name = static_cast<unsigned char*>(emulator::shared_memory())

// ---- The runtime ----
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline cudaError_t& emulated_error() {
    static cudaError_t error = cudaSuccess;
    return error;
}
inline cudaError_t cudaPeekAtLastError() { return emulated_error(); }
inline cudaError_t cudaGetLastError() { return std::exchange(emulated_error(), cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "none" : emulator::message(); }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    return memset(to, value, bytes), cudaSuccess;
}

namespace qnk {

constexpr size_t kSharedWithoutAsking = 48 * 1024;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
    emulator::note_launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes);
    if (!emulator::run(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); }))
        emulated_error() = cudaErrorLaunchFailure;
    return cudaGetLastError();
}

}  // namespace qnk

// ---- Vectors ----
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#include "intrinsics.h"
#include "tensor_core.h"
#include "warp.h"
#include "wgmma.h"
