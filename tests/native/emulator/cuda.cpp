#include "cuda.h"

namespace {

int processors = 3, capability = 80;
size_t shared_override = 0;  // bytes of shared memory of a block, where not those of the capability

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": maximum per thread block.
size_t shared_of_capability() {
    switch (capability) {
        case 80:
        case 87: return 163 * 1024;
        case 86:
        case 89: return 99 * 1024;
    }
    return capability >= 120 ? 99 * 1024 : 227 * 1024;  // 12.x; 9.0, 10.x, 11.x
}

void limit_shared_memory() { emulator::shared_limit = shared_override ? shared_override : shared_of_capability(); }

}  // namespace

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = processors; break;
        case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(emulator::shared_limit); break;
    }
    return cudaSuccess;
}

// For tests: multiprocessors of the device, its compute capability times 10, and shared memory of a block (0: that of
// the capability), which launchers may ask for.
extern "C" __attribute__((visibility("default"))) void qnk_emulator_processors(int count) { processors = count; }
extern "C" __attribute__((visibility("default"))) void qnk_emulator_capability(int tens) {
    capability = tens;
    limit_shared_memory();
}
extern "C" __attribute__((visibility("default"))) void qnk_emulator_shared_memory(int bytes) {
    shared_override = static_cast<size_t>(bytes);
    limit_shared_memory();
}
