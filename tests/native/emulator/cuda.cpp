#include "cuda.h"

namespace {
int processors = 3;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? processors : static_cast<int>(emulator::shared_limit);
    return cudaSuccess;
}

// For tests: multiprocessors of the device, and shared memory of a block, which launchers may ask for.
extern "C" __attribute__((visibility("default"))) void qnk_emulator_processors(int count) { processors = count; }
extern "C" __attribute__((visibility("default"))) void qnk_emulator_shared_memory(int bytes) {
    emulator::shared_limit = static_cast<size_t>(bytes);
}
