#include "cuda.h"

namespace {
int processors = 3, shared_memory = 227 * 1024;  // bytes of a block, as on sm_90
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? processors : shared_memory;
    return cudaSuccess;
}

// For tests: multiprocessors of the device, and shared memory of a block, which launchers may ask for.
extern "C" __attribute__((visibility("default"))) void qnk_emulator_processors(int count) { processors = count; }
extern "C" __attribute__((visibility("default"))) void qnk_emulator_shared_memory(int bytes) { shared_memory = bytes; }
