// What every kernel includes in place of CUDA's headers: the language, its 16-bit types, shared memory, launches.
//
// With QNK_EMULATE the same kernels compile as plain C++ against tests/native/emulator, where each CUDA thread is a
// fiber. So that this works, a kernel file
//   - takes static shared memory by QNK_SHARED(float, tile, [32][33]) and dynamic by QNK_SHARED_MEMORY(name),
//   - is launched by launch(), which takes the place of <<<>>>,
//   - writes PTX only through cuda/primitives.h.
#pragma once

#include <stdint.h>

#ifdef QNK_EMULATE

#include "cuda.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// `name`: an array of `type` with the given extents, one for each block.
#define QNK_SHARED(type, name, extents) __shared__ type name extents
// `name`: unsigned char*, aligned to 128 bytes, of as many bytes as the launch asked for.
#define QNK_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

namespace qnk {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
    return __float2half_rn(x);
}

constexpr size_t kSharedWithoutAsking = 48 * 1024;  // bytes of shared memory that every launch may have

// Static shared memory counts towards what a launch may have without asking; no kernel with dynamic memory has more of
// it than half.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
    if (shared_bytes > kSharedWithoutAsking / 2) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    return cudaGetLastError();
}

}  // namespace qnk

#endif

namespace qnk {

// Multiprocessors of the current device.
inline int processors() {
    int device = 0, count = 1;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

int wgmma_use();  // see qnk_cuda_use_wgmma

// Whether the current device runs code of sm_90a, with wgmma: compute capability 9.0, and no other.
inline bool has_wgmma() {
    int device = 0, major = 0, minor = 0;
    if (wgmma_use() == 0 || cudaGetDevice(&device) != cudaSuccess) return false;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return major == 9 && minor == 0;
}

// Bytes of shared memory that a block may have on the current device.
inline int shared_memory_limit() {
    int device = 0, bytes = static_cast<int>(kSharedWithoutAsking);
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

}  // namespace qnk
