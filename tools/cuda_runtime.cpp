// Takes the place of the CUDA runtime in a build of csrc/cuda: launches are noted, and nothing runs.
// cuda_launches.py loads it.
#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace {

struct Device {
    int major, minor, processors, shared_memory;  // bytes that a block may ask for
};
struct Launch {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};

constexpr size_t kSharedWithoutAsking = 48 * 1024;
Device device;
Launch configuration;
cudaError_t last_error = cudaSuccess;
// by what stands for the kernel on the host; of kernels that the library registers before main, hence static here
std::unordered_map<const void*, std::string>& names() {
    static std::unordered_map<const void*, std::string> all;
    return all;
}
std::unordered_map<const void*, size_t> allowed;                     // dynamic shared memory that was asked for
std::map<std::tuple<std::string, unsigned, size_t>, int> launches;  // kernel, threads, dynamic shared memory
std::string report;

}  // namespace

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

EXPORTED void launches_device(int major, int minor, int processors, int shared_memory) {
    device = {major, minor, processors, shared_memory};
    allowed.clear();
    launches.clear();
}

// Lines of: mangled name, threads of a block, bytes of dynamic shared memory.
EXPORTED const char* launches_noted() {
    report.clear();
    for (const auto& one : launches)
        report += std::get<0>(one.first) + ' ' + std::to_string(std::get<1>(one.first)) + ' ' +
                  std::to_string(std::get<2>(one.first)) + '\n';
    return report.c_str();
}

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    names()[host] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3 block, void**, size_t shared, cudaStream_t) {
    if (shared > kSharedWithoutAsking && shared > allowed[kernel]) return last_error = cudaErrorInvalidValue;
    ++launches[{names().at(kernel), block.x * block.y * block.z, shared}];
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > device.shared_memory)
        return cudaErrorInvalidValue;
    allowed[host] = static_cast<size_t>(value);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = device.processors; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *value = device.major; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: *value = device.minor; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_memory; return cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}
cudaError_t cudaGetDevice(int* index) {
    *index = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "a launch that no such device takes"; }

}
