#include "cuda.h"

namespace {
int processors = 3, capability = 80;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = processors; break;
        case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(emulator::shared_limit); break;
    }
    return cudaSuccess;
}

// For tests: multiprocessors of the device, its compute capability (80 or 90), and shared memory of a block, which
// launchers may ask for.
extern "C" __attribute__((visibility("default"))) void qnk_emulator_processors(int count) { processors = count; }
extern "C" __attribute__((visibility("default"))) void qnk_emulator_capability(int tens) { capability = tens; }
extern "C" __attribute__((visibility("default"))) void qnk_emulator_shared_memory(int bytes) {
    emulator::shared_limit = static_cast<size_t>(bytes);
}
